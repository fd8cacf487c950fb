"""The page of what VGPO costs on many GPUs says what its formulas say, of the models and the adapter as they are."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import scale

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_are_what_the_formulas_say() -> None:
    page = scale.PAGE.read_text()
    assert scale.filled(page) == page, "run benchmarks/scale.py --write"
    assert set(re.findall(r"<!-- table: (\w+) -->", page)) == set(scale.TABLES)
    # A table that somebody changed by hand is put right, and what stands around it stays.
    assert scale.filled(page.replace("| 7B | 8 |", "| 7B | 9 |")) == page


def test_shapes_are_those_of_the_models() -> None:
    """Of 72B, whose shape is the default of the configuration in transformers, every matrix is counted."""
    transformers = pytest.importorskip("transformers")
    text: Any = transformers.Qwen2_5_VLConfig().text_config
    assert text.num_hidden_layers == scale.LARGE.layers
    text.num_hidden_layers = 2
    with torch.device("meta"):
        decoder = transformers.Qwen2_5_VLTextModel(text)
    matrices = sum(parameter.numel() for parameter in decoder.parameters() if parameter.dim() == 2)
    head = text.vocab_size * text.hidden_size
    assert replace(scale.LARGE, layers=2).parameters == matrices + head
    # Qwen2.5-7B has 7.62 billion parameters, and the 72B 72.7.
    assert [round(model.parameters / 1e8) for model in (scale.SMALL, scale.LARGE)] == [76, 727]


def test_a_step_by_hand() -> None:
    plan = scale.Plan(scale.SMALL, 64, 8)
    assert plan.sampled == 512 * 8 * 32768
    assert scale.SMALL.kv_bytes == 57_344
    rollout, scoring, update = scale.step_seconds(plan)
    assert rollout == pytest.approx(plan.sampled * (2048 + 16384) * 57_344 / (64 * scale.copy_rate()))
    per_token = 2 * 7.07e9 + 4 * 28 * 3584 * 17_408
    assert scoring == pytest.approx(512 * 8 * 34_816 * per_token / (64 * 989e12 / 2), rel=1e-3)
    assert update == 4 * scoring
    # One response takes its time, on however many GPUs.
    alone = scale.rollout_seconds(scale.Plan(scale.SMALL, 10**6, 8))
    assert alone == pytest.approx(32768 * 2 * 7.07e9 / scale.copy_rate(), rel=1e-3)
    assert not scale.Plan(scale.LARGE, 8, 8).fits


def test_what_the_page_concludes() -> None:
    for plan in scale.PLANS:
        whole = sum(scale.step_seconds(plan))
        assert scale.focus_seconds(plan) / whole < 1e-5
        driver, own = scale.driver_seconds(plan) / whole, scale.own_driver_seconds(plan) / whole
        assert driver < (0.01 if plan.gpus <= 64 else 0.09)
        assert driver < own < 2 * driver
        assert 0.045 < scale.pass_seconds(plan) / (whole - scale.pass_seconds(plan)) < 0.135
        for one in scale.traffic(plan):
            assert one.bytes < 1e-4 * one.own or not one.own or one.what.startswith("hidden states")
    largest = scale.Plan(scale.SMALL, 1024, 8)
    assert scale.driver_seconds(largest) / sum(scale.step_seconds(largest)) > 0.05
    weights, reweight = (scale.driver_rows()[part]["seconds"] for part in ("weights", "reweight"))
    assert weights / reweight == pytest.approx(0.25, abs=0.05)
    two_phases = sum(scale.seconds_of(part, scale.Plan(scale.SMALL, 64, 16)) for part in scale.OF_SCORES)
    assert two_phases == pytest.approx(0.7, abs=0.05)
    assert scale.HELD == 37


def test_the_driver_fetches_what_the_adapter_fetches() -> None:
    """By the names of fields in its source: all that have a value for each token."""
    source = (ROOT / "vgpo_kernels" / "integrations" / "verl" / "trainers.py").read_text()
    (fields,) = re.findall(r"select_fields=\[(.*)\]", source)
    names = set(fields.replace('"', "").replace("*fields.values()", "visual_focus").split(", "))
    assert names - {"uid", "SECONDS"} == set(scale.FETCHED["VGPO"]), "uid and seconds are of responses"
