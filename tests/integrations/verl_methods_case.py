"""Responses about images in verl, a tiny Qwen3-VL, and the factors of each method by transformers and plain sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from architectures.families_qwen import IMAGE, VISION_END, VISION_START
from architectures.zoo import example, pixels
from torch import Tensor

from vgpo_kernels import ShapingConfig, shape_tokens
from vgpo_kernels.integrations.transformers import blind_attention, spoilt_view
from vgpo_kernels.integrations.verl import second_views

SHOWN = [VISION_START, *[IMAGE] * 4, VISION_END]
STEP, STEPS, TEMPERATURE = 3, 8, 0.7


class Row(NamedTuple):
    """A response: its prompt's name, ids of prompt and response, which of these were sampled, what it shows."""

    uid: str
    prompt: list[int]
    response: list[int]
    sampled: list[int]
    images: dict[str, Tensor]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.response

    @property
    def tokens(self) -> Tensor:
        return torch.tensor(self.ids)

    @property
    def response_mask(self) -> list[int]:
        return self.sampled

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the processor makes for transformers, ``[1, S]``."""
        kinds = {"mm_token_type_ids": (self.tokens == IMAGE).int()[None]} if self.images else {}
        return {"input_ids": self.tokens[None], **kinds, **self.images}

    @property
    def multi_modal_inputs(self) -> dict[str, Tensor]:
        """What verl's agent loop keeps of it: with the number of patches, by which verl counts operations."""
        return {**self.images, "images_seqlens": self.images["image_grid_thw"].prod(-1)} if self.images else {}


def shown(count: int) -> dict[str, Tensor]:
    return {"pixel_values": pixels(count * 16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}


def rows_of_agents() -> list[Row]:
    """Two responses to a prompt with an image, two to one of text, of which a tool shows one an image."""
    torch.manual_seed(1)
    seen, blind = [5, 6, *SHOWN, 7], [8, 9, 14]
    first = shown(1)
    return [
        Row("seen", seen, [10, 11, 12, 13, 24], [1] * 5, first),
        Row("blind", blind, [15, 16, *SHOWN, 17, 18, 19], [1, 1, *[0] * 6, 1, 1, 1], shown(1)),
        Row("seen", seen, [20, 21, 22], [1] * 3, first),
        Row("blind", blind, [23, 25, 26, 27], [1] * 4, {}),
    ]


def qwen3_vl() -> Any:
    built = example("qwen3_vl").model
    built.set_attn_implementation("sdpa")
    with torch.no_grad():  # so that views differ by more than rounding
        built.lm_head.weight.mul_(3)
    return built


def positions(model: Any, row: Row) -> Tensor:
    """Positions ``[4, S]`` as verl has them: of text, then of time, height and width."""
    text = torch.arange(len(row.tokens))[None]
    if not row.images:
        return text.expand(4, -1)
    found, _ = model.model.get_rope_index(
        row.tokens[None], mm_token_type_ids=row.inputs["mm_token_type_ids"], image_grid_thw=row.images["image_grid_thw"]
    )
    return torch.cat([text, found[:, 0]])


def predicted(model: Any, row: Row, inputs: dict[str, Any] | None = None, **options: Any) -> Tensor:
    """Log-probabilities of what comes at each place of a response, ``[T, V]``, by transformers alone."""
    with torch.no_grad():
        logits = model(**(inputs or row.inputs), **options).logits[0]
    return (logits[-len(row.response) - 1 : -1].double() / TEMPERATURE).log_softmax(-1)


def similarity(model: Any, row: Row) -> Tensor:
    """Mean over layers and images' tokens before of cosines, pair by pair, ``[T]``."""
    with torch.no_grad():
        layers = model(**row.inputs, output_hidden_states=True).hidden_states
    first, found = len(row.prompt), []
    for place in range(first, len(row.tokens)):
        before = [index for index in range(place) if row.tokens[index] == IMAGE]
        cosines = [
            torch.nn.functional.cosine_similarity(states[0, place].double(), states[0, image].double(), dim=0)
            for states in layers
            for image in before
        ]
        found.append(torch.stack(cosines).mean() if cosines else torch.tensor(torch.nan).double())
    return torch.stack(found)


def other_view(model: Any, row: Row, name: str) -> Tensor:
    """Log-probabilities ``[T, V]`` as the method's second view has them."""
    if name == "pgpo":
        with blind_attention(model, (row.tokens == IMAGE)[None]):
            return predicted(model, row)
    if name == "tor":
        kept = row.tokens != IMAGE
        with torch.no_grad():
            logits = model(input_ids=row.tokens[kept][None]).logits[0].double() / TEMPERATURE
        whole = torch.zeros(len(row.tokens), logits.shape[-1], dtype=torch.float64)
        whole[kept.nonzero()[1:, 0]] = logits[:-1].log_softmax(-1)  # beside the token that is predicted
        return whole[len(row.prompt) :]
    drawn_by = row.tokens if name == "vppo" else torch.tensor(row.prompt)
    kind, strength = ("mask", 0.5) if name == "vppo" else ("noise", 0.8)
    seed = second_views.seed_of(STEP, drawn_by)
    spoilt = spoilt_view(row.inputs, kind, model, strength=strength, seed=seed)
    assert not torch.equal(spoilt["pixel_values"], row.images["pixel_values"])
    return predicted(model, row, spoilt)


def expected_signals(model: Any, row: Row, name: str) -> dict[str, Tensor]:
    """What a method reads of each response token, ``[T]``."""
    clean, tokens = predicted(model, row), torch.tensor(row.response)[:, None]
    other = other_view(model, row, name) if row.images and name != "pepo" else clean
    logp, changed = (view.gather(1, tokens)[:, 0] for view in (clean, other))
    entropy, other_entropy = (-(view.exp() * view).sum(-1) for view in (clean, other))
    ratio = changed - logp
    middle = torch.logaddexp(clean, other) - np.log(2)
    js = sum(0.5 * (view.exp() * (view - middle)).sum(-1) for view in (clean, other))
    visual = {
        "pepo": lambda: similarity(model, row),
        "vppo": lambda: (ratio.exp() - ratio - 1).clamp(0, 10),
        "pgpo": lambda: (ratio.exp() - ratio - 1).clamp(0, 10),
        "tor": lambda: ratio.abs(),
        "vepo": lambda: js,
    }[name]()
    seen = [bool((row.tokens[:place] == IMAGE).any()) for place in range(len(row.prompt), len(row.tokens))]
    visual = visual.masked_fill(~torch.tensor(seen), torch.nan)
    return {"visual": visual, "entropy": entropy, "gap": (other_entropy - entropy).abs()}


def expected_factors(model: Any, rows: list[Row], name: str) -> tuple[list[Tensor], float]:
    """Factors ``[T]`` of each response's tokens in step STEP, and the share of scored tokens that are selected."""
    found = [expected_signals(model, row, name) for row in rows]
    config = ShapingConfig.preset(name)
    lengths = torch.tensor([len(row.response) for row in rows])
    packed = {key: torch.cat([one[key] for one in found]).float() for key in config.needs()}
    mask = torch.cat([torch.tensor(row.sampled) for row in rows]).bool()
    groups = torch.tensor([["seen", "blind"].index(row.uid) for row in rows])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    shaping = shape_tokens(packed, mask, groups, config, cu_seqlens=cu_seqlens, progress=(STEP - 1) / STEPS)
    factors, share = shaping.factors, float(shaping.selected.sum() / mask.sum())
    if name == "vepo":  # the mean over selected tokens, of a loss that is a mean over all
        factors = factors / share
    return list(factors.split(lengths.tolist())), share
