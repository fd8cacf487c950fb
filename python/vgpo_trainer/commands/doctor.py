"""``vgpo doctor``: what is installed, what is built, which backend each device gets, and whether it computes correctly.

It needs torch alone; what it has to say of the trainer needs the trainer's packages.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from vgpo_trainer.runs.folder import version_of

DESCRIPTION = (
    "Print versions, what is built and which backend each device gets. Check on each device the kernels on a small "
    "example, and on a tiny model what is captured of it, the fused head and a training step."
)
PACKAGES = ("torch", "triton", "transformers", "trl", "verl", "accelerate", "deepspeed", "datasets", "peft")
PACKAGES += ("scikit-learn", "numpy")
NOT_INSTALLED = "not installed"
REPETITIONS = 5
TOLERANCE = 1e-4  # of the loss and its gradient against fp64; fp32 arithmetic stays well below


@dataclass(frozen=True)
class CheckResult:
    """The self-check of one device.

    Attributes:
        device: Its type: ``"cpu"``, ``"cuda"``, ``"mps"``, ...
        backend: The backend that computed it.
        error: Largest difference from the fp64 definition in the loss, its gradient and the factors.
        milliseconds: Of the fastest of a few calls.
        failure: What went wrong, or None.
    """

    device: str
    backend: str
    error: float
    milliseconds: float
    failure: str | None

    @property
    def passed(self) -> bool:
        """Whether the device computes what the reference implementation does."""
        return self.failure is None and self.error <= TOLERANCE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``vgpo doctor`` has no options."""


def run(arguments: argparse.Namespace) -> int:
    """Print the diagnosis; 0 if every check passed that the installed packages allow, else 1."""
    from vgpo_kernels import backends

    described = backends.describe()
    lines = diagnosis(described)
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{painted(name.ljust(width), DIM)}  {value}")
    print(flush=True)
    passed = described["refused"] is None
    for device, backend in described["serves"].items():
        result = check_device(device, backend)
        passed &= result.passed
        tell(f"{device} by {backend}", *verdict(result))
    if described["refused"]:
        tell("extension", f"failed: {described['refused']}", RED)
    elif not described["built"]["cpp"]:
        print("The C++ extension is not built; `pip install -e .` with a C++ compiler builds it.")
    for device in described["serves"]:
        passed &= check_models(device)
    return 0 if passed else 1


def check_models(device: str) -> bool:
    """Print what a tiny model proves on a device, line by line; whether nothing failed."""
    from vgpo_trainer.commands import model_checks

    print(f"\nOn a tiny LLaVA, made here and run on {'the CPU' if device == 'cpu' else device}:", flush=True)
    passed = True
    for outcome in model_checks.outcomes(device):
        if outcome.missing:
            tell(outcome.claim, f"{NOT_INSTALLED}: {', '.join(outcome.missing)}", DIM)
        elif outcome.failure is None:
            tell(outcome.claim, "works", GREEN)
        else:
            tell(outcome.claim, f"failed: {outcome.failure}", RED)
            passed = False
    return passed


def verdict(result: CheckResult) -> tuple[str, str]:
    """The self-check of a device in words, and their colour."""
    if result.failure is not None:
        return f"failed: {result.failure}", RED
    if result.passed:
        return f"works, error {result.error:.1e}, {result.milliseconds:.2f} ms", GREEN
    return f"wrong by {result.error:.1e}", RED


# By hand: rich comes with the trainer's packages, and this command tells whether they are there.
DIM, GREEN, RED = "2", "32", "1;31"


def painted(text: str, colour: str) -> str:
    """A text in a colour, where it goes to a terminal."""
    return f"\033[{colour}m{text}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


def tell(claim: str, text: str, colour: str) -> None:
    """Print one line as soon as it is known."""
    print(f"{claim}: {painted(text, colour)}", flush=True)


def diagnosis(described: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of everything worth knowing.

    Args:
        described: From :func:`vgpo_kernels.backends.describe`.
    """
    import torch

    import vgpo_kernels
    from vgpo_kernels import backends
    from vgpo_trainer.accelerators import best_device, device_name

    lines = [
        ("vgpo_kernels", f"{vgpo_kernels.__version__} in {Path(vgpo_kernels.__file__).parent}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    lines += [(name, with_tested(name, installed_version(name))) for name in PACKAGES]
    lines.append(("cpu threads", str(torch.get_num_threads())))
    kind = best_device().type
    for index in range(torch.accelerator.device_count()):
        name = device_name(torch.device(kind, index))
        if kind == "cuda":
            major, minor = torch.cuda.get_device_capability(index)
            name += f", compute capability {major}.{minor}"
        lines.append((f"gpu {index}", name))
    if kind == "cpu":
        lines.append(("gpu", "none that torch can use"))
    built = [name for name, is_built in described["built"].items() if is_built]
    lines.append(("built", ", ".join(built)))
    lines += [("extension", f"{name}: {value}") for name, value in (described["extension"] or {}).items()]
    for device, name in described["serves"].items():
        width = str(backends.wide_dtype(torch.device(device))).removeprefix("torch.")
        by = f"reference, plain PyTorch in {width}" if name == "reference" else name
        lines.append((f"{device} tensors", f"handled by {by}"))
    if described["forced"]:
        lines.append(("forced", f"{described['forced']}, by VGPO_BACKEND"))
    return lines


def installed_version(package: str) -> str:
    """The version of an installed package, in words."""
    try:
        return version_of(package)
    except PackageNotFoundError:
        return NOT_INSTALLED


def with_tested(package: str, installed: str) -> str:
    """An installed version beside the tested ones of a package, if any are recorded, marked where it is not of them.

    Args:
        package: Its name.
        installed: From :func:`installed_version`.
    """
    from vgpo_kernels.integrations.surface import TESTED

    if package not in TESTED:
        return installed
    tested = [release(text) for text in re.findall(r"\d+(?:\.\d+)+", TESTED[package])]
    mark = "tested"
    if installed != NOT_INSTALLED:
        mark = "newer than tested" if release(installed) > max(tested) else mark
        mark = "older than tested" if release(installed) < min(tested) else mark
    return f"{installed} ({mark}: {TESTED[package]})"


def release(text: str) -> tuple[int, ...]:
    """Major and minor number of a version, which is what tests are recorded by."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def check_device(device: str, backend: str) -> CheckResult:
    """Compute a VGPO loss, its gradient and the factors, and compare them with the fp64 definition.

    Args:
        device: Where to compute.
        backend: The backend that handles it, for the record.
    """
    import torch

    from vgpo_kernels import VGPOConfig, policy_loss, visual_focus, visual_weights
    from vgpo_kernels import backend as forced_backend

    generator = torch.Generator().manual_seed(0)
    responses, length, tokens, width = 8, 96, 64, 128
    normal = partial(torch.randn, generator=generator, dtype=torch.float32)
    uniform = partial(torch.rand, generator=generator, dtype=torch.float32)
    hidden = normal(responses, length, width)
    visual_mask = torch.zeros(responses, length, dtype=torch.bool)
    visual_mask[:, 4:24] = True
    response_mask = uniform(responses, tokens) > 0.1
    logp = -uniform(responses, tokens)
    old_logp = logp + 0.2 * normal(responses, tokens)
    advantages = normal(responses)
    groups = torch.arange(responses) // 4

    def compute(place: str, dtype: Any) -> list[Any]:
        move = [value.to(place) for value in (visual_mask, response_mask, groups)]
        visual, response, group = move
        policy = logp.to(place, dtype, copy=True).requires_grad_()
        cos = visual_focus(hidden.to(place, dtype), visual, response)
        factors = visual_weights(cos, response, group, VGPOConfig.paper()).factors
        loss = policy_loss(
            policy, old_logp.to(place, dtype), advantages.to(place, dtype), response, factors=factors
        ).loss
        loss.backward()
        return [value.detach().cpu().double() for value in (loss, policy.grad, factors)]

    try:
        with forced_backend("reference"):
            expected = compute("cpu", torch.float64)
        milliseconds = float("inf")
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            found = compute(device, torch.float32)
            milliseconds = min(milliseconds, 1000 * (time.perf_counter() - start))
    except Exception as error:  # whatever it is, the diagnosis goes on and says so
        return CheckResult(device, backend, float("nan"), float("nan"), f"{type(error).__name__}: {error}")
    largest = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    return CheckResult(device, backend, largest, milliseconds, None)
