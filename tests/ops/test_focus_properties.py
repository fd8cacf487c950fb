"""Properties of focus and factors that hold for every batch, drawn by hypothesis."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from cases import Batch, Response, default_dtype, make_batch
from drawn import CASES, EXACT, FEW, MANY, ON_THE_CPU, POISONS, configs, responses, same, seeds, visibilities
from equations import factors as factors_by_equations
from equations import focus as focus_by_equations
from equations import positions
from hypothesis import given
from hypothesis import strategies as st
from test_focus_limits import BROKEN, NORMS, SIGNALS
from test_visibility import cosines as focus
from test_visual_weights import draw_cosines, weigh
from tolerance import assert_close, same_bits

from vgpo_kernels import VGPOConfig, group_weights, vgpo_loss, visual_focus, visual_prototype, visual_weights
from vgpo_kernels.config import CHOICES

pytestmark = ON_THE_CPU


def sighted(batch: Batch, seed: int) -> torch.Tensor:
    """Draw cosines, of which some responses have none for their first tokens: their image comes later."""
    cos, mask = draw_cosines(batch, seed), batch.response_mask
    first = torch.randint(-6, 9, (len(mask), 1), generator=torch.Generator().manual_seed(seed))
    return torch.where(mask & (mask.cumsum(1) <= first), float("nan"), cos)


@CASES
@given(responses, seeds, st.integers(0, 9), st.integers(1, 70), visibilities)
def test_layout_does_not_matter(
    drawn: tuple[Response, ...], seed: int, padding: int, features: int, visibility: str
) -> None:
    """Padded, padded further and packed: the same cosines and the same factors, to the bit.

    The batches are poisoned off their masks, so this is also the proof that nothing there is read.
    """
    plain = make_batch(drawn, seed=seed, features=features)
    expected_cos = focus(plain, visibility)
    expected = weigh(plain, expected_cos, VGPOConfig.paper())
    for other in (
        make_batch(drawn, seed=seed, features=features, extra_padding=padding),
        make_batch(drawn, seed=seed, features=features, packed=True),
    ):
        cos = focus(other, visibility)
        same(cos[other.response_mask], expected_cos[plain.response_mask], "cos")
        weights = weigh(other, cos, VGPOConfig.paper())
        same(weights.factors[other.response_mask], expected.factors[plain.response_mask], "factors")
        same(weights.phi, expected.phi, "phi")


@CASES
@given(responses, seeds, configs, st.randoms())
def test_order_does_not_matter(drawn: tuple[Response, ...], seed: int, config: VGPOConfig, random: object) -> None:
    batch = make_batch(drawn, seed=seed, features=1)
    cos = sighted(batch, seed)
    expected = weigh(batch, cos, config)
    order = list(range(len(drawn)))
    random.shuffle(order)  # type: ignore[attr-defined]
    index = torch.tensor(order, dtype=torch.int64)
    actual = visual_weights(
        cos[index], batch.response_mask[index], batch.group_ids[index], config, has_visual=batch.has_visual[index]
    )
    same(actual.factors, expected.factors[index], "factors")
    same(actual.score, expected.score[index], "score")
    same(actual.phi, expected.phi[index], "phi")


@CASES
@given(responses, seeds, configs)
def test_groups_can_be_weighed_apart(drawn: tuple[Response, ...], seed: int, config: VGPOConfig) -> None:
    batch = make_batch(drawn, seed=seed, features=1)
    cos = sighted(batch, seed)
    expected = weigh(batch, cos, config)
    for group in batch.group_ids.unique():
        part = batch.group_ids == group
        alone = visual_weights(
            cos[part], batch.response_mask[part], batch.group_ids[part], config, has_visual=batch.has_visual[part]
        )
        same(alone.factors, expected.factors[part], "factors")
    # And in two phases, over responses that were each weighed alone.
    scores = torch.cat(
        [
            visual_weights(
                cos[row : row + 1],
                batch.response_mask[row : row + 1],
                batch.group_ids[row : row + 1],
                config,
                has_visual=batch.has_visual[row : row + 1],
            ).score
            for row in range(len(drawn))
        ]
        or [torch.zeros(0)]
    )
    phi = group_weights(scores, batch.group_ids, config)
    if EXACT:
        assert torch.equal(phi, expected.phi)
    else:
        assert_close(phi, expected.phi.double(), name="phi", floor=1e-4)


@CASES
@given(responses, seeds, configs)
def test_weights_are_centred(drawn: tuple[Response, ...], seed: int, config: VGPOConfig) -> None:
    batch = make_batch(drawn, seed=seed, features=1)
    weights = weigh(batch, sighted(batch, seed), config)
    lengths = batch.response_mask.sum(-1).clamp(min=1)
    assert (weights.psi.double().sum(-1) / lengths).abs().max() <= 1e-6 if len(drawn) else True
    members = weights.score.isfinite()
    for group in batch.group_ids[members].unique():
        assert weights.phi[members & (batch.group_ids == group)].double().mean().abs() <= 1e-6
    assert (weights.psi.abs() <= 1 + 1e-6).all()
    assert (weights.phi.abs() <= 1 + 1e-6).all()


@CASES
@given(responses, seeds, st.floats(0.05, 1.0), st.floats(1.0, 1.9), st.floats(0.05, 1.0), st.floats(1.0, 1.9))
def test_factors_stay_within_their_clamps(
    drawn: tuple[Response, ...], seed: int, low: float, high: float, group_low: float, group_high: float
) -> None:
    batch = make_batch(drawn, seed=seed, features=1)
    config = VGPOConfig.released(intra_clamp=(low, high), inter_clamp=(group_low, group_high))
    factors = weigh(batch, sighted(batch, seed), config).factors
    assert torch.isfinite(factors).all()
    assert (factors >= min(1.0, low * group_low) * (1 - 1e-6)).all()
    assert (factors <= max(1.0, high * group_high) * (1 + 1e-6)).all()
    assert (factors[~batch.response_mask] == 1).all()


@CASES
@given(responses, seeds, st.sampled_from([2.0**-6, 0.37, 3.0, 2.0**9]))
def test_scale_does_not_matter(drawn: tuple[Response, ...], seed: int, scale: float) -> None:
    batch = make_batch(drawn, seed=seed, features=17)
    cos = focus(batch, "all")
    scaled = visual_focus(batch.hidden * scale, batch.visual_mask, batch.response_mask)
    assert_close(scaled, cos.double(), name="cos", floor=4e-6)


limits = st.builds(
    VGPOConfig,
    beta=st.sampled_from([0.0, 0.3, 2.0, 1e4]),
    tail_ratio=st.sampled_from([0.0, 0.5, 1.0]),
    top_ratio=st.sampled_from([0.01, 0.2, 1.0]),
    schedule=st.sampled_from(CHOICES["schedule"]),
    start_ratio=st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.75, 0.9999999]),
    step_ratio=st.sampled_from([0.0, 0.2, 0.5, 2 / 3, 1.0]),
    gate=st.booleans(),
    position=st.sampled_from(CHOICES["position"]),
    accumulation=st.sampled_from(CHOICES["accumulation"]),
)
cosine_lists = st.tuples(
    st.integers(0, 2),
    st.lists(st.sampled_from(SIGNALS), max_size=12),
    st.lists(st.sampled_from([*BROKEN, float("nan"), 0.5]), max_size=1),
    st.lists(st.sampled_from(SIGNALS), max_size=3),
).map(lambda parts: [float("nan")] * parts[0] + [value for part in parts[1:] for value in part])
int64 = torch.iinfo(torch.int64)


@MANY
@given(
    st.lists(st.tuples(cosine_lists, st.booleans(), st.sampled_from([int64.min, int64.max, -1, 0])), max_size=6),
    limits,
    st.sampled_from(["affine", None, -1024.0, 1024.0, 0.0]),
    st.sampled_from(POISONS),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_weights_at_their_limits_are_the_equations(
    drawn: list[tuple[list[float], bool, int]],
    config: VGPOConfig,
    offset: str | float | None,
    poison: float,
    stride: int,
    default: torch.dtype,
) -> None:
    """Of the largest and smallest cosines, and beside broken ones; whatever the strides and the default dtype."""
    if offset != "affine":
        config = replace(config, score="offset", score_offset=offset)
    width = max((len(row) for row, *_ in drawn), default=0)
    cos = torch.full((width, len(drawn) * stride), poison).T[::stride]
    mask = torch.zeros(width, len(drawn) * stride, dtype=torch.bool).T[::stride]
    for index, (row, *_) in enumerate(drawn):
        cos[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = True
    groups = [group for *_, group in drawn]
    images = torch.tensor([seen for _, seen, _ in drawn], dtype=torch.bool)
    ids = torch.tensor(groups, dtype=torch.int64)
    found = visual_weights(cos, mask, ids, config, has_visual=images)
    rows = [[value if seen else float("nan") for value in row] for row, seen, _ in drawn]
    wanted = factors_by_equations([torch.tensor(row).tolist() for row in rows], groups, config)
    for index, one in enumerate(wanted):
        assert_close(found.w[index][mask[index]], torch.tensor(one.w).double(), name="w", floor=4e-6)
        assert_close(found.psi[index][mask[index]], torch.tensor(one.psi).double(), name="psi", floor=1e-4)
        assert_close(found.score[index], torch.tensor(one.score).double(), name="score", floor=1e-5)
    weighted = found.score.isfinite()
    spoilt = [any(not (abs(value) <= 1024 or value != value) for value in row) for row in rows]
    spoilt = [bad or any(map(math.isnan, row[first_number(row) :])) for row, bad in zip(rows, spoilt, strict=True)]
    assert found.metrics["nonfinite_responses"] == sum(spoilt)
    assert found.metrics["weighted_responses"] == weighted.sum() == sum(not math.isnan(one.score) for one in wanted)
    assert found.metrics["focus_mean"].isnan() == found.metrics["gate_rate"].isnan() == ~weighted.any()
    assert (found.factors[~weighted] == 1).all() and found.factors.isfinite().all()
    with default_dtype(default):
        again = visual_weights(cos, mask, ids, config, has_visual=images)
    assert all(same_bits(*pair) for pair in zip(again[:5], found[:5], strict=True))


def first_number(row: list[float]) -> int:
    return next((index for index, value in enumerate(row) if not math.isnan(value)), len(row))


@CASES
@given(
    responses,
    seeds,
    st.lists(st.sampled_from(NORMS), min_size=1, max_size=9),
    st.lists(st.sampled_from(NORMS), min_size=1, max_size=9),
    visibilities,
    st.sampled_from(["rows", "columns", "transposed"]),
)
def test_norms_at_their_limits_are_the_equations(
    drawn: tuple[Response, ...], seed: int, images: list[float], tokens: list[float], visibility: str, layout: str
) -> None:
    """Images and tokens whose norms have no square in fp32, and others; whatever the strides of hidden states."""
    batch = make_batch(drawn, seed=seed, features=7)
    count, length, features = batch.hidden.shape
    sizes = torch.tensor(tokens * (length // len(tokens) + 1))[:length].expand(count, -1)
    of_image = torch.tensor(images * (count // len(images) + 1))[:count, None]
    hidden = batch.hidden * torch.where(batch.visual_mask, of_image, sizes)[..., None]
    if layout == "rows":
        room = torch.full((count, length, features + 3), torch.nan)
        hidden = room[..., 1 : features + 1].copy_(hidden)
    elif layout == "columns":
        hidden = torch.full((count, length, features, 2), torch.nan)[..., 0].copy_(hidden)
    else:
        hidden = torch.full((length, count, features), torch.nan).transpose(0, 1).copy_(hidden)
    batch = replace(batch, hidden=hidden)
    cos = focus(batch, visibility)
    for index, mask in enumerate(batch.response_mask):
        one = positions(hidden[index], batch.visual_mask[index], mask)
        wanted = torch.tensor(focus_by_equations(one, visibility == "causal")).double()
        assert_close(cos[index][mask], wanted, name="cos", floor=4e-6)


@MANY
@given(st.lists(st.tuples(st.floats(0, 100, width=32), st.integers(0, 5)), max_size=30), st.integers(1, 2**40))
def test_group_ids_are_labels(drawn: list[tuple[float, int]], stride: int) -> None:
    score = torch.tensor([value for value, _ in drawn], dtype=torch.float32)
    ids = torch.tensor([group for _, group in drawn], dtype=torch.int64)
    phi = group_weights(score, ids, VGPOConfig.paper())
    same(group_weights(score, 7 - stride * ids, VGPOConfig.paper()), phi, "phi")


@FEW
@given(responses.filter(bool), seeds, configs, st.sampled_from(POISONS), st.booleans(), visibilities)
def test_nothing_off_the_masks_is_read(
    drawn: tuple[Response, ...], seed: int, config: VGPOConfig, poison: float, packed: bool, visibility: str
) -> None:
    """Whatever stands off the masks, in any argument: the same loss, gradient, metrics and weights, to the bit."""
    batch = make_batch(drawn, seed=seed, features=9, packed=packed)
    floats = {
        name: value for name, value in vars(batch).items() if torch.is_tensor(value) and value.is_floating_point()
    }
    cos = draw_cosines(batch, seed)
    results = []
    for value in (0.0, poison):
        filled = {name: torch.where(tensor.isnan(), value, tensor) for name, tensor in floats.items()}
        part = replace(batch, **filled)
        logp = part.logp.clone().requires_grad_()
        loss, metrics = vgpo_loss(
            part.hidden,
            logp,
            part.old_logp,
            part.token_advantages,
            part.visual_mask,
            part.response_mask,
            part.group_ids,
            config,
            cu_seqlens=part.cu_seqlens,
            visibility=visibility,
            ref_logp=part.ref_logp,
            kl_coef=0.1,
            entropy=part.entropy,
            entropy_coef=0.1,
            max_length=40,
        )
        *weights, _ = weigh(part, torch.where(part.response_mask, cos, value), config)
        prototypes = visual_prototype(part.hidden, part.visual_mask, cu_seqlens=part.cu_seqlens)
        gradient = torch.autograd.grad(loss, logp)[0]
        results.append([loss.detach(), gradient, torch.stack([*metrics.values()]), *weights, prototypes])
    for number, (clean, poisoned) in enumerate(zip(*results, strict=True)):
        assert same_bits(clean, poisoned), number


@CASES
@given(responses, seeds, visibilities, st.integers(1, 40))
def test_factors_are_the_equations(drawn: tuple[Response, ...], seed: int, visibility: str, features: int) -> None:
    """From hidden states to factors, against loops in double precision."""
    batch = make_batch(drawn, seed=seed, features=features)
    cos = focus(batch, visibility)
    responses_of_batch = zip(batch.hidden, batch.visual_mask, batch.response_mask, strict=True)
    wanted = [focus_by_equations(positions(*one), visibility == "causal") for one in responses_of_batch]
    for index, mask in enumerate(batch.response_mask):
        assert_close(cos[index][mask], torch.tensor(wanted[index]).double(), name="cos", floor=4e-6)


@MANY
@given(responses, seeds, configs, st.one_of(st.just("affine"), st.none(), st.floats(-1, 0)))
def test_weights_are_the_equations(
    drawn: tuple[Response, ...], seed: int, config: VGPOConfig, offset: str | float | None
) -> None:
    """From cosines to factors, whatever the settings; filtered responses and late images among them."""
    if offset != "affine":
        config = replace(config, score="offset", score_offset=offset)
    batch = make_batch(drawn, seed=seed, features=1)
    cos, mask = sighted(batch, seed), batch.response_mask
    cos[~batch.has_visual] = float("nan")
    weights = visual_weights(cos, mask, batch.group_ids, config)
    cosines = [row[valid].tolist() for row, valid in zip(cos, mask, strict=True)]
    for index, one in enumerate(factors_by_equations(cosines, batch.group_ids.tolist(), config)):
        # A score of few tokens that hardly differ is stretched by the normalisation within the group.
        assert_close(weights.psi[index][mask[index]], torch.tensor(one.psi).double(), name="psi", floor=1e-4)
        assert_close(weights.w[index][mask[index]], torch.tensor(one.w).double(), name="w", floor=4e-6)
        assert_close(weights.score[index], torch.tensor(one.score).double(), name="score", floor=1e-4)


@CASES
@given(responses.filter(bool), seeds, st.integers(0, 39), st.integers(1, 5))
def test_a_later_image_changes_no_bit_before_it(drawn: tuple[Response, ...], seed: int, place: int, count: int) -> None:
    batch = make_batch(drawn, seed=seed, features=9)
    width = batch.response_mask.shape[1]
    first = min(place, width)
    late = torch.arange(batch.visual_mask.shape[1]) >= batch.visual_mask.shape[1] - width + first
    late &= late.cumsum(0) <= count
    changed = replace(
        batch,
        hidden=torch.where(late[:, None], 3 - batch.hidden.nan_to_num(), batch.hidden),
        visual_mask=batch.visual_mask | late,
        response_mask=batch.response_mask & ~late[late.shape[0] - width :],
    )
    same(focus(changed, "causal")[:, :first], focus(batch, "causal")[:, :first], "cos")


@CASES
@given(responses, seeds, configs, st.integers(1, 2**40), st.integers(-(2**40), 2**40))
def test_relabelled_groups_weigh_the_same(
    drawn: tuple[Response, ...], seed: int, config: VGPOConfig, stride: int, shift: int
) -> None:
    batch = make_batch(drawn, seed=seed, features=1)
    cos = draw_cosines(batch, seed)
    expected = weigh(batch, cos, config)
    actual = weigh(replace(batch, group_ids=shift - stride * batch.group_ids), cos, config)
    same(actual.factors, expected.factors, "factors")
    same(actual.phi, expected.phi, "phi")
