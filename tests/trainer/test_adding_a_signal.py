"""The table of visual signals, and a signal added to it as docs/adding-a-signal.md says, with the code of that page."""

from __future__ import annotations

import math
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from torch.nn.functional import normalize
from trainer.test_trainer_signal import capture_unshuffled, hidden_and_masks
from trainer.tiny_runs import generation_batch, make_trainer, rows
from vgpo_trainer import signals
from vgpo_trainer.options.parser import parse_options
from vgpo_trainer.runs.metrics import read_metrics
from vgpo_trainer.signals.factors import compute_factors

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
    with pytest.raises(
        ValueError,
        match="signal must be one of focus, attention, dependency, similarity, k3, logp_change, js, got 'gaze'",
    ):
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


def test_it_compares_a_token_with_the_images_before_it(nearest):
    """Image tokens at the start and in the middle of a response; the second row has the latter alone."""
    hidden = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(2))
    image = torch.zeros(2, 9, dtype=torch.bool)
    image[0, 1] = image[:, 5] = True
    response = torch.tensor([[1, 1, 0, 1, 1, 1]] * 2)  # the last six positions
    batch = signals.SignalBatch(image, response, torch.ones_like(image))
    signal = signals.signal_class("nearest")(batch, signals.SignalSettings(VGPOConfig.paper()))
    signal._take(hidden)
    states = normalize(hidden, dim=-1)
    for row, places in enumerate(([1, 5], [5])):
        for token, value in enumerate(signal.marked_values()[row].tolist()):
            found = [(states[row, 3 + token] @ states[row, place]).item() for place in places if place < 3 + token]
            assert value == pytest.approx(max(found), abs=1e-6) if found else math.isnan(value)


class Given(signals.VisualSignal):
    """A signal that is what it is told."""

    told: torch.Tensor

    @classmethod
    def check(cls, model, settings):
        pass

    def capture(self, model):
        return nullcontext()

    @property
    def values(self):
        return self.told


def test_a_token_that_saw_no_image_has_no_signal_whatever_a_signal_says():
    image = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    response = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]])
    signal = Given(signals.SignalBatch(image, response, torch.ones_like(image)), None)
    nan, inf = math.nan, math.inf
    signal.told = torch.tensor([[0.1, nan, 0.3, -inf], [0.5, 0.6, 0.7, 0.8], [0.0, 0.0, 0.0, 0.0]])
    expected = [[0.1, inf, 0.3, inf], [nan, nan, 0.7, 0.8], [nan] * 4]
    assert torch.equal(signal.marked_values().nan_to_num(9.0, posinf=8.0), torch.tensor(expected).nan_to_num(9.0, 8.0))
    shown = [[0.0, nan, 0.3, -inf], [nan, 0.0, 0.7, 0.8], [nan] * 4]
    assert torch.equal(signal.marked_shown().nan_to_num(9.0, 8.0, 7.0), torch.tensor(shown).nan_to_num(9.0, 8.0, 7.0))
    found = compute_factors(
        signal.marked_values(),
        response,
        torch.tensor([0, 0, 0]),
        VGPOConfig.paper(),
        gather=lambda tensor: tensor,
        process_index=0,
    )
    assert found.weighted.tolist() == [False, True, False]
    assert found.counted.tolist() == [[False] * 4, [False, False, True, True], [False] * 4]
    assert found.psi[1, 0] == 0 and found.psi[1, 2] < 0 < found.psi[1, 3] and (found.factors[::2] == 1).all()


def test_the_command_line_offers_it(nearest):
    asked = ["--model", "m", "--dataset", "d", "--out", "o", "--signal", "nearest", "--use_cpu", "true"]
    assert parse_options(asked).training.signal == "nearest"
