"""A batch as its checks read it: padded or packed, every array over the positions of whole sequences."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vgpo_kernels import checks
from vgpo_kernels.reference.layout import counts_of, responses_of


@dataclass(frozen=True)
class Batch:
    """Sequences of prompt and response, flattened to L positions. A padded batch has B rows of S, L = B S.

    Attributes:
        sequence: Which sequence a position is in, int64 ``[L]``.
        begin: First position of each sequence, int64 ``[B]``.
        response: Positions that the response arrays cover, int64 ``[N]``.
        scored: Whether the response mask is set, bool ``[L]``.
        prompt_mask: What the caller says of prompts, bool ``[L]``, or ``None``.
        visual: Whether a position holds an image token, bool ``[L]``, or ``None``.
        hidden: Hidden states, ``[L, D]``, or ``None``.
        ids: Tokens, int64 ``[L]``, -1 where they are not given; or ``None``.
        has_prompts: Whether tokens of prompts are among them.
        is_whole: Whether the positions are those of whole sequences; else they are those of responses alone.
        logp: Log-probabilities, fp32 ``[L]``, NaN off the response arrays; or ``None``.
        old_logp: The same of the policy that sampled.
        advantages: Per response ``[B]``, or ``[L]``; or ``None``.
        groups: Group ids, int64 ``[B]``, or ``None``.

    """

    sequence: Tensor
    begin: Tensor
    response: Tensor
    scored: Tensor
    prompt_mask: Tensor | None
    visual: Tensor | None
    hidden: Tensor | None
    ids: Tensor | None
    has_prompts: bool
    is_whole: bool
    logp: Tensor | None
    old_logp: Tensor | None
    advantages: Tensor | None
    groups: Tensor | None

    @property
    def size(self) -> int:
        """Number of sequences, B."""
        return self.begin.shape[0]

    @cached_property
    def prompt(self) -> Tensor:
        """Whether a position is in the prompt, bool ``[L]``: what the caller says, or what is before all scored ones.

        Nothing is known of a sequence without a scored position, which has none.
        """
        length = len(self.sequence)
        first = self.first(self.scored)[self.sequence]
        before = torch.arange(length, device=first.device) < first
        return (before if self.prompt_mask is None else self.prompt_mask) & (first < length)

    def any_of(self, positions: Tensor) -> Tensor:
        """Whether a sequence has a position that is True in ``[L]``, bool ``[B]``."""
        return self.count(positions) > 0

    def count(self, positions: Tensor) -> Tensor:
        """How many positions of a sequence are True in ``[L]``, int64 ``[B]``."""
        return counts_of(positions, self.sequence, self.size)

    def first(self, positions: Tensor) -> Tensor:
        """Position of the first True of each sequence, int64 ``[B]``; L where there is none."""
        return self._extreme(positions, "amin", self.sequence.shape[0])

    def last(self, positions: Tensor) -> Tensor:
        """Position of the last True of each sequence, int64 ``[B]``; -1 where there is none."""
        return self._extreme(positions, "amax", -1)

    def _extreme(self, positions: Tensor, reduce: str, none: int) -> Tensor:
        places = torch.where(positions, torch.arange(len(positions), device=positions.device), none)
        return torch.full_like(self.begin, none).scatter_reduce(0, self.sequence, places, reduce)


def read(
    hidden: Tensor | None,
    ids: Tensor | None,
    logp: Tensor | None,
    old_logp: Tensor | None,
    advantages: Tensor | None,
    *,
    visual_mask: Tensor | None,
    response_mask: Tensor,
    group_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    prompt_mask: Tensor | None,
) -> Batch:
    """Check the arguments of :func:`vgpo_kernels.check_batch` and return them as a :class:`Batch`."""
    mask, boundaries = checks.response_layout(response_mask, cu_seqlens)
    states = None
    if hidden is not None:
        states, _ = checks.hidden_states(hidden, boundaries)
        checks.response_rows(mask, states)
    whole = _whole(mask, states, visual_mask, prompt_mask, ids)
    shape = mask.shape if whole is None else whole
    size, device = checks.batch_size(mask, boundaries), mask.device
    length = shape.numel()
    sequence, begin = responses_of(length, size, boundaries, device)
    # Of a packed batch all; of a padded one the last of each row.
    response = torch.arange(length, device=device).view(shape)[..., shape[-1] - mask.shape[-1] :].reshape(-1)

    def everywhere(values: Tensor, other: float) -> Tensor:
        return values.new_full((length,), other).index_copy(0, response, values.reshape(-1))

    def per_token(name: str, value: Tensor | None) -> Tensor | None:
        return None if value is None else everywhere(checks.per_token(name, value, mask), torch.nan)

    def whole_mask(name: str, value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        meaning = "one entry per position of the whole sequences"
        return checks.mask(name, value, shape, meaning, device, "ids" if states is None else "hidden").reshape(-1)

    tokens, has_prompts = None, False
    if ids is not None:
        given = checks.integers("ids", ids).to(torch.int64)
        checks.require_device("ids", given, device, "response_mask")
        if states is not None and given.dim() == 2 and tuple(given.shape) == (shape[0], shape[-1] + 1) != mask.shape:
            raise ValueError(
                f"hidden must have a row for each of the {given.shape[1]} positions of ids, got "
                f"{checks.describe(states)}; it stays whole, also where logits are cut to [:, :-1]"
            )
        if given.shape not in (shape, mask.shape):
            raise ValueError(
                f"ids must have shape {list(shape)} (the tokens of the whole sequences) or {list(mask.shape)} "
                f"(those of the responses, response_mask's), got {checks.describe(given)}"
            )
        has_prompts = given.shape == whole
        tokens = given.reshape(-1) if given.shape == shape else everywhere(given, -1)
    if advantages is not None:
        advantages = checks.per_response_or_token("advantages", advantages, mask, size)
        if advantages.shape != (size,):
            advantages = everywhere(advantages, torch.nan)
    if group_ids is not None:
        group_ids = checks.per_response_integers("group_ids", group_ids, size, device, "response_mask")
    return Batch(
        sequence=sequence,
        begin=begin,
        response=response,
        scored=everywhere(mask, False),
        prompt_mask=whole_mask("prompt_mask", prompt_mask),
        visual=whole_mask("visual_mask", visual_mask),
        hidden=None if states is None else states.reshape(length, states.shape[-1]),
        ids=tokens,
        has_prompts=has_prompts,
        is_whole=whole is not None,
        logp=per_token("logp", logp),
        old_logp=per_token("old_logp", old_logp),
        advantages=advantages,
        groups=group_ids,
    )


def _whole(
    mask: Tensor, hidden: Tensor | None, visual_mask: object, prompt_mask: object, ids: object
) -> torch.Size | None:
    """Return the shape of whole sequences, ``[B, S]`` or ``[N]``, of the first argument that has it, or ``None``."""
    if hidden is not None:
        return hidden.shape[:-1]
    for name, value in (("visual_mask", visual_mask), ("prompt_mask", prompt_mask), ("ids", ids)):
        if value is not None:
            given = checks.require_tensor(name, value)
            if mask.dim() == 2:
                checks.last_positions(mask, given, name)
            if name != "ids" or mask.dim() == 1 or given.shape != mask.shape:
                return given.shape
    return None
