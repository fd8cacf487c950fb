"""shape_tokens and response_factors on every backend, against the reference implementation and published loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import published
import pytest
import torch
from cases import EDGES, Batch, make_batch
from tolerance import assert_close, same_bits
from torch import Tensor

from vgpo_kernels import (
    ShapingConfig,
    TokenShaping,
    VGPOConfig,
    backend,
    policy_loss,
    response_factors,
    shape_tokens,
    visual_weights,
)
from vgpo_kernels.reference import token_shaping as reference
from vgpo_kernels.shaping import METHODS

FLOOR = 4e-6  # exponentials and quotients of fp32
FIELDS = ("factors", "weights", "selected", "response_factor", "score")
CONFIGS: dict[str, ShapingConfig] = {
    **{name: ShapingConfig.preset(name) for name in METHODS if name != "vgpo"},  # type: ignore[dict-item]
    "group scope": ShapingConfig(top_visual=0.25, top_entropy=0.1, scope="group", other_weight=0.2),
    "entropy alone": ShapingConfig(top_entropy=0.2, scope="batch", other_weight=0.5),
    "gate without mass": ShapingConfig(weight="gate", threshold=0.7, boost=0.5, floor=0.1, conserve=False),
    "softmax without entropy": ShapingConfig(weight="softmax", temperature=0.3, top_visual=0.6),
    "min-max of the group": ShapingConfig(response="min_max", response_scope="group", response_floor=0.5),
    "median of the group": ShapingConfig(response="median_mad", response_scope="group", response_scale=0.4),
    "softmax of the batch": ShapingConfig(response="softmax", response_temperature=2.0, schedule="linear"),
}
EVERY_EDGE = tuple(one for responses in EDGES.values() for one in responses)


def draw(batch: Batch, *, levels: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Signals of the batch's valid tokens, by response and ordinal, NaN off the mask; with ties, of so many levels."""
    mask = batch.response_mask.cpu()
    found = {name: torch.full(mask.shape, math.nan) for name in ("visual", "entropy", "gap")}
    for index in range(len(batch.group_ids)):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        begin, end = (0, None) if batch.cu_seqlens is None else batch.cu_seqlens[index : index + 2].tolist()
        for signal in found.values():
            row = signal[index] if batch.cu_seqlens is None else signal[begin:end]
            valid = mask[index] if batch.cu_seqlens is None else mask[begin:end]
            values = torch.rand(int(valid.sum()), generator=generator) ** 2
            row[valid] = (values * levels).floor() / levels if levels else values
    return {name: signal.to(batch.response_mask.device) for name, signal in found.items()}


def shape(
    batch: Batch, signals: Mapping[str, Tensor], config: ShapingConfig | VGPOConfig, progress: float = 0.7
) -> TokenShaping:
    return shape_tokens(
        signals, batch.response_mask, batch.group_ids, config, cu_seqlens=batch.cu_seqlens, progress=progress
    )


def check(batch: Batch, signals: Mapping[str, Tensor], config: ShapingConfig) -> TokenShaping:
    """Compare with the reference implementation in fp64, and the two phases with the one."""
    found = shape(batch, signals, config)
    needed = {name: signals[name].double() if name in config.needs() else None for name in ("visual", "entropy", "gap")}
    exact = reference.token_shaping(
        **needed,
        response_mask=batch.response_mask,
        group_ids=batch.group_ids,
        cu_seqlens=batch.cu_seqlens,
        progress=0.7,
        config=config.as_floats(),
    )
    assert torch.equal(found.selected, exact[2]), "selected"
    for name, one, other in zip(FIELDS, found, exact, strict=False):
        if name != "selected":
            assert_close(one, other, name=name, floor=FLOOR)
    assert_close(torch.stack(list(found.metrics.values())), exact[-1], name="metrics", floor=FLOOR)
    factors = response_factors(found.score, batch.group_ids, config, progress=0.7)
    assert_close(factors, found.response_factor.double(), name="response_factor in two phases", floor=FLOOR)
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_settings_match_the_definition(backend_name: str, device: torch.device, name: str, packed: bool) -> None:
    edge = EDGES["shuffled groups"] + EDGES["holes"] + EDGES["empty response"] + EDGES["one token"]
    batch = make_batch(edge, features=1, packed=packed).to(device)
    check(batch, draw(batch), CONFIGS[name])


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", ["pepo", "cgpo", "va_opd"])
def test_edges_match_the_definition(backend_name: str, device: torch.device, name: str, edge: str) -> None:
    batch = make_batch(EDGES[edge], features=1).to(device)
    check(batch, draw(batch), CONFIGS[name])


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.top_visual or config.top_entropy])
def test_of_ties_exactly_the_first_are_selected(backend_name: str, device: torch.device, name: str) -> None:
    batch = make_batch(EDGES["shuffled groups"] + EDGES["holes"], features=1).to(device)
    if name != "vepo":  # whose score rounds, so that backends may tie differently
        check(batch, draw(batch, levels=3), CONFIGS[name])
    signals = {one: torch.zeros_like(signal) for one, signal in draw(batch).items()}
    found = check(batch, signals, CONFIGS[name])
    if CONFIGS[name].scope == "response":
        fraction = CONFIGS[name].top_visual
        for chosen, mask in zip(found.selected, batch.response_mask, strict=True):
            number = math.ceil(round(int(mask.sum()) * fraction, 6))
            assert chosen[mask].tolist() == [place < number for place in range(int(mask.sum()))]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_has_no_signal_is_left_as_it_is(backend_name: str, device: torch.device, name: str) -> None:
    """Text, filtered responses, broken signals, and tokens before the first image."""
    config = CONFIGS[name]
    batch = make_batch(EDGES["shuffled groups"] + EDGES["holes"] + EDGES["empty response"], features=1).to(device)
    signals, mask = draw(batch), batch.response_mask.clone()
    batch = replace(batch, response_mask=mask)
    mask[1] = False  # filtered
    ordinal = mask.cumsum(1)
    signals["visual"][2] = math.nan  # without an image
    signals["visual"][0][ordinal[0] <= 5] = signals["visual"][7][ordinal[7] <= 15] = math.nan  # an image comes later
    signals["visual"][3][ordinal[3] == 4] = math.nan
    signals["visual"][4][ordinal[4] == 2] = math.inf
    for one in ("entropy", "gap"):
        signals[one][5][ordinal[5] == 1] = -math.inf
        signals[one][7][ordinal[7] == 3] = math.nan  # before its image
    found = check(batch, signals, config)
    broken = [3, 4, *[5] * (len(config.needs()) > 1)]
    for index in [1, 2, *broken]:
        assert (found.factors[index] == 1).all() and (found.weights[index] == 1).all()
        assert torch.equal(found.selected[index], mask[index])
        assert found.response_factor[index] == 1 and found.score[index].isnan()
    assert found.metrics["nonfinite_responses"] == len(broken)
    unseen = mask[0] & (ordinal[0] <= 5)
    assert (found.weights[0][unseen] == 1).all() and found.selected[0][unseen].all()


@pytest.mark.parametrize("levels", [0, 4], ids=["distinct", "tied"])
@pytest.mark.parametrize("name", published.METHODS)
def test_presets_are_the_published_methods(backend_name: str, device: torch.device, name: str, levels: int) -> None:
    edge = EDGES["shuffled groups"] + EDGES["holes"] + EDGES["one token"] + EDGES["plain"] + EDGES["single"]
    batch = make_batch(edge, features=1).to(device)
    signals = draw(batch, levels=0 if name == "vepo" else levels, seed=levels)
    rows = [
        published.Response(
            *(signals[one][index][batch.response_mask[index]].double().tolist() for one in signals), group=group
        )
        for index, group in enumerate(batch.group_ids.tolist())
    ]
    for progress in (0.0, 0.3, 1.0):
        found = shape(batch, signals, ShapingConfig.preset(name), progress)
        for index, expected in enumerate(published.METHODS[name](rows, progress)):
            mask = batch.response_mask[index]
            assert found.selected[index][mask].tolist() == expected.selected
            assert_close(found.factors[index][mask], torch.tensor(expected.factors, dtype=torch.float64), floor=FLOOR)


@pytest.mark.parametrize("name", CONFIGS)
def test_layout_does_not_change_a_bit(exact_backend: str, device: torch.device, name: str) -> None:
    edge = EDGES["plain"] + EDGES["long"] + EDGES["holes"]
    padded = make_batch(edge, features=1).to(device)
    expected = shape(padded, draw(padded), CONFIGS[name])
    for other in (make_batch(edge, features=1, extra_padding=21), make_batch(edge, features=1, packed=True)):
        other = other.to(device)
        found = shape(other, draw(other), CONFIGS[name])
        for field in ("factors", "weights", "selected"):
            one, two = getattr(found, field)[other.response_mask], getattr(expected, field)[padded.response_mask]
            assert torch.equal(one, two), field
        assert same_bits(found.response_factor, expected.response_factor)
        assert same_bits(found.score, expected.score)
    config, signals = CONFIGS[name], draw(padded)
    order = torch.randperm(len(edge), generator=torch.Generator().manual_seed(3)).to(device)
    moved = {one: signal[order] for one, signal in signals.items()}
    permuted = shape_tokens(moved, padded.response_mask[order], padded.group_ids[order], config, progress=0.7)
    assert torch.equal(permuted.factors, expected.factors[order])
    apart = config.scope == "batch" and (config.top_visual or config.top_entropy)
    apart = apart or (config.response != "none" and config.response_scope == "batch")
    for group in [] if apart else padded.group_ids.unique().tolist():
        members = padded.group_ids == group
        alone = shape_tokens(
            {one: signal[members] for one, signal in signals.items()},
            padded.response_mask[members],
            padded.group_ids[members],
            config,
            progress=0.7,
        )
        assert torch.equal(alone.factors, expected.factors[members])


def test_of_vgpo_it_is_visual_weights(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["shuffled groups"] + EDGES["no image"], features=1).to(device)
    cos = draw(batch)["visual"].masked_fill(~batch.has_visual[:, None], math.nan)
    for config in (ShapingConfig.vgpo(), VGPOConfig.released()):
        found = shape(batch, {"visual": cos}, config)
        expected = visual_weights(cos, batch.response_mask, batch.group_ids, config)
        assert torch.equal(found.factors, expected.factors) and same_bits(found.score, expected.score)
        product = (found.weights * found.response_factor[:, None])[batch.response_mask]
        assert_close(product, expected.factors[batch.response_mask].double())
        phased = response_factors(found.score, batch.group_ids, replace(config, score_offset=None))
        assert_close(torch.where(found.score.isfinite(), phased, 1.0), found.response_factor.double())


def test_magnitudes_of_any_size_are_added_exactly(backend_name: str, device: torch.device) -> None:
    """Signals of a response may be tiny or huge: their mean is rounded once."""
    batch = make_batch(EDGES["plain"], features=1).to(device)
    scale = torch.tensor([1e-30, 1e30, 1e-3, 1.0], device=device)[:, None]
    signals = {"visual": draw(batch)["visual"] * scale}
    score = shape(batch, signals, ShapingConfig(response="softmax")).score
    exact = torch.stack(
        [row[mask].double().mean() for row, mask in zip(signals["visual"], batch.response_mask, strict=True)]
    )
    assert ((score.double() - exact).abs() <= 1e-7 * exact).all()


def test_images_may_be_told_apart_by_has_visual(backend_name: str, device: torch.device) -> None:
    for packed in (False, True):
        batch = make_batch(EDGES["no image"], features=1, packed=packed).to(device)
        signal = draw(batch)["visual"]
        found = shape_tokens(
            signal,
            batch.response_mask,
            batch.group_ids,
            ShapingConfig.vppo(),
            cu_seqlens=batch.cu_seqlens,
            has_visual=batch.has_visual,
        )
        assert torch.equal(found.score.isfinite(), batch.has_visual)


def test_the_loss_takes_what_it_returns(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["plain"], features=1).to(device)
    shaping = shape(batch, draw(batch), ShapingConfig.vppo())
    logp = batch.logp.requires_grad_()
    loss = policy_loss(logp, None, batch.advantages, batch.response_mask, factors=shaping.factors).loss
    (gradient,) = torch.autograd.grad(loss, logp)
    assert torch.equal(gradient != 0, shaping.selected)


def test_settings_that_do_not_go_together_are_refused() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"weight": "share"}, "set that one alone"),
        ({"weight": "share", "top_visual": 0.2, "scope": "batch"}, "within a response"),
        ({"response_on": "visual"}, "needs top_visual"),
        ({"fusion": "soft_or"}, "which is None"),
        ({"top_visual": 0.0}, "in .0, 1."),
        ({"threshold": 1.0}, "in .0, 1."),
        ({"scope": "micro_batch"}, "one of response, group, batch"),
    ]
    for settings, said in refused:
        with pytest.raises(ValueError, match=said):
            ShapingConfig(**settings)
    with pytest.raises(ValueError, match=r"one of vgpo, pepo, .* got 'vpo'; did you mean"):
        ShapingConfig.preset("vpo")
    with pytest.raises(ValueError, match=r"got 'papo'; PAPO weighs nothing: its term is policy_loss"):
        ShapingConfig.preset("papo")
    with pytest.raises(TypeError, match="has no 'top_ratio'"):
        ShapingConfig.vppo(top_ratio=0.1)
    theirs = {
        "top_p_perception_tokens": "top_visual",
        "gate_temperature": "temperature",
        "jsd_mask_alpha": "fusion_weight",
    }
    for name, ours in theirs.items():
        with pytest.raises(TypeError, match=f"did you mean {ours}"):
            ShapingConfig.vppo(**{name: 0.1})


def test_signals_and_progress_are_asked_for_by_name() -> None:
    mask, groups = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    signal = torch.rand(2, 3)
    with backend("reference"):
        with pytest.raises(ValueError, match="'visual' and 'entropy', which this config reads; 'entropy' is missing"):
            shape_tokens(signal, mask, groups, ShapingConfig.tor())
        with pytest.raises(ValueError, match="visual, entropy, gap, got 'entropies'"):
            shape_tokens({"visual": signal, "entropies": signal}, mask, groups, ShapingConfig.tor())
        with pytest.raises(ValueError, match=r"signals\['entropy'\] must have shape"):
            shape_tokens({"visual": signal, "entropy": signal[:1]}, mask, groups, ShapingConfig.tor())
        with pytest.raises(ValueError, match="pass progress, such as step / steps"):
            shape_tokens({"visual": signal, "entropy": signal}, mask, groups, ShapingConfig.pepo())
        with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got 1.5"):
            shape_tokens({"visual": signal, "entropy": signal}, mask, groups, ShapingConfig.pepo(), progress=1.5)


def test_slips_are_answered_by_what_exists() -> None:
    mask, groups = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    signal = torch.rand(2, 3)
    with backend("reference"):
        shaping = shape_tokens(signal, mask, groups, ShapingConfig.vppo())
        slips: list[tuple[Callable[[], Any], str]] = [
            (lambda: shape_tokens(signal, mask, groups), r"a method's are ShapingConfig.preset\('vppo'\)"),  # type: ignore[call-arg]
            (lambda: shape_tokens(signal, mask, groups, None), r"ShapingConfig.preset\('vppo'\)"),  # type: ignore[arg-type]
            (lambda: shape_tokens(signal, mask, groups, "vpo"), r"use ShapingConfig.preset\(config\)"),  # type: ignore[arg-type]
            (
                lambda: shape_tokens(signal, mask, groups, ShapingConfig(), top_visual=0.3),  # type: ignore[call-arg]
                r"its config, ShapingConfig\(top_visual=...\)",
            ),
            (
                lambda: shape_tokens([signal, signal], mask, groups, ShapingConfig.tor()),  # type: ignore[arg-type]
                r"got list; name them: {'visual': ..., 'entropy': ...}",
            ),
            (
                lambda: visual_weights(signal, mask, groups, ShapingConfig.vppo()),  # type: ignore[arg-type]
                "shape_tokens takes a ShapingConfig",
            ),
            (
                lambda: policy_loss(signal, None, signal[:, 0], mask, selected=shaping),  # type: ignore[arg-type]
                "use selected.selected",
            ),
            (
                lambda: policy_loss(signal, None, signal[:, 0], mask, token_weights=shaping),  # type: ignore[arg-type]
                "use token_weights.weights",
            ),
        ]
        for slip, answer in slips:
            with pytest.raises(TypeError, match=answer):
                slip()


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_switched_by_their_name_alone(method: str) -> None:
    config = ShapingConfig.preset(method)
    mask, groups = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    signals = {name: torch.rand(2, 3) for name in config.needs()}
    with backend("reference"):
        shaping = shape_tokens(signals, mask, groups, config, progress=0.5)
        assert shaping.factors.shape == mask.shape
        assert response_factors(shaping.score, groups, config, progress=0.5).shape == groups.shape
        for progress in (1.5, "half"):
            with pytest.raises((TypeError, ValueError), match="progress must be"):
                shape_tokens(signals, mask, groups, config, progress=progress)  # type: ignore[arg-type]
            with pytest.raises((TypeError, ValueError), match="progress must be"):
                response_factors(shaping.score, groups, config, progress=progress)  # type: ignore[arg-type]
