"""What verl's workers compute on a device that is called as Ascend's NPUs are; verl itself is not needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import torch
from integrations.rollout_case import METRICS, expected_factors, last_hidden_states, rollouts, tiny_model
from torch import Tensor

from vgpo_kernels import VGPOConfig, backends
from vgpo_kernels.integrations.surface import reweight
from vgpo_kernels.integrations.verl.scoring import FIELD, SECONDS, clock, focus_of_packed, nested_outputs


def nested(rows: list[list[int]], device: torch.device) -> Tensor:
    values = torch.tensor([value for row in rows for value in row]).to(device)
    lengths = torch.tensor([0, *(len(row) for row in rows)])
    return torch.nested.nested_tensor_from_jagged(values, lengths.cumsum(0).to(device))


def check_factors(device: torch.device) -> None:
    """The focus of packed sequences and the advantages that it re-weights are those of the paper's equations."""
    model, batch, config = tiny_model(), rollouts(), VGPOConfig.paper()
    hidden = last_hidden_states(model, batch)
    ids = nested([one.ids for one in batch], device)
    sampled = nested([one.response_mask for one in batch], device)
    scored = [[0] * len(one.prompt) + one.response_mask for one in batch]
    stop = clock(ids)
    cos = focus_of_packed(torch.cat(hidden)[None].to(device), ids, model, sampled)
    assert cos.device.type == device.type and stop() > 0
    mask = torch.tensor([value for row in scored for value in row], dtype=torch.bool)
    advantages, metrics = reweight(
        torch.ones(mask.shape, device=device),
        cos.roll(1),  # verl's lie one place to the left
        mask.to(device),
        [one.uid for one in batch],
        config,
        ids.offsets(),
    )
    expected = [factor for row in expected_factors(batch, hidden, config) for factor in row]
    rows = [value for one in batch for value in [1] * len(one.prompt) + [2] * len(one.response)]
    found = advantages.cpu()[torch.tensor(rows) == 2]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-5)
    assert METRICS.items() <= metrics.items()
    factors = torch.tensor(expected)[mask[torch.tensor(rows) == 2]]
    assert abs(metrics["vgpo/factor_mean"] - factors.mean()) < 1e-5


def check_time(device: torch.device) -> None:
    """What verl reports of a micro-batch: nested, and with the seconds of the device's own events."""
    ids = nested([[3, 4, 5], [6, 7]], device)
    stop = clock(ids)
    time.sleep(0.02)
    seconds = stop()
    assert 0.02 <= seconds < 10
    output = nested_outputs(torch.arange(5.0, device=device), ids, seconds)
    assert output[FIELD].values().tolist() == [0, 1, 2, 3, 4]
    assert torch.allclose(output[SECONDS].values().cpu(), torch.full((2,), seconds / 2))


def check_no_trial(device: torch.device) -> None:
    """No float64 is tried on an NPU: a sum in it has broken streams of theirs, long after it was queued."""
    with patch.object(backends, "_computes_float64", side_effect=AssertionError("tried")):
        assert backends.wide_dtype(torch.device(device.type, 1)) == torch.float32
    assert backends.describe()["serves"][device.type] == "reference"


def everything(device: torch.device) -> Iterator[Callable[[], None]]:
    """Yield what an adapter asks of a device."""
    yield partial(check_factors, device)
    yield partial(check_time, device)
    yield partial(check_no_trial, device)
