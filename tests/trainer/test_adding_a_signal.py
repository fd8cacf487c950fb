"""The table of visual signals, and a signal added to it as docs/adding-a-signal.md says, with the code of that page."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from torch.nn.functional import normalize
from trainer.test_trainer_signal import capture_unshuffled, hidden_and_masks
from trainer.tiny_runs import generation_batch, make_trainer, rows
from vgpo_trainer import signals
from vgpo_trainer.cli import build_parser
from vgpo_trainer.runs.metrics import read_metrics

from vgpo_kernels import VGPOConfig, visual_weights

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding-a-signal.md"
MODULE = "vgpo_trainer.signals.nearest"


@pytest.fixture
def nearest(tmp_path, monkeypatch):
    """The page's file in the room of signals, and its line in the table."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if "class NearestSignal" in block]
    [(name, place)] = re.findall(r'^"(\w+)": "([\w.:]+)",$', PAGE.read_text(), re.MULTILINE)
    (tmp_path / "nearest.py").write_text(code)
    monkeypatch.setattr(signals, "__path__", [*signals.__path__, str(tmp_path)])
    monkeypatch.setitem(signals.SIGNALS, name, place)
    yield
    sys.modules.pop(MODULE, None)


def test_every_signal_of_the_table_can_be_made():
    for name in signals.SIGNALS:
        kind = signals.signal_class(name)
        assert issubclass(kind, signals.VisualSignal) and not kind.__abstractmethods__
    with pytest.raises(ValueError, match="signal must be one of focus, attention, got 'gaze'"):
        signals.signal_class("gaze")


@pytest.mark.parametrize("source", ["loss", "scoring"])
def test_the_signal_of_the_page_trains(nearest, tmp_path, source):
    trainer = make_trainer(tmp_path, signal="nearest", vgpo_signal=source, max_steps=1)
    weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    (record,) = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert -1 < record["vgpo/visual_focus"] < 1 and record["vgpo/psi_std"] > 0 and record["vgpo/factor_max"] > 1
    assert any(not torch.equal(weight, weights[name]) for name, weight in trainer.model.named_parameters())


def test_its_factors_follow_from_its_values(nearest, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, signal="nearest", dataset=rows([1, 2, 3, 1]), gradient_accumulation_steps=4)
    trainer.model.train()
    kept = capture_unshuffled(trainer, monkeypatch)
    inputs = generation_batch(trainer)
    trainer._prepare_inputs(inputs)
    hidden, shown, mask = hidden_and_masks(trainer, kept[0])
    states = normalize(hidden, dim=-1)
    largest = torch.stack(
        [(states[row] @ states[row][shown[row]].T).amax(-1)[-mask.shape[1] :] for row in range(len(mask))]
    )
    groups = torch.tensor([int(row["answer"]) for row in inputs])
    expected = visual_weights(largest, mask, groups, VGPOConfig.paper()).factors
    torch.testing.assert_close(kept[0]["visual_factors"][mask], expected[mask], atol=2e-4, rtol=2e-4)
    assert expected[mask].std() > 0.1


def test_the_command_line_offers_it(nearest):
    asked = ["train", "--model", "m", "--dataset", "d", "--out", "o", "--signal", "nearest"]
    assert build_parser().parse_args(asked).signal == "nearest"
