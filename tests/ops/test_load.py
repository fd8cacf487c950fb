"""The C++ backend under load: more elements than 32 bits count, many responses, long ones, many calls, many threads."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import vgpo_kernels as vk
from vgpo_kernels import VGPOConfig, backends
from vgpo_kernels.backends import backend

pytestmark = pytest.mark.skipif(not backends.describe()["built"]["cpp"], reason="the extension is not built")
CONFIG = VGPOConfig.paper()
CALLS = 1000


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with backend("cpp"):
        yield
    torch.set_num_threads(threads)


def untouched_zeros(rows: int, width: int) -> Tensor:
    """Zeros in bf16 that take no memory until they are written: the system maps one page of zeros to all of them."""
    return torch.from_numpy(np.zeros((rows, width), np.uint16)).view(torch.bfloat16)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def marked(length: int, *spans: tuple[int, int]) -> Tensor:
    mask = torch.zeros(length, dtype=torch.bool)
    for first, last in spans:
        mask[first:last] = True
    return mask


# More than 2^31 elements.

WIDTH = 4096
ROWS = 2**31 // WIDTH + 4096  # 2^31 elements, and 4,096 rows past them


@pytest.fixture(scope="module")
def huge() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states ``[ROWS, WIDTH]`` with an image and a response at both ends, and those rows alone."""
    hidden = untouched_zeros(ROWS, WIDTH)
    spans = ((0, 30), (ROWS - 40, ROWS))
    for seed, (first, last) in enumerate(spans):
        hidden[first:last] = draw(last - first, WIDTH, seed=seed, dtype=torch.bfloat16)
    visual = marked(ROWS, (0, 10), (ROWS - 40, ROWS - 20))
    response = marked(ROWS, (10, 30), (ROWS - 20, ROWS))
    rows = torch.cat([hidden[first:last] for first, last in spans])
    return hidden, visual, response, rows


def test_packed_rows_past_32_bits(huge):
    hidden, visual, response, rows = huge
    assert hidden.numel() > 2**31
    near, far = torch.tensor([0, 30, 70]), torch.tensor([0, 30, ROWS])
    used = visual | response
    few_visual, few_response = visual[used], response[used]
    expected = vk.visual_focus(rows, few_visual, few_response, cu_seqlens=near)
    assert expected.count_nonzero() == 40
    cos = vk.visual_focus(hidden, visual, response, cu_seqlens=far)
    assert torch.equal(cos[response], expected[few_response])
    prototypes = vk.visual_prototype(hidden, visual, cu_seqlens=far)
    assert torch.equal(prototypes, vk.visual_prototype(rows, few_visual, cu_seqlens=near))

    def loss(hidden: Tensor, visual: Tensor, response: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor]:
        logp, old = torch.zeros(response.shape), torch.zeros(response.shape)
        logp[response], old[response] = draw(40, seed=2), draw(40, seed=3)
        logp.requires_grad_()
        result = vk.vgpo_loss(
            hidden,
            logp,
            old,
            torch.tensor([0.5, -1.0]),
            visual,
            response,
            torch.zeros(2, dtype=torch.int64),
            CONFIG,
            cu_seqlens=boundaries,
        )
        (gradient,) = torch.autograd.grad(result.loss, logp)
        return result.loss.detach(), gradient[response]

    (loss_near, gradient_near), (loss_far, gradient_far) = (
        loss(rows, few_visual, few_response, near),
        loss(hidden, visual, response, far),
    )
    torch.testing.assert_close(loss_far, loss_near, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient_far, gradient_near, rtol=1e-6, atol=0)


def test_padded_batches_whose_stride_passes_32_bits(huge):
    hidden = huge[0]
    # The second response begins 2^31 elements after the first.
    start = ROWS - 40
    batch = torch.as_strided(hidden, (2, 40, WIDTH), (start * WIDTH, WIDTH, 1))
    assert batch.stride(0) > 2**31 - 1 - 40 * WIDTH
    visual = torch.stack([marked(40, (0, 10)), marked(40, (0, 20))])
    response = torch.stack([marked(30, (0, 20)), marked(30, (10, 30))])
    expected = vk.visual_focus(batch.contiguous(), visual, response)
    assert torch.equal(vk.visual_focus(batch, visual, response), expected)
    assert expected.count_nonzero() == 40


def test_log_probabilities_of_rows_past_32_bits(huge):
    hidden, visual, response, rows = huge
    weight = draw(4, WIDTH, seed=4, dtype=torch.bfloat16)
    logp = vk.linear_logprob(hidden, weight, torch.ones(ROWS, dtype=torch.int64))
    used = visual | response
    expected = vk.linear_logprob(rows, weight, torch.ones(len(rows), dtype=torch.int64))
    torch.testing.assert_close(logp[used], expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logp[~used], torch.full((ROWS - len(rows),), 0.25).log())


def test_every_one_of_more_than_32_bits_elements_is_read():
    row = draw(1, WIDTH, dtype=torch.bfloat16)
    hidden = row.expand(ROWS, WIDTH)
    image = 1000
    visual, response = marked(ROWS, (0, image)), marked(ROWS, (image, ROWS))
    cos = vk.visual_focus(hidden, visual, response, cu_seqlens=torch.tensor([0, ROWS]))
    assert cos[:image].count_nonzero() == 0
    torch.testing.assert_close(cos[image:], torch.ones(ROWS - image), rtol=1e-5, atol=0)


# Many responses, long responses.


def batch(lengths: Tensor, width: int, seed: int = 0) -> dict[str, Tensor]:
    """A packed batch of responses of some lengths, each after an image of two tokens."""
    sizes = lengths + 2
    ends = sizes.cumsum(0)
    number = int(ends[-1])
    visual = torch.zeros(number, dtype=torch.bool)
    for offset in (0, 1):
        visual[ends - sizes + offset] = True
    return {
        "hidden": draw(number, width, seed=seed),
        "visual_mask": visual,
        "response_mask": ~visual,
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), ends]),
        "group_ids": torch.arange(len(lengths)) // 8,
        "logp": draw(number, seed=seed + 1) - 1,
        "old_logp": draw(number, seed=seed + 2) - 1,
        "advantages": draw(len(lengths), seed=seed + 3),
    }


def whole_loss(data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of a batch and its gradient."""
    logp = data["logp"].clone().requires_grad_()
    loss = vk.vgpo_loss(
        data["hidden"],
        logp,
        data["old_logp"],
        data["advantages"],
        data["visual_mask"],
        data["response_mask"],
        data["group_ids"],
        CONFIG,
        cu_seqlens=data["cu_seqlens"],
    ).loss
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), gradient


def check_against_reference(data: dict[str, Tensor]) -> None:
    loss, gradient = whole_loss(data)
    with backend("reference"):
        expected_loss, expected_gradient = whole_loss(data)
    torch.testing.assert_close(loss, expected_loss.to(loss.dtype), rtol=1e-4, atol=1e-6)
    # A token at the gate's threshold may fall on the other side of it in another precision.
    apart = ~torch.isclose(gradient, expected_gradient.to(gradient.dtype), rtol=1e-3, atol=1e-9)
    assert apart.sum() <= 1e-4 * gradient.numel()


def test_ten_thousand_responses():
    lengths = torch.randint(0, 20, (10_000,), generator=torch.Generator().manual_seed(0))
    check_against_reference(batch(lengths, 16))


def test_one_response_of_131072_tokens():
    data = batch(torch.tensor([131_072, 5, 131_072]), 16)
    check_against_reference(data)
    cos = vk.visual_focus(data["hidden"], data["visual_mask"], data["response_mask"], cu_seqlens=data["cu_seqlens"])
    weights = vk.visual_weights(cos, data["response_mask"], data["group_ids"], CONFIG, cu_seqlens=data["cu_seqlens"])
    opened = 131_072 // 2 // 5  # the strongest fifth of the tail; the rest of the weights are those of a closed gate
    rho = (1 + cos) / 2
    for first, last in pairwise(data["cu_seqlens"].tolist()):
        if last - first > 100:
            compensated = (weights.w - rho)[first + 2 : last].abs() > 1e-6
            assert compensated.sum() == opened and not compensated[: 131_072 // 2].any()
            assert abs(weights.psi[first + 2 : last].double().mean()) < 1e-6


# Many calls.


def calls() -> dict[str, Callable[[], object]]:
    """One call of every kind, small enough to be made a thousand times."""
    data = batch(torch.tensor([5, 0, 9, 30]), 24)
    cos = vk.visual_focus(data["hidden"], data["visual_mask"], data["response_mask"], cu_seqlens=data["cu_seqlens"])
    weight, targets = draw(50, 24, seed=5), torch.arange(len(cos)) % 50
    q, k = draw(2, 4, 6, 16, seed=6), draw(2, 2, 12, 16, seed=7)
    segments = torch.arange(12).expand(2, 12) % 3
    weights = {"response_mask": data["response_mask"], "cu_seqlens": data["cu_seqlens"]}

    def linear() -> list[Tensor]:
        hidden, matrix = data["hidden"].clone().requires_grad_(), weight.clone().requires_grad_()
        logp = vk.linear_logprob(hidden, matrix, targets)
        return [logp.detach(), *torch.autograd.grad(logp.sum(), [hidden, matrix])]

    return {
        "visual_focus": lambda: [
            vk.visual_focus(data["hidden"], data["visual_mask"], data["response_mask"], cu_seqlens=data["cu_seqlens"])
        ],
        "visual_weights": lambda: [
            vk.visual_weights(cos, group_ids=data["group_ids"], config=CONFIG, **weights).factors
        ],
        "vgpo_loss": lambda: list(whole_loss(data)),
        "linear_logprob": linear,
        "attention_mass": lambda: [vk.attention_mass(q, k, segments)],
        "attention_heatmap": lambda: [vk.attention_heatmap(q, k, segments == 0)],
    }


KINDS = ("visual_focus", "visual_weights", "vgpo_loss", "linear_logprob", "attention_mass", "attention_heatmap")


def resident_bytes() -> int:
    """Memory in use; what was freed is given back first, as it would hide as much growth."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


reads_memory = pytest.mark.skipif(
    not (sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")),
    reason="memory in use is read as Linux and glibc tell it",
)


@reads_memory
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_calls_do_not_grow_memory(kind):
    torch.set_num_threads(1)  # two that share a busy core wait for each other, a thousand times
    call = calls()[kind]
    for _ in range(CALLS // 5):
        call()
    before = resident_bytes()
    for _ in range(CALLS):
        call()
    # A kilobyte a call would be a megabyte.
    assert resident_bytes() - before < CALLS * 1000


@reads_memory
def test_memory_growth_would_be_seen():
    before, kept = resident_bytes(), []
    for _ in range(CALLS):
        kept.append(torch.ones(500))
    assert resident_bytes() - before > CALLS * 1000


@pytest.mark.parametrize("kind", KINDS)
def test_calls_from_eight_threads_agree(kind):
    call = calls()[kind]
    expected = call()
    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(lambda _: [call() for _ in range(10)], range(8)):
            for result in results:
                assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))


# Forks.


def in_child(data: dict[str, Tensor], answer) -> None:
    signal.alarm(60)  # a child that hangs is ended, and is seen
    large = torch.ones(2**20)
    loss, gradient = whole_loss(data)
    answer.send((loss.item(), gradient.sum().item(), (large + large).sum().item(), torch.get_num_threads()))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_forked_child_computes():
    data = batch(torch.tensor([200, 300, 400, 500] * 4), 64)
    loss, gradient = whole_loss(data)  # by now OpenMP has threads, which the child will not have
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=in_child, args=(data, sender))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert receiver.recv() == (loss.item(), gradient.sum().item(), 2.0**21, 1)
    assert torch.get_num_threads() == 2
    assert torch.equal(whole_loss(data)[1], gradient)
