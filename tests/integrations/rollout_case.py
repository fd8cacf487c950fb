"""A rollout batch as agents leave it, and its factors by the paper's equations, for the adapters' tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from equations import Position, factors, focus
from torch import Tensor

from vgpo_kernels import VGPOConfig

IMAGE = 7


class Rollout(NamedTuple):
    """One response: its prompt's name and ids, its own ids, which of them the policy sampled, whether it is scored."""

    uid: str
    prompt: list[int]
    response: list[int]
    sampled: list[int]
    scored: bool = True

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.response

    @property
    def response_mask(self) -> list[int]:
        """As frameworks have it: 0 at a tool's tokens, and everywhere in a response that was cut off and filtered."""
        return self.sampled if self.scored else [0] * len(self.sampled)


def tiny_model(layers: int = 2) -> Any:
    """A language model of transformers in which an image token, that its configuration names, is a word like others."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
    )
    config.image_token_id = IMAGE
    return transformers.Qwen2ForCausalLM(config).eval()


def rollouts() -> list[Rollout]:
    """Nine responses to four prompts, in no order."""
    seen, blind = [9, 12, IMAGE, IMAGE, 21, 10], [14, 11, 19]
    tool = [30, IMAGE, IMAGE, IMAGE, 31]
    return [
        Rollout("seen", seen, [8, 25, 13, 17, 22, 28], [1] * 6),
        Rollout("blind", blind, [16, 27, 12, 18, 29, *tool, 24, 15, 26], [1] * 5 + [0] * 5 + [1] * 3),
        Rollout("seen", seen, [20, IMAGE, IMAGE, 14, 26, 9, 31, 11], [1] * 8),  # it sampled placeholders
        Rollout("blind", blind, [23, 10, 19, 30], [1] * 4),  # sees no image
        Rollout("seen", seen, [13, 24, IMAGE, 22, 17, 28, 8, 12, 29], [1] * 9, scored=False),
        Rollout("blind", blind, [25, *tool, 9, 28, *tool, 17, 13, 21], [1] + [0] * 5 + [1] * 2 + [0] * 5 + [1] * 3),
        Rollout("both", seen, [11, 16, *tool, 20, 27, 15], [1] * 2 + [0] * 5 + [1] * 3),
        Rollout("seen", seen, [18, 10, 23, 29, 12], [1] * 5),
        Rollout("alone", [8, IMAGE, 30], [31, 19, 14, 24], [1] * 4),
    ]


def cosines_of(batch: list[Rollout], hidden: list[Tensor]) -> list[list[float]]:
    """Cosine of each scored token by the paper's equations, from the last hidden states ``[S, D]`` of sequences."""
    cosines = []
    for rollout, states in zip(batch, hidden, strict=True):
        mask = [0] * len(rollout.prompt) + rollout.response_mask
        visual = [token == IMAGE and not scored for token, scored in zip(rollout.ids, mask, strict=True)]
        read = zip(states.double().tolist(), visual, map(bool, mask), strict=True)
        cosines.append(focus([Position(*position) for position in read], causal=True))
    return cosines


def expected_factors(batch: list[Rollout], hidden: list[Tensor], config: VGPOConfig) -> list[list[float]]:
    """Factor of each response token by the paper's equations, from the last hidden states ``[S, D]`` of sequences."""
    cosines = cosines_of(batch, hidden)
    rows = []
    for rollout, weights in zip(batch, factors(cosines, [one.uid for one in batch], config), strict=True):
        of_tokens = iter(weights.factors)
        rows.append([next(of_tokens) if scored else 1.0 for scored in rollout.response_mask])
    return rows


def last_hidden_states(model: object, batch: list[Rollout]) -> list[Tensor]:
    """Last hidden states ``[S, D]`` of each sequence by itself."""
    with torch.no_grad():
        return [model.model(torch.tensor([rollout.ids])).last_hidden_state[0] for rollout in batch]  # type: ignore[attr-defined]


# Of the batch: the responses that are weighted, the prompts they belong to, those of them with one such response.
METRICS = {
    "vgpo/weighted_responses": 7,
    "vgpo/nonfinite_responses": 0,
    "vgpo/groups": 4,
    "vgpo/singleton_groups": 2,
}
