"""Properties that hold for every batch, drawn by hypothesis: over 2,000 cases a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Batch, Response, make_batch
from equations import factors as factors_by_equations
from equations import focus as focus_by_equations
from equations import positions
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import make_head, with_predicting_rows
from test_attention_mass import Attention, draw
from test_visibility import cosines as focus
from test_visual_weights import draw_cosines, weigh
from tolerance import assert_close, same_bits

from vgpo_kernels import (
    VGPOConfig,
    attention_heatmap,
    attention_mass,
    backends,
    combine_slices,
    group_weights,
    linear_logprob,
    linear_logprob_slice,
    linear_policy_loss,
    policy_loss,
    vgpo_loss,
    visual_focus,
    visual_prototype,
    visual_weights,
)
from vgpo_kernels.config import CHOICES, DEFAULT_AGGREGATION

# The vector code is what could go wrong, so the C++ backend is drawn on; the reference where it is not built.
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="drawn on the CPU: on a GPU the parametrised tests run on every backend"
)
BACKEND = "cpp" if backends.describe()["built"]["cpp"] else "reference"
EXACT = BACKEND == "cpp"
CASES = settings(max_examples=140, deadline=None, derandomize=True)
MANY, FEW = settings(CASES, max_examples=400), settings(CASES, max_examples=60)  # of the quick ones, and of the slow
# What arithmetic would carry on: multiplied by zero they are NaN, or vanish beside nothing.
POISONS = [float("nan"), float("inf"), float("-inf"), 3e38]

responses = st.lists(
    st.builds(
        Response,
        visual=st.integers(0, 12),
        text=st.integers(0, 4),
        length=st.integers(0, 40),
        group=st.integers(-2, 3),
        holes=st.booleans(),
        late=st.integers(0, 4),
    ),
    max_size=7,
).map(tuple)
configs = st.builds(
    VGPOConfig,
    beta=st.floats(0, 2),
    tail_ratio=st.floats(0, 1),
    top_ratio=st.floats(0.01, 1),
    schedule=st.sampled_from(CHOICES["schedule"]),
    # Off the fractions of small lengths, where rounding would decide.
    start_ratio=st.one_of(st.just(0.0), st.floats(0, 0.9).map(lambda ratio: ratio + 1.7e-5)),
    gate=st.booleans(),
    intra=st.booleans(),
    inter=st.booleans(),
    position=st.sampled_from(CHOICES["position"]),
    accumulation=st.sampled_from(CHOICES["accumulation"]),
)
seeds = st.integers(0, 10_000)
visibilities = st.sampled_from(("all", "causal"))


@pytest.fixture(autouse=True, scope="module")
def drawn_backend():
    with backends.backend(BACKEND):
        yield


def same(one: torch.Tensor, two: torch.Tensor, name: str) -> None:
    if EXACT:
        assert same_bits(one, two), name
    else:
        assert_close(one, two.double(), name=name)


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


@MANY
@given(st.lists(st.tuples(st.floats(0, 100, width=32), st.integers(0, 5)), max_size=30), st.integers(1, 2**40))
def test_group_ids_are_labels(drawn: list[tuple[float, int]], stride: int) -> None:
    score = torch.tensor([value for value, _ in drawn], dtype=torch.float32)
    ids = torch.tensor([group for _, group in drawn], dtype=torch.int64)
    phi = group_weights(score, ids, VGPOConfig.paper())
    same(group_weights(score, 7 - stride * ids, VGPOConfig.paper()), phi, "phi")


def part_of(batch: Batch, index: torch.Tensor) -> Batch:
    """Some responses of a padded batch."""
    return replace(batch, **{name: value[index] for name, value in vars(batch).items() if value is not None})


@CASES
@given(responses, seeds, st.sampled_from(CHOICES["loss_type"]), st.lists(st.integers(0, 3), min_size=7, max_size=7))
def test_losses_add_up_over_any_partition(
    drawn: tuple[Response, ...], seed: int, loss_type: str, parts: list[int]
) -> None:
    """Over micro-batches of any responses, with the whole batch's denominators: the loss, and the gradient."""
    batch = make_batch(drawn, seed=seed, features=1)
    options = {
        "loss_type": loss_type,
        "aggregation": DEFAULT_AGGREGATION[loss_type],
        "max_length": 40,
        "num_tokens": batch.response_mask.sum(),
        "num_sequences": len(drawn),
        "dual_clip": 3.0,
    }

    def loss_and_gradient(part: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logp = part.logp.clone().requires_grad_()
        loss = policy_loss(logp, part.old_logp, part.advantages, part.response_mask, **options).loss
        return loss.detach(), torch.autograd.grad(loss, logp)[0]

    whole, gradient = loss_and_gradient(batch)
    total = torch.zeros((), dtype=torch.float64)
    for part in range(4):
        index = torch.tensor([row for row in range(len(drawn)) if parts[row] == part], dtype=torch.int64)
        loss, of_part = loss_and_gradient(part_of(batch, index))
        total += loss
        same(of_part, gradient[index], "gradient")
    assert_close(total, whole.double(), name="loss", floor=4e-6)


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


# ---- attention -----------------------------------------------------------------------------------------------------

lengths = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 30)).map(sorted), min_size=1, max_size=4).map(tuple)
windows = st.one_of(st.none(), st.integers(1, 12))


def attend(case: Attention, window: int | None) -> list[torch.Tensor]:
    """Masses and heatmap of every head."""
    options = case.layout | {"window": window, "per_head": True}
    mass = attention_mass(case.q, case.k, case.segments, **options)
    heat = attention_heatmap(case.q, case.k, case.segments == 1, attention_mask=case.segments >= 0, **options)
    return [mass, heat]


@FEW
@given(lengths, seeds, windows, st.sampled_from(POISONS), st.randoms())
def test_attention_reads_no_ignored_key_nor_query(
    drawn: tuple[tuple[int, int], ...], seed: int, window: int | None, poison: float, random: object
) -> None:
    case = draw(drawn, heads=4, key_heads=2, size=8, packed=True, mixed=True, seed=seed)
    queries, keys = case.q.shape[0], case.k.shape[0]
    # Queries at a negative position see nothing.
    positions = torch.tensor([random.randint(-3, keys) for _ in range(queries)], dtype=torch.int64)  # type: ignore[attr-defined]
    results = []
    for value in (0.0, poison):
        q = torch.where((positions < 0)[:, None, None], value, case.q)
        k = torch.where((case.segments < 0)[:, None, None], value, case.k)
        results.append(attend(replace(case, q=q, k=k, positions=positions), window))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@FEW
@given(lengths, seeds, windows, st.randoms())
def test_attention_of_a_response_is_its_own(
    drawn: tuple[tuple[int, int], ...], seed: int, window: int | None, random: object
) -> None:
    """Alone, or in a packed batch of any order: the same masses and heat, to the bit."""
    case = draw(drawn, heads=4, key_heads=2, size=8, packed=True, mixed=True, seed=seed)
    assert case.cu_seqlens_q is not None and case.cu_seqlens_k is not None
    order = list(range(len(drawn)))
    random.shuffle(order)  # type: ignore[attr-defined]

    def split(tensor: torch.Tensor, boundaries: torch.Tensor, dim: int = 0) -> list[torch.Tensor]:
        return [*tensor.split(boundaries.diff().tolist(), dim)]

    def joined(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
        return torch.cat([parts[index] for index in order], dim)

    def bounds(boundaries: torch.Tensor) -> torch.Tensor:
        lengths = boundaries.diff()[torch.tensor(order)]
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()

    sides = {"q": case.cu_seqlens_q, "k": case.cu_seqlens_k, "segments": case.cu_seqlens_k}
    pieces = {name: split(getattr(case, name), boundaries) for name, boundaries in sides.items()}
    shuffled = replace(
        case,
        **{name: joined(parts) for name, parts in pieces.items()},
        cu_seqlens_q=bounds(case.cu_seqlens_q),
        cu_seqlens_k=bounds(case.cu_seqlens_k),
    )
    whole, again = attend(case, window), attend(shuffled, window)
    for result, other, boundaries in zip(whole, again, (case.cu_seqlens_q, case.cu_seqlens_k), strict=True):
        parts = split(result, boundaries, 1)
        same(other, joined(parts, 1), "another order")
        for index, part in enumerate(parts):
            alone = Attention(
                *(pieces[name][index].transpose(0, 1)[None] for name in ("q", "k")), pieces["segments"][index][None]
            )
            found = attend(alone, window)[0 if result is whole[0] else 1]
            same(found[0], part, "alone")


# ---- the LM head ---------------------------------------------------------------------------------------------------


@MANY
@given(st.integers(0, 12), st.integers(1, 20), st.integers(1, 40), seeds, st.sampled_from(POISONS))
def test_ignored_rows_of_the_head_are_not_read(
    rows: int, features: int, vocabulary: int, seed: int, poison: float
) -> None:
    head = make_head(rows, features, vocabulary, bias=True, ignored=0.4, seed=seed)
    results = []
    for value in (0.0, poison):
        leaves = replace(head, hidden=torch.where(head.hidden.isnan(), value, head.hidden)).leaves()
        hidden, weight, bias = leaves
        logp, entropy = linear_logprob(hidden, weight, head.targets, bias=bias, return_entropy=True)
        results.append([logp.detach(), entropy.detach(), *torch.autograd.grad((logp + entropy).sum(), leaves)])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@MANY
@given(st.integers(1, 12), st.integers(1, 20), st.integers(1, 40), seeds, st.integers(1, 2**12), st.randoms())
def test_rows_and_chunks_of_the_head_are_independent(
    rows: int, features: int, vocabulary: int, seed: int, chunk_bytes: int, random: object
) -> None:
    head = make_head(rows, features, vocabulary, bias=True, seed=seed)
    expected = linear_logprob(head.hidden, head.weight, head.targets, bias=head.bias)
    order = list(range(rows))
    random.shuffle(order)  # type: ignore[attr-defined]
    index = torch.tensor(order)
    hidden, targets = head.hidden[index], head.targets[index]
    actual = linear_logprob(hidden, head.weight, targets, bias=head.bias, chunk_bytes=chunk_bytes)
    assert_close(actual, expected[index].double(), name="logp", floor=4e-6)
    # A cut anywhere in the vocabulary.
    cut = seed % (vocabulary + 1)
    slices = [
        linear_logprob_slice(head.hidden, head.weight[part], head.targets, first=part.start, bias=head.bias[part])
        for part in (slice(0, cut), slice(cut, vocabulary))
        if part.stop > part.start
    ]
    combined, _ = combine_slices(torch.stack(slices), head.targets)
    assert_close(combined, expected.double(), name="logp of slices", floor=4e-6)


@FEW
@given(
    responses.map(lambda drawn: tuple(replace(one, visual=one.visual + 1) for one in drawn)),
    seeds,
    st.sampled_from(["dapo", "grpo", "gspo", "luspo", "vespo"]),
    st.lists(st.integers(0, 2), min_size=7, max_size=7),
)
def test_losses_of_the_head_add_up(drawn: tuple[Response, ...], seed: int, loss_type: str, parts: list[int]) -> None:
    batch, head = with_predicting_rows(make_batch(drawn, seed=seed, features=6), 11)
    options = {"loss_type": loss_type, "num_tokens": batch.response_mask.sum(), "num_sequences": len(drawn)}

    def loss(index: torch.Tensor) -> torch.Tensor:
        part = part_of(batch, index)
        tensors = (head.targets[index], part.old_logp, part.advantages, part.response_mask)
        return linear_policy_loss(part.hidden, head.weight, *tensors, **options).loss

    whole = loss(torch.arange(len(drawn)))
    places = [[row for row in range(len(drawn)) if parts[row] == part] for part in range(3)]
    total = sum(loss(torch.tensor(place, dtype=torch.int64)).double() for place in places)
    assert_close(torch.as_tensor(total), whole.double(), name="loss", floor=4e-6)
