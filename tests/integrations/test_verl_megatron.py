"""Visual focus in verl's Megatron engine: batches over every kind of ranks against one model of transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integrations.megatron_case import Layout, ask, engine_of, qwen, rank_of
from integrations.ranks import run_ranks
from integrations.rollout_case import IMAGE, last_hidden_states, rollouts
from tolerance import assert_close, same_bits
from torch import Tensor

from vgpo_kernels import visual_focus
from vgpo_kernels.integrations.surface import UnknownSurfaceError

pytest.importorskip("verl", reason="verl is not installed (make verl installs it)")
pytest.importorskip("megatron.core", reason="megatron-core is not installed (make verl installs it)")

from verl.utils import tensordict_utils

from vgpo_kernels.integrations.verl import megatron
from vgpo_kernels.integrations.verl.scoring import ALONE, FIELD, FLAG, SECONDS

LAYOUTS = {
    1: {
        "packed": Layout(),
        "fused": Layout(fused=True),
        "padded": Layout(packed=False),
    },
    2: {
        "bucket": Layout(bucket=64),
        "tensor": Layout(tensor=2),
        "tensor, fused": Layout(tensor=2, fused=True),
        "tensor, padded": Layout(tensor=2, packed=False),
        "tensor, whole sequences": Layout(tensor=2, sequence=False),
        "pipeline": Layout(pipeline=2),
        "pipeline, interleaved": Layout(pipeline=2, interleaved=2),
        "pipeline, fused": Layout(pipeline=2, fused=True),
        "pipeline, further tokens": Layout(pipeline=2, mtp=True),
        "pipeline, further tokens in a stage": Layout(pipeline=2, mtp=True, stages="Etttt|mL"),
        "context": Layout(context=2),
        "context, fused": Layout(context=2, fused=True),
        "context, padded": Layout(context=2, packed=False),
    },
    4: {
        "context": Layout(context=4),
        "tensor, context": Layout(tensor=2, context=2),
        "tensor, context, further tokens": Layout(tensor=2, context=2, mtp=True),
        "tensor, context, fused": Layout(tensor=2, context=2, fused=True),
        "tensor, context, padded": Layout(tensor=2, context=2, packed=False),
        "tensor, context, bucket": Layout(tensor=2, context=2, bucket=64),
        "tensor, context, whole sequences": Layout(tensor=2, context=2, sequence=False),
        "tensor, pipeline": Layout(tensor=2, pipeline=2),
        "pipeline, context": Layout(pipeline=2, context=2),
    },
}


def batch_of_verl() -> Any:
    """A rollout batch as verl's agent loop writes it."""
    records = []
    for rollout in rollouts():
        ids, mask = torch.tensor(rollout.ids), torch.tensor(rollout.response_mask)
        records.append(
            {"input_ids": ids, "position_ids": torch.arange(len(ids)), "response_mask": mask, "loss_mask": mask}
        )
    return tensordict_utils.list_of_dict_to_tensordict(records)


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Tensor]]:
    """Focus and log-probs of each sequence by itself, in a model of transformers, one place to the left."""
    model, batch = qwen(), rollouts()
    found: dict[str, list[Tensor]] = {FIELD: [], "log_probs": []}
    for rollout, states in zip(batch, last_hidden_states(model, batch), strict=True):
        ids = torch.tensor(rollout.ids)
        sampled = torch.tensor([0] * len(rollout.prompt) + rollout.response_mask).bool()
        image = (ids == IMAGE) & ~sampled
        cos = visual_focus(states[None], image[None], sampled[None], visibility="causal")[0]
        with torch.no_grad():
            logp = model.lm_head(states).log_softmax(-1).gather(-1, ids.roll(-1)[:, None])[:, 0]
        found[FIELD].append(cos.roll(-1))
        found["log_probs"].append(logp)
    assert 0 < torch.cat(found[FIELD]).isnan().sum() < 20
    return found


def require_equal(found: dict[str, list[Tensor]] | None, expected: dict[str, list[Tensor]], where: str) -> None:
    assert found is not None and found.keys() == {"log_probs", "entropy", FIELD, SECONDS}
    assert len(found[SECONDS]) == len(found[FIELD]) == len(expected[FIELD])
    for name, rows in expected.items():
        for index, (one, other) in enumerate(zip(found[name], rows, strict=True)):
            # verl leaves open what the log-prob of a last token is of.
            last = -1 if name == "log_probs" else len(other)
            assert_close(one[:last], other[:last].double(), name=f"{name} {index}, {where}", floor=1e-5)


def test_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, list[Tensor]]) -> None:
    model, data = qwen(), batch_of_verl()
    with rank_of(0, 1, tmp_path, monkeypatch.setattr):
        for name, layout in LAYOUTS[1].items():
            heads: list[Any] = []
            with engine_of(model, layout) as engine:
                engine.module[0].output_layer.register_forward_hook(lambda *_, heads=heads: heads.append(None))
                alone = ask(engine, data, FLAG, ALONE)
                assert not heads, "the focus alone needs no LM head"
                found, plain = ask(engine, data, FLAG), ask(engine, data)
            assert bool(heads) != layout.fused
            require_equal(found, expected, name)
            assert found is not None and plain is not None and alone is not None
            assert plain.keys() == {"log_probs", "entropy"} and alone.keys() == {FIELD, SECONDS}
            assert all(map(torch.equal, found["log_probs"], plain["log_probs"])), name
            assert all(map(same_bits, found[FIELD], alone[FIELD])), name


def test_a_layout_that_is_not_verls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rank_of(0, 1, tmp_path, monkeypatch.setattr), engine_of(qwen(), Layout()) as engine:
        hidden = torch.zeros(5, 1, 32)
        with pytest.raises(ValueError, match=r"\[5, 1, 32\] of a micro-batch .* lays out as \[B, S\] \[1, \d+\]"):
            megatron._focus(engine, engine.module[0], hidden, batch_of_verl())


def outputs_of(world: int, folder: Path) -> list[dict[str, dict[str, list[Tensor]] | None]]:
    """What each of several processes returns for every layout."""
    torch.save({"data": batch_of_verl(), "layouts": LAYOUTS[world], "flags": [FLAG]}, folder / "case.pt")
    run_ranks("megatron_case.py", world, folder, timeout=600)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_are_one_model(world: int, tmp_path: Path, expected: dict[str, list[Tensor]]) -> None:
    ranks = outputs_of(world, tmp_path)
    for name, layout in LAYOUTS[world].items():
        outputs = [found[name] for found in ranks]
        # Ranks of the last pipeline stage alone return something, and the same.
        first = world - world // layout.pipeline
        assert outputs[:first] == [None] * first, name
        for rank, found in enumerate(outputs[first:], first):
            require_equal(found, expected, f"{name}, rank {rank}")
            last = outputs[-1]
            assert found is not None and last is not None
            for one, other in zip(found[FIELD], last[FIELD], strict=True):
                assert same_bits(one, other), f"{name}, rank {rank}"


def test_another_engine_is_refused() -> None:
    class Engine:
        def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> None: ...

    with pytest.raises(UnknownSurfaceError, match="not batch_iter, model"):
        megatron.score_focus(Engine)


@pytest.mark.parametrize("settings", [{}, {"dynamic_context_parallel": False, "context_parallel_size": 4}], ids=str)
def test_what_is_scored(settings: dict[str, Any]) -> None:
    assert megatron.refusals(configuration(settings)) == []


def test_what_is_refused_at_the_start() -> None:
    (reason,) = megatron.refusals(configuration({"dynamic_context_parallel": True}))
    assert "megatron.dynamic_context_parallel" in reason


def configuration(settings: dict[str, Any]) -> Any:
    actor = SimpleNamespace(strategy="megatron", megatron=settings)
    return SimpleNamespace(actor_rollout_ref=SimpleNamespace(actor=actor))
