"""Properties that hold for every batch, drawn by hypothesis: over 2,000 cases a run."""

from __future__ import annotations

import pytest
import torch
from cases import Batch, Response, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_visual_weights import draw_cosines, weigh
from tolerance import assert_close

from vgpo_kernels import VGPOConfig, backends, group_weights, policy_loss, visual_focus, visual_weights
from vgpo_kernels.config import CHOICES, DEFAULT_AGGREGATION

# The vector code is what could go wrong, so the C++ backend is drawn on; the reference where it is not built.
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="drawn on the CPU: on a GPU the parametrised tests run on every backend"
)
BACKEND = "cpp" if backends.describe()["built"]["cpp"] else "reference"
EXACT = BACKEND == "cpp"
CASES = settings(max_examples=260, deadline=None, derandomize=True)

responses = st.lists(
    st.builds(
        Response,
        visual=st.integers(0, 12),
        text=st.integers(0, 4),
        length=st.integers(0, 40),
        group=st.integers(-2, 3),
        holes=st.booleans(),
    ),
    max_size=7,
).map(tuple)
configs = st.builds(
    VGPOConfig,
    beta=st.floats(0, 2),
    tail_ratio=st.floats(0, 1),
    top_ratio=st.floats(0.01, 1),
    schedule=st.sampled_from(CHOICES["schedule"]),
    start_ratio=st.floats(0, 0.9),
    gate=st.booleans(),
    intra=st.booleans(),
    inter=st.booleans(),
    position=st.sampled_from(CHOICES["position"]),
    accumulation=st.sampled_from(CHOICES["accumulation"]),
)
seeds = st.integers(0, 10_000)


@pytest.fixture(autouse=True, scope="module")
def drawn_backend():
    with backends.backend(BACKEND):
        yield


def same(one: torch.Tensor, two: torch.Tensor, name: str) -> None:
    if EXACT:
        assert torch.equal(one, two), name
    else:
        assert_close(one, two.double(), name=name)


def focus(batch: Batch) -> torch.Tensor:
    return visual_focus(batch.hidden, batch.visual_mask, batch.response_mask, cu_seqlens=batch.cu_seqlens)


@CASES
@given(responses, seeds, st.integers(0, 9), st.integers(1, 70))
def test_layout_does_not_matter(drawn: tuple[Response, ...], seed: int, padding: int, features: int) -> None:
    """Padded, padded further and packed: the same cosines and the same factors, to the bit.

    The batches are poisoned off their masks, so this is also the proof that nothing there is read.
    """
    plain = make_batch(drawn, seed=seed, features=features)
    expected_cos = focus(plain)
    expected = weigh(plain, expected_cos, VGPOConfig.paper())
    for other in (
        make_batch(drawn, seed=seed, features=features, extra_padding=padding),
        make_batch(drawn, seed=seed, features=features, packed=True),
    ):
        cos = focus(other)
        same(cos[other.response_mask], expected_cos[plain.response_mask], "cos")
        weights = weigh(other, cos, VGPOConfig.paper())
        same(weights.factors[other.response_mask], expected.factors[plain.response_mask], "factors")
        same(weights.phi, expected.phi, "phi")


@CASES
@given(responses, seeds, configs, st.randoms())
def test_order_does_not_matter(drawn: tuple[Response, ...], seed: int, config: VGPOConfig, random: object) -> None:
    batch = make_batch(drawn, seed=seed, features=1)
    cos = draw_cosines(batch, seed)
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
    cos = draw_cosines(batch, seed)
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
    phi = group_weights(scores, batch.group_ids, config, has_visual=batch.has_visual)
    if EXACT:
        assert torch.equal(phi, expected.phi)
    else:
        assert_close(phi, expected.phi.double(), name="phi", floor=1e-4)


@CASES
@given(responses, seeds, configs)
def test_weights_are_centred(drawn: tuple[Response, ...], seed: int, config: VGPOConfig) -> None:
    batch = make_batch(drawn, seed=seed, features=1)
    weights = weigh(batch, draw_cosines(batch, seed), config)
    lengths = batch.response_mask.sum(-1).clamp(min=1)
    assert (weights.psi.double().sum(-1) / lengths).abs().max() <= 1e-6 if len(drawn) else True
    members = batch.has_visual
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
    factors = weigh(batch, draw_cosines(batch, seed), config).factors
    assert torch.isfinite(factors).all()
    assert (factors >= min(1.0, low * group_low) * (1 - 1e-6)).all()
    assert (factors <= max(1.0, high * group_high) * (1 + 1e-6)).all()
    assert (factors[~batch.response_mask] == 1).all()


@CASES
@given(responses, seeds, st.sampled_from([2.0**-6, 0.37, 3.0, 2.0**9]))
def test_scale_does_not_matter(drawn: tuple[Response, ...], seed: int, scale: float) -> None:
    batch = make_batch(drawn, seed=seed, features=17)
    cos = focus(batch)
    scaled = visual_focus(batch.hidden * scale, batch.visual_mask, batch.response_mask)
    assert_close(scaled, cos.double(), name="cos", floor=4e-6)


@CASES
@given(st.lists(st.tuples(st.floats(0, 100, width=32), st.integers(0, 5)), max_size=30), st.integers(1, 2**40))
def test_group_ids_are_labels(drawn: list[tuple[float, int]], stride: int) -> None:
    score = torch.tensor([value for value, _ in drawn], dtype=torch.float32)
    ids = torch.tensor([group for _, group in drawn], dtype=torch.int64)
    phi = group_weights(score, ids, VGPOConfig.paper())
    same(group_weights(score, 7 - stride * ids, VGPOConfig.paper()), phi, "phi")


@CASES
@given(responses, seeds, st.sampled_from(CHOICES["loss_type"]), st.integers(0, 7))
def test_losses_add_up_over_any_partition(drawn: tuple[Response, ...], seed: int, loss_type: str, cut: int) -> None:
    batch = make_batch(drawn, seed=seed, features=1)
    options = {
        "loss_type": loss_type,
        "aggregation": DEFAULT_AGGREGATION[loss_type],
        "max_length": 40,
        "num_tokens": batch.response_mask.sum(),
        "num_sequences": len(drawn),
        "dual_clip": 3.0,
    }

    def loss(part: slice) -> torch.Tensor:
        tensors = (batch.logp, batch.old_logp, batch.advantages, batch.response_mask)
        return policy_loss(*(tensor[part] for tensor in tensors), **options).loss

    whole = loss(slice(None))
    parts = loss(slice(None, cut)) + loss(slice(cut, None))
    assert_close(parts, whole.double(), name="loss", floor=4e-6)
