"""Batches and their edges, made once for every backend and every op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A rollout batch in one layout, with everything off its masks poisoned with NaN."""

    hidden: Tensor  # [B, S, D] or [N, D]
    visual_mask: Tensor  # [B, S] or [N]
    response_mask: Tensor  # [B, T] or [N]
    group_ids: Tensor  # [B]
    cu_seqlens: Tensor | None  # [B + 1]
    logp: Tensor  # response_mask's shape, as those that follow
    old_logp: Tensor
    ref_logp: Tensor
    entropy: Tensor
    advantages: Tensor  # [B]
    token_advantages: Tensor

    @property
    def has_visual(self) -> Tensor:
        """Whether each response has a visual token, bool ``[B]``."""
        if self.cu_seqlens is None:
            return self.visual_mask.any(-1)
        running = torch.cat([torch.zeros(1, dtype=torch.int64), self.visual_mask.cpu().cumsum(0)])
        return (running[self.cu_seqlens[1:].cpu()] > running[self.cu_seqlens[:-1].cpu()]).to(self.hidden.device)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Response:
    """How one response of a batch looks."""

    visual: int = 7
    text: int = 3
    length: int = 11
    group: int = 0
    holes: bool = False
    late: int = 0  # visual rows in the middle of the response: an image that a tool shows


EDGES: dict[str, tuple[Response, ...]] = {
    "plain": tuple(Response(group=index // 2, length=9 + 3 * index) for index in range(4)),
    "shuffled groups": tuple(Response(group=index % 3, length=17 - index) for index in range(7)),
    "holes": tuple(Response(group=0, length=25 + index, holes=True) for index in range(3)),
    "empty response": (Response(), Response(length=0), Response(length=4)),
    "all empty": (Response(length=0), Response(length=0)),
    "one token": (Response(length=1), Response(length=1, group=1), Response(length=2)),
    "no image": (Response(), Response(visual=0), Response(visual=0, group=1), Response()),
    "late images": (
        Response(late=3, length=16),
        Response(visual=0, late=4, length=13),
        Response(visual=2, late=1, length=30, holes=True),
        Response(visual=0, text=1, late=2, length=9, group=1),
        Response(length=14),
    ),
    "group of one": (Response(group=5), Response(group=-3), Response(group=2**40)),
    "single": (Response(),),
    "no responses": (),
    "long": (Response(visual=70, length=1300, holes=True), Response(visual=1, length=600)),
}


def make_batch(
    responses: tuple[Response, ...],
    *,
    features: int = 40,
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
    seed: int = 0,
    extra_padding: int = 0,
) -> Batch:
    """Draw a batch; the numbers of a response depend on the seed and its index, not on the layout.

    Visual rows carry a common direction so that cosines spread over their range. Padded batches are laid out
    ``[left padding, image, text, response, right padding]``, with T < S.
    """
    rows = []
    for index, response in enumerate(responses):
        generator = torch.Generator().manual_seed(1000 * seed + index)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator)

        length = response.visual + response.text + response.length
        hidden = normal(length, features) + 0.7 * normal(1, features)
        mask = torch.zeros(length, dtype=torch.bool)
        mask[length - response.length :] = True
        if response.holes:
            mask &= torch.rand(length, generator=generator) > 0.3
        visual = torch.arange(length) < response.visual
        middle = length - response.length // 2
        visual[middle : middle + response.late] = True
        mask[middle : middle + response.late] = False
        logp = -normal(length).abs() - 0.05
        rows.append(
            {
                "hidden": hidden,
                "visual": visual,
                "mask": mask,
                "logp": logp,
                "old_logp": logp + 0.3 * normal(length),
                "ref_logp": logp + 0.3 * normal(length),
                "entropy": normal(length).abs(),
                "advantage": normal(1)[0],
                "token_advantages": normal(length),
            }
        )
    lay_out = _packed if packed else _padded
    batch = lay_out(rows, responses, features, extra_padding)
    unread = ~(batch.visual_mask | _in_rows(batch))
    hidden = batch.hidden.masked_fill(unread[..., None], float("nan")).to(dtype)
    return replace(batch, hidden=hidden)


def _in_rows(batch: Batch) -> Tensor:
    """Return the response mask over the rows of hidden."""
    rows = torch.zeros_like(batch.visual_mask)
    rows[..., rows.shape[-1] - batch.response_mask.shape[-1] :] = batch.response_mask
    return rows


TOKEN_FIELDS = ("logp", "old_logp", "ref_logp", "entropy", "token_advantages")


def _packed(rows: list[dict[str, Tensor]], responses: tuple[Response, ...], features: int, _: int) -> Batch:
    def join(name: str, empty: Tensor) -> Tensor:
        return torch.cat([empty, *(row[name] for row in rows)])

    mask = join("mask", torch.zeros(0, dtype=torch.bool))
    fields = {name: join(name, torch.zeros(0)).masked_fill(~mask, float("nan")) for name in TOKEN_FIELDS}
    lengths = torch.tensor([0, *(len(row["mask"]) for row in rows)])
    return Batch(
        hidden=join("hidden", torch.zeros(0, features)),
        visual_mask=join("visual", torch.zeros(0, dtype=torch.bool)),
        response_mask=mask,
        group_ids=torch.tensor([response.group for response in responses], dtype=torch.int64),
        cu_seqlens=lengths.cumsum(0).to(torch.int32),
        advantages=torch.tensor([float(row["advantage"]) for row in rows]),
        **fields,
    )


def _padded(rows: list[dict[str, Tensor]], responses: tuple[Response, ...], features: int, extra_padding: int) -> Batch:
    # Prompts end and responses begin at one column, as rollout engines lay them out.
    prompt = max((response.visual + response.text for response in responses), default=0) + extra_padding
    width = max((response.length for response in responses), default=0) + extra_padding
    count = len(rows)
    hidden = torch.full((count, prompt + width, features), float("nan"))
    visual = torch.zeros(count, prompt + width, dtype=torch.bool)
    mask = torch.zeros(count, width, dtype=torch.bool)
    fields = {name: torch.full((count, width), float("nan")) for name in TOKEN_FIELDS}
    for index, (row, response) in enumerate(zip(rows, responses, strict=True)):
        begin = prompt - response.visual - response.text
        end = prompt + response.length
        hidden[index, begin:end] = row["hidden"]
        visual[index, begin:end] = row["visual"]
        scored = slice(len(row["mask"]) - response.length, None)
        mask[index, : response.length] = row["mask"][scored]
        for name in TOKEN_FIELDS:
            fields[name][index, : response.length] = row[name][scored]
    fields = {name: value.masked_fill(~mask, float("nan")) for name, value in fields.items()}
    return Batch(
        hidden=hidden,
        visual_mask=visual,
        response_mask=mask,
        group_ids=torch.tensor([response.group for response in responses], dtype=torch.int64),
        cu_seqlens=None,
        advantages=torch.tensor([float(row["advantage"]) for row in rows]),
        **fields,
    )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Change torch's default dtype inside a block."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
