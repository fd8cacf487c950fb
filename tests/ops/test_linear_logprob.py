"""linear_logprob on every backend: values and gradients against the reference implementation, slices, edges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_cases import DTYPES, Head, check, gradients, logprob, make_head
from tolerance import assert_close, floor_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgpo_kernels import combine_slices, linear_logprob, linear_logprob_slice
from vgpo_kernels.ops import registry
from vgpo_kernels.ops.lm_head import TILE_COLUMNS, TILE_ROWS, whole_waves
from vgpo_kernels.reference.linear_logprob import IGNORED
from vgpo_kernels.reference.logits import LogitMap

# (rows, features, vocabulary, bytes of a workspace): tails in every dimension, one chunk and many, and the least.
SHAPES = {
    "one chunk": (37, 33, 300, None),
    "many chunks": (70, 48, 2600, 4 * 16 * 1024),
    "tiny workspace": (3, 8, 20, 4),
    "one row": (1, 64, 130, None),
    "one entry": (9, 16, 1, None),
    "no rows": (0, 16, 7, None),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_definition(backend_name: str, device: torch.device, dtype: str, shape: str) -> None:
    rows, features, vocabulary, chunk_bytes = SHAPES[shape]
    head = make_head(rows, features, vocabulary, dtype=DTYPES[dtype])
    check(head, device, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_temperature_and_ignored_rows(backend_name: str, device: torch.device, dtype: str) -> None:
    head = make_head(41, 24, 530, dtype=DTYPES[dtype], bias=True, ignored=0.4)
    check(head, device, temperature=0.7, chunk_bytes=4 * 20 * 128)


def test_the_definition_is_log_softmax_and_its_entropy() -> None:
    head = make_head(13, 6, 19, bias=True).double()
    distribution = torch.distributions.Categorical(logits=(head.hidden @ head.weight.T + head.bias) / 0.5)
    logp, entropy = logprob(head, temperature=0.5)
    assert_close(logp, distribution.log_prob(head.targets), name="logp")
    assert_close(entropy, distribution.entropy(), name="entropy")


def test_the_definition_has_the_gradient_of_finite_differences() -> None:
    head = make_head(4, 3, 6, bias=True, ignored=0.3, seed=3).double()
    filled = replace(head, hidden=head.hidden.nan_to_num())
    assert torch.autograd.gradcheck(lambda *leaves: logprob(filled, list(leaves)), filled.leaves())


def test_leading_dimensions_are_kept(backend_name: str, device: torch.device) -> None:
    head = make_head(12, 16, 50).to(device)
    flat = linear_logprob(head.hidden, head.weight, head.targets)
    assert isinstance(flat, Tensor)
    shaped = linear_logprob(head.hidden.view(3, 4, 16), head.weight, head.targets.view(3, 4).int())
    assert isinstance(shaped, Tensor)
    assert torch.equal(shaped, flat.view(3, 4))


def test_strided_inputs(backend_name: str, device: torch.device) -> None:
    head = make_head(20, 16, 90)
    wide = torch.full((20, 2, 40), float("nan"))
    wide[:, 1, 8:24] = head.hidden
    strided = replace(head, hidden=wide[:, 1, 8:24], weight=head.weight.T.contiguous().T)
    logp, _ = logprob(strided.to(device))
    assert_close(logp, logprob(head.double())[0], name="logp")


def test_every_row_ignored(backend_name: str, device: torch.device) -> None:
    head = make_head(6, 8, 30, ignored=1.1).to(device)
    logp, entropy = logprob(head)
    assert not logp.any() and not entropy.any()
    assert all(not gradient.any() for gradient in gradients(head))


def test_nothing_is_ignored_without_an_index(backend_name: str, device: torch.device) -> None:
    head = make_head(6, 8, 30).to(device)
    assert torch.equal(logprob(head)[0], logprob(head, ignore_index=None)[0])
    other = replace(head, targets=head.targets.clone())
    other.targets[2] = 29
    assert logprob(other, ignore_index=29)[0][2] == 0


def test_a_broken_row_keeps_to_itself(backend_name: str, device: torch.device) -> None:
    head = make_head(7, 16, 60)
    hidden = head.hidden.clone()
    hidden[1, 3], hidden[4, 0], hidden[5] = float("nan"), float("inf"), float("nan")
    broken = torch.tensor([1, 4, 5])
    intact = torch.tensor([0, 2, 3, 6])
    logp, entropy = logprob(replace(head, hidden=hidden).to(device))
    expected, expected_entropy = logprob(head.to(device))
    assert logp[broken].isnan().all() and entropy[broken].isnan().all()
    assert_close(logp[intact], expected[intact].double(), name="logp")
    assert_close(entropy[intact], expected_entropy[intact].double(), name="entropy")


def test_forbidden_entries_have_no_probability(backend_name: str, device: torch.device) -> None:
    # More than one chunk's worth, from the first on, so that a chunk may have nothing else.
    head = make_head(8, 16, 3000, bias=True)
    assert head.bias is not None
    head.bias[:1500] = -float("inf")
    head.bias[2000::3] = -float("inf")
    allowed = (head.bias > -float("inf")).nonzero().squeeze(-1)
    head = replace(head, targets=allowed[torch.arange(8) * 50])
    inner = replace(
        head,
        weight=head.weight[allowed],
        bias=head.bias[allowed],
        targets=torch.searchsorted(allowed, head.targets),
    )
    for one, wide in zip(logprob(head.to(device), chunk_bytes=4 * 8 * 1024), logprob(inner.double()), strict=True):
        assert_close(one, wide, name="with forbidden entries")
    found = gradients(head.to(device), chunk_bytes=4 * 8 * 1024)
    expected = gradients(inner.double())
    assert_close(found[0], expected[0], name="gradient by hidden")
    assert_close(found[1][allowed], expected[1], name="gradient by weight")
    assert not found[1][head.bias.to(device) == -float("inf")].any()


def test_confident_rows_keep_their_digits(backend_name: str, device: torch.device) -> None:
    # Probabilities of 1 - 1e-6 at logits of 80: measured from zero, an fp32 logit would only be known to 4e-6.
    hidden = torch.eye(4) * 80
    weight = torch.zeros(40, 4)
    weight[:4] = torch.eye(4)
    weight[4:] = 0.8 - 1e-3
    head = Head(hidden, weight, None, torch.arange(4))
    logp, entropy = logprob(head.to(device))
    exact_logp, exact_entropy = logprob(head.double())
    assert exact_logp.abs().max() < 1e-4
    torch.testing.assert_close(logp.cpu().double(), exact_logp, rtol=0, atol=2.5e-7)
    torch.testing.assert_close(entropy.cpu().double(), exact_entropy, rtol=0, atol=1e-6)


def test_the_weights_gradient_is_summed_in_fp32(backend_name: str, device: torch.device) -> None:
    # Every token adds 1/64 to each row of the gradient. A bf16 sum would stop at 4, where 1/64 is half a unit.
    rows = 512
    head = Head(
        torch.ones(rows, 8, dtype=torch.bfloat16),
        torch.zeros(64, 8, dtype=torch.bfloat16),
        None,
        torch.zeros(rows, dtype=torch.int64),
    ).to(device)
    weight = head.weight.clone().requires_grad_()
    logp = linear_logprob(head.hidden, weight, head.targets, chunk_bytes=4 * 64 * 16)
    assert isinstance(logp, Tensor)
    (gradient,) = torch.autograd.grad(-logp.sum(), weight)
    assert (gradient[1:] == rows / 64).all()
    assert (gradient[0] == rows / 64 - rows).all()


def test_faint_half_precision_gradients_survive(backend_name: str, device: torch.device) -> None:
    head = make_head(30, 16, 200, dtype=torch.float16)

    def scaled(leaves: list[Tensor], target: Head) -> list[Tensor]:
        # The gradient by a logit is about 1e-9 here, below the smallest fp16 number.
        return list(torch.autograd.grad(logprob(target, leaves)[0].sum() * 3e-7, leaves[1], retain_graph=True))

    weight = head.weight.float()
    found = scaled([head.hidden.to(device), weight.to(device).requires_grad_()], head.to(device))
    wide = replace(head.double(), weight=weight.double())
    expected = scaled([wide.hidden, wide.weight.clone().requires_grad_()], wide)
    assert_close(found[0] * 1e7, expected[0] * 1e7, name="gradient", floor=2e-3)


MIXTURES = {("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")}


@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), sorted(MIXTURES))
def test_products_run_in_the_dtype_of_hidden(
    backend_name: str, device: torch.device, hidden_dtype: str, weight_dtype: str
) -> None:
    head = make_head(30, 24, 200, dtype=DTYPES[hidden_dtype])
    mixed = replace(head, weight=make_head(30, 24, 200).weight.to(DTYPES[weight_dtype]))
    rounded = replace(mixed, weight=mixed.weight.to(DTYPES[hidden_dtype]))
    if backend_name == "reference" or (backend_name == "cpp" and hidden_dtype == "float16"):
        rounded = mixed  # no processor multiplies fp16; the reference implementation takes the weight as it is
    assert_close(logprob(mixed.to(device))[0], logprob(rounded.double())[0], name="logp")
    assert gradients(mixed.to(device))[1].dtype == DTYPES[weight_dtype]


def test_autocast_chooses_the_dtype(backend_name: str, device: torch.device) -> None:
    head = make_head(30, 24, 200)
    with torch.autocast(device.type, torch.bfloat16):
        logp = logprob(head.to(device))[0]
        found = gradients(head.to(device))
    narrow = replace(head, hidden=head.hidden.bfloat16(), weight=head.weight.bfloat16())
    expected = narrow.double() if backend_name != "reference" else replace(narrow.double(), weight=head.weight.double())
    assert_close(logp, logprob(expected)[0], name="logp")
    assert [gradient.dtype for gradient in found] == [torch.float32, torch.float32]
    for one, wide in zip(found, gradients(expected), strict=True):
        assert_close(one, wide, name="gradient", floor=floor_of(torch.bfloat16, 200))


# ---- slices of the vocabulary -----------------------------------------------------------------------------------


def sliced(head: Head, leaves: list[Tensor] | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """The log-probabilities of a head from three slices of its vocabulary, of different lengths."""
    hidden, weight, *bias = leaves or head.tensors()
    parts = []
    for begin, end in ((0, 5), (5, 150), (150, weight.shape[0])):
        offsets = bias[0][begin:end] if bias else None
        parts.append(
            linear_logprob_slice(hidden, weight[begin:end], head.targets, first=begin, bias=offsets, **options)
        )
    return combine_slices(torch.stack(parts), head.targets)


def test_slices_of_the_vocabulary_combine(backend_name: str, device: torch.device) -> None:
    head = make_head(23, 16, 200, bias=True, ignored=0.2).to(device)
    wide = make_head(23, 16, 200, bias=True, ignored=0.2).double()
    for one, other in zip(sliced(head, temperature=1.3), logprob(wide, temperature=1.3), strict=True):
        assert_close(one, other, name="of slices")
    for one, other in zip(gradients(head, sliced), gradients(wide), strict=True):
        assert_close(one, other, name="gradient of slices")


# ---- logits that are kept ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_logits_give_the_same_gradients(backend_name: str, device: torch.device, dtype: str) -> None:
    head = make_head(41, 24, 530, dtype=DTYPES[dtype], bias=True, ignored=0.4)
    options = {"temperature": 0.7, "softcap": 6.0, "chunk_bytes": 4 * 20 * 128, "recompute": False}
    check(head, device, **options)
    again, kept = (logprob(head.to(device), **{**options, "recompute": recompute}) for recompute in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(again, kept, strict=True))


def test_kept_logits_serve_twice(backend_name: str, device: torch.device) -> None:
    head = make_head(20, 16, 90, ignored=0.3).to(device)
    leaves = head.leaves()
    logp, _ = logprob(head, leaves, recompute=False)
    first, second = (torch.autograd.grad(logp.sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_products_are_computed_once_where_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a CPU's call of few logits in fp32, and by every call that says so; never without a gradient."""
    called: list[str] = []
    plain = registry.call

    def counted(name: str, *arguments: Any, **named: Any) -> Any:
        called.append(name)
        return plain(name, *arguments, **named)

    monkeypatch.setattr(registry, "call", counted)
    narrow, wide = make_head(6, 8, 40, dtype=torch.bfloat16), make_head(6, 8, 40)
    keeping = {
        "small": (wide, None, True),
        "small, not to be kept": (wide, True, False),
        "16 bits": (narrow, None, False),
        "16 bits, to be kept": (narrow, False, True),
    }
    for why, (head, recompute, expected) in keeping.items():
        hidden, weight = head.leaves()
        called.clear()
        linear_logprob(hidden, weight, head.targets, recompute=recompute)
        assert called == ["linear_logprob_keeping" if expected else "linear_logprob"], why
    called.clear()
    with torch.no_grad():
        linear_logprob(*wide.leaves(), wide.targets, recompute=False)
    linear_logprob(wide.hidden, wide.weight, wide.targets, recompute=False)
    assert called == ["linear_logprob"] * 2


# ---- inside models ----------------------------------------------------------------------------------------------


class TiedModel(nn.Module):
    """An embedding that is also the LM head, with an adapter on the head, between them one layer."""

    def __init__(self, fused: bool, checkpointed: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(60, 12, generator=generator) * 0.3)
        self.layer = nn.Parameter(torch.randn(12, 12, generator=generator) * 0.3)
        self.down = nn.Parameter(torch.randn(2, 12, generator=generator) * 0.3)
        self.up = nn.Parameter(torch.randn(60, 2, generator=generator) * 0.3)
        self.fused, self.checkpointed = fused, checkpointed

    def score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        weight = self.embedding + 0.5 * self.up @ self.down
        if self.fused:
            logp, entropy = linear_logprob(hidden, weight, targets, return_entropy=True)
        else:
            log_probabilities = (hidden @ weight.T).log_softmax(-1)
            logp = log_probabilities.gather(-1, targets[..., None]).squeeze(-1)
            entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        return logp.mean() - 0.1 * entropy.mean()

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.embedding[ids[:, :-1]] @ self.layer)
        if self.checkpointed:
            return checkpoint(self.score, hidden, ids[:, 1:], use_reentrant=False)  # type: ignore[no-any-return]
        return self.score(hidden, ids[:, 1:])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_tied_embeddings_adapters_and_checkpointing(
    backend_name: str, device: torch.device, checkpointed: bool
) -> None:
    ids = torch.randint(60, (3, 9), generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for fused in (True, False):
        model = TiedModel(fused, checkpointed and fused).to(device)
        model(ids).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert_close(one, other.double(), name="gradient")


def test_traces_into_one_graph(backend_name: str, device: torch.device) -> None:
    head = make_head(24, 16, 120, ignored=0.3).to(device)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logp, entropy = linear_logprob(hidden, weight, head.targets, return_entropy=True, temperature=0.9)
        return (logp.square() + entropy).sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = head.leaves()
        value = function(*leaves)
        found.append([value, *torch.autograd.grad(value, leaves)])
    for one, other in zip(*found, strict=True):
        assert_close(other, one.double(), name="traced")


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(exact_backend: str, device: torch.device, bias: bool) -> None:
    head = make_head(10, 16, 40, bias=bias).to(device)
    leaves = head.leaves()
    offsets = leaves[2] if bias else None
    logit_map = LogitMap(0.8, torch.rand(10, device=device) + 0.5, 1.3, 5.0) if bias else LogitMap(0.8)
    arguments = (leaves[0], leaves[1], offsets, head.targets, 0, *logit_map, IGNORED, 0)
    more = (True, True, 3, 0.9, 0.0) if bias else (False, False, 0, 1.0, 0.0)
    operator = registry.implementation("linear_logprob", exact_backend)
    torch.library.opcheck(operator, (*arguments, *more))
    statistics = operator(*arguments, *more)[:4].detach()
    detached = (*(None if leaf is None else leaf.detach() for leaf in arguments[:3]), *arguments[3:-1])
    keeping = registry.implementation("linear_logprob_keeping", exact_backend)
    torch.library.opcheck(keeping, arguments)
    for products in (None, keeping(*arguments)[1].detach()):
        torch.library.opcheck(
            registry.implementation("linear_logprob_backward", exact_backend),
            (torch.ones_like(statistics), statistics, *detached, [True, True, bias], 0, products),
        )


# ---- bad input --------------------------------------------------------------------------------------------------

GOOD = {
    "hidden": torch.zeros(4, 8),
    "weight": torch.zeros(10, 8),
    "targets": torch.zeros(4, dtype=torch.int64),
}

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list": ({"hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor, got list"),
    "integers": ({"hidden": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, "hidden must be float32"),
    "one dimension": ({"hidden": torch.zeros(8)}, ValueError, r"hidden must have shape \[N, D\] or"),
    "weight's rank": ({"weight": torch.zeros(2, 5, 8)}, ValueError, r"weight must have shape \[V, D\] with V > 0"),
    "empty weight": ({"weight": torch.zeros(0, 8)}, ValueError, r"weight must have shape \[V, D\] with V > 0"),
    "features": ({"weight": torch.zeros(10, 7)}, ValueError, r"weight must have shape \[V, 8\].*got float32\[10, 7\]"),
    "bias": ({"bias": torch.zeros(9)}, ValueError, r"bias must have shape \[10\]"),
    "targets' shape": ({"targets": torch.zeros(5, dtype=torch.int64)}, ValueError, r"targets must have shape \[4\]"),
    "targets' dtype": ({"targets": torch.zeros(4)}, TypeError, "targets must be an integer tensor"),
    "target above": ({"targets": torch.tensor([0, 10, 0, 0])}, ValueError, "below 10, the rows of weight, got 0 to 10"),
    "target below": ({"targets": torch.tensor([0, -1, 0, 0])}, ValueError, "targets must be at least 0.*got -1 to 0"),
    "ignored without": (
        {"targets": torch.tensor([0, -100, 0, 0]), "ignore_index": None},
        ValueError,
        "targets must be at least 0",
    ),
    "ignore_index": ({"ignore_index": 1.0}, TypeError, "ignore_index must be an integer or None, got float"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be finite and above 0.*got 0.0"),
    "temperature's type": ({"temperature": "1"}, TypeError, "temperature must be a number, got str"),
    "chunk": ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case: str) -> None:
    changes, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        linear_logprob(**(GOOD | changes))


def test_a_slice_must_begin_somewhere() -> None:
    with pytest.raises(ValueError, match="first must not be negative, got -3"):
        linear_logprob_slice(**GOOD, first=-3)


def idle(columns: int, rows: int, vocabulary: int, multiprocessors: int) -> float:
    """Share of the multiprocessors' time that no tile of the vocabulary's products fills."""
    row_tiles = -(-rows // TILE_ROWS)
    widths = [min(columns, vocabulary - begin) for begin in range(0, vocabulary, columns)]
    tiles = [row_tiles * -(-width // TILE_COLUMNS) for width in widths]
    turns = sum(-(-count // multiprocessors) for count in tiles)
    return 1 - sum(tiles) / (turns * multiprocessors)


@pytest.mark.parametrize("multiprocessors", [78, 108, 114, 132, 148])
@pytest.mark.parametrize("rows", [1000, 4096, 16_384])
def test_chunks_leave_few_multiprocessors_idle(rows: int, multiprocessors: int) -> None:
    for vocabulary in (32_000, 128_256, 151_936, 152_064):
        for most in (vocabulary // 16, 6336, 2048, 100):
            columns = whole_waves(most, rows, vocabulary, multiprocessors)
            assert most // 2 < columns <= most
            if most >= 6336 and rows >= 4096:
                assert idle(columns, rows, vocabulary, multiprocessors) < 0.08


def test_chunks_of_a_7b_model_are_whole_waves() -> None:
    assert whole_waves(9472, 4096, 152_064, 132) == 8448
    assert idle(8448, 4096, 152_064, 132) == 0
