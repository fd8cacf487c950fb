"""Sequences that are split over two and four processes of a gloo group: the results and gradients of one process."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.sequence_parallel_case import (
    LAYOUTS,
    NAMES,
    TEMPERATURE,
    Key,
    answered,
    batch_of,
    keys,
    objective,
    positions_of,
    response_rows,
)
from tolerance import assert_close, floor_of, same_bits
from torch import Tensor

from vgpo_kernels import backend, linear_logprob
from vgpo_kernels.integrations.sequence_parallel import next_tokens, zigzag_positions
from vgpo_kernels.reference.linear_logprob import predicting_rows
from vgpo_kernels.reference.visual_focus import visual_focus

ROOT = Path(__file__).resolve().parents[2]
Results = dict[int, list[dict[str, Any]]]


def run(script: str, folder: Path) -> None:
    """Run a script beside this file that starts ranks, which write to a folder."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank of each world computes."""
    folder = tmp_path_factory.mktemp("ranks")
    run("sequence_parallel_case.py", folder)
    return {world: [torch.load(folder / f"rank{rank}of{world}.pt") for rank in range(world)] for world in LAYOUTS}


@cache
def expected(name: str, packed: bool, dtype: str, visibility: str) -> tuple[Tensor, Tensor]:
    """Cosines of one process in fp64, and in fp32."""
    batch = batch_of(name, packed, dtype)
    given = (batch.hidden, batch.visual_mask, batch.response_mask, batch.cu_seqlens, None, None, visibility == "causal")
    return visual_focus(*given, dtype=torch.float64), visual_focus(*given, dtype=torch.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", LAYOUTS)
def test_focus_is_that_of_one_process(worlds: Results, world: int, name: str) -> None:
    for key in keys(world):
        if key.name != name:
            continue
        exact, narrow = expected(key.name, key.packed, key.dtype, key.visibility)
        found = [results["focus"][key][0] for results in worlds[world]]
        assert all(same_bits(found[0], one) for one in found[1:]), key
        assert_close(found[0], exact, narrow, name=str(key))


def test_the_batches_have_what_they_are_for() -> None:
    def has(value: float, *key: Any) -> bool:
        cos = expected(*key)[0]
        return bool((cos.isnan() if math.isnan(value) else cos == value).any())

    scored = batch_of("zero images", True, "float32").response_mask
    assert has(math.nan, "no image", True, "float32", "all")
    assert has(math.inf, "broken", True, "float32", "causal")
    assert has(math.inf, "zero images", True, "float32", "all")
    assert (expected("zero images", True, "float32", "all")[0][scored] == 0).sum() > 20
    different = expected("any masks", True, "float32", "all")[0] - expected("any masks", True, "float32", "causal")[0]
    assert different.nan_to_num().abs().max() > 0.1


def test_images_cross_ranks_and_ranks_have_none_or_only_padding() -> None:
    for packed in (False, True):
        image = batch_of("late images", packed, "float32").visual_mask
        cuts = [part[0] for part in (positions_of("default", image.shape[-1], 4, rank) for rank in (1, 2, 3))]
        assert any((image[..., cut - 1] & image[..., cut]).any() for cut in cuts)
    long = batch_of("long", False, "float32").visual_mask
    assert not long[:, positions_of("default", long.shape[-1], 4, 3)[0] :].any()
    short = batch_of("single", False, "float32").visual_mask.shape[-1]
    assert len(positions_of("uneven", short, 4, 0)) == 0
    assert positions_of("uneven", short, 4, 3)[-1] >= short
    tiny = batch_of("tiny", True, "float32").visual_mask.shape[-1]
    assert positions_of("default", tiny, 4, 3)[0] >= tiny


@pytest.mark.parametrize("world", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_an_image_that_arrives_late_changes_no_bit_before_it(worlds: Results, world: int, packed: bool) -> None:
    for layout, dtype in LAYOUTS[world]:
        results = worlds[world][0]["focus"]
        more = results[Key("late images", packed, layout, dtype, "causal")][0].view(-1)
        less = results[Key("one image less", packed, layout, dtype, "causal")][0].view(-1)
        same = (more == less) | (more.isnan() & less.isnan())
        changed = (~same).nonzero()
        assert len(changed)
        before = batch_of("late images", packed, dtype).response_mask.view(-1)[: changed[0]]
        assert before.sum() > 20


@pytest.mark.parametrize("world", LAYOUTS)
def test_where_images_come_first_both_visibilities_give_the_same_bits(worlds: Results, world: int) -> None:
    results = worlds[world][0]["focus"]
    for name in ("holes", "no image", "long", "single"):
        for key in keys(world):
            if key.name == name and key.visibility == "all":
                assert same_bits(results[key][0], results[key._replace(visibility="causal")][0]), key


@cache
def sums_sent(name: str, packed: bool, visibility: str) -> int:
    """Count the prototypes that differ: one a sequence; causal: one for each number of image tokens that is seen."""
    batch = batch_of(name, packed, "float32")
    if visibility == "all":
        return len(batch.group_ids)
    image, scored = batch.visual_mask, response_rows(batch)
    if batch.cu_seqlens is not None:
        lengths = batch.cu_seqlens.diff().tolist()
        pairs = list(zip(image.split(lengths), scored.split(lengths), strict=True))
    else:
        pairs = list(zip(image, scored, strict=True))
    seen = ((one.cumsum(0) - one.long())[asked] for one, asked in pairs)
    return sum(len(set(counts.tolist()) - {0}) for counts in seen)


@pytest.mark.parametrize("world", LAYOUTS)
def test_no_hidden_state_moves(worlds: Results, world: int) -> None:
    """A row of sums for each image of each rank, and a float a token: in bytes."""
    for key in keys(world):
        batch = batch_of(key.name, key.packed, key.dtype)
        tokens, rows = batch.response_mask.numel(), sums_sent(key.name, key.packed, key.visibility)
        calls = [("allgather_", 4 * rows * batch.hidden.shape[-1]), ("allreduce_", 4 * tokens)]
        for results in worlds[world]:
            assert results["focus"][key][1] == (calls[rows == 0 :] if tokens else []), key


@pytest.mark.parametrize("world", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_logprobs_and_their_gradients_are_those_of_one_process(worlds: Results, world: int, packed: bool) -> None:
    batch, ids, *head = answered(packed)
    hidden, weight, bias = (one.double().requires_grad_() for one in (batch.hidden, *head))
    mask, length = batch.response_mask, ids.shape[-1]
    rows = predicting_rows(mask, hidden)[mask.view(-1)]
    with backend("reference"):
        values = linear_logprob(
            hidden.view(-1, hidden.shape[-1])[rows],
            weight,
            ids[..., length - mask.shape[-1] :][mask],
            bias=bias,
            temperature=TEMPERATURE,
            return_entropy=True,
        )
    logp, entropy = (torch.zeros_like(mask, dtype=torch.float64).masked_scatter(mask, one) for one in values)
    by_hidden, by_weight, by_bias = torch.autograd.grad(objective(logp, entropy), (hidden, weight, bias))
    floor = floor_of(terms=len(rows))
    for layout, _ in LAYOUTS[world]:
        found = [results["logprobs"][packed, layout] for results in worlds[world]]
        assert all(torch.equal(found[0][place], one[place]) for one in found[1:] for place in (0, 1, 5))
        assert torch.equal(found[0][5], found[0][0])
        assert_close(found[0][0], logp, name="logp")
        assert_close(found[0][1], entropy, name="entropy")
        assert_close(sum(one[3] for one in found), by_weight, name="gradient by the weight", floor=floor)
        assert_close(sum(one[4] for one in found), by_bias, name="gradient by the bias", floor=floor)
        for rank, one in enumerate(found):
            positions = positions_of(layout, length, world, rank)
            inside = positions < length
            name = f"gradient by the hidden states of rank {rank}"
            assert_close(one[2][..., inside, :], by_hidden[..., positions[inside], :], name=name, floor=floor)
            assert not one[2][..., ~inside, :].any()


@pytest.mark.parametrize("world", LAYOUTS)
def test_gathered_values_and_their_gradient(worlds: Results, world: int) -> None:
    whole = torch.zeros(2, 2 * world)
    for rank in range(world):
        whole[:, [rank, world + rank]] = torch.tensor([[1.0, 2.0], [5.0, 6.0]]) + 10 * rank
    for rank, results in enumerate(worlds[world]):
        values, gradient = results["gathered"]
        assert values.dtype == gradient.dtype == torch.bfloat16
        assert torch.equal(values.float(), whole)
        # Its own share of the loss that every rank computes, and nothing of what was left out.
        own = torch.nn.functional.pad(2 * whole[:, [rank, world + rank]], (1, 1))
        assert torch.equal(gradient.float(), own)


def test_two_groups_of_two_ranks_are_two_worlds(worlds: Results) -> None:
    for rank, results in enumerate(worlds[4]):
        found, alone = results["pairs"], worlds[2][rank % 2]
        key = Key(*found["key"])
        assert same_bits(found["focus"][0], alone["focus"][key][0])
        for one, other in zip(found["logprobs"], alone["logprobs"][key.packed, key.layout], strict=True):
            assert torch.equal(one, other)


def test_zigzag_positions_balance_the_work() -> None:
    assert [zigzag_positions(8, 2, rank).tolist() for rank in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    for length in (0, 1, 7, 16, 29):
        for ranks in (1, 2, 3, 4):
            parts = [zigzag_positions(length, ranks, rank) for rank in range(ranks)]
            assert len({part.sum().item() for part in parts}) == 1
            assert len({len(part) for part in parts}) == 1
            every = torch.cat(parts).sort().values
            assert torch.equal(every, torch.arange(len(every)))
            assert length <= len(every) < length + 2 * ranks


def test_next_tokens_of_a_padded_batch() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    mask = torch.tensor([[True, False, True], [False, True, True]])
    positions = torch.tensor([0, 1, 4, 7])
    assert next_tokens(ids, positions).tolist() == [[2, 3, -100, -100], [7, 8, -100, -100]]
    assert next_tokens(ids, positions, response_mask=mask).tolist() == [[-100, 3, -100, -100], [-100, -100, -100, -100]]
    assert next_tokens(ids, torch.arange(5), response_mask=mask, ignore_index=0)[1].tolist() == [0, 0, 9, 10, 0]


def test_next_tokens_of_a_packed_batch() -> None:
    ids, positions = torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8), torch.tensor([0, 1, 2, 3, 4, 5])
    boundaries = torch.tensor([0, 0, 2, 2, 5, 5], dtype=torch.int32)
    assert next_tokens(ids, positions, boundaries).tolist() == [2, -100, 4, 5, -100, -100]
    mask = torch.tensor([False, True, False, False, True])
    found = next_tokens(ids, positions[1:], boundaries, response_mask=mask)
    assert found.tolist() == [-100, -100, 5, -100, -100]
    nothing = torch.tensor([0, 0])
    assert next_tokens(ids[:0], positions[:2], nothing).tolist() == [-100, -100]


@pytest.mark.slow
def test_a_model_in_parts_is_the_model(tmp_path: Path) -> None:
    """Qwen2.5-VL with verl's Ulysses and in zig-zag parts: focus, log-probabilities, gradients of every weight."""
    pytest.importorskip("transformers")
    pytest.importorskip("verl", reason="verl is not installed (make verl installs it)")
    run("sequence_parallel_model_case.py", tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    whole = ranks[0][None]
    values = ("all", "causal", "logp", "entropy")
    assert (whole["all"] != 0).sum() == 7
    for kind in ("ulysses", "zigzag"):
        parts = [rank[kind] for rank in ranks]
        for name, exact in whole.items():
            if name in values:
                assert torch.equal(parts[0][name], parts[1][name])
                assert_close(parts[0][name], exact.double(), name=f"{name} of {kind}", floor=1e-6)
            else:  # a gradient: ranks have shares, none of a weight that their rows do not pass
                found = sum(part[name] for part in parts if name in part)
                assert_close(found, exact.double(), name=f"{name} of {kind}", floor=1e-5)
