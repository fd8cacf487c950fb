"""``vgpo doctor``: what is installed, what is built, what serves which device, and whether it computes correctly."""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

DESCRIPTION = "Print versions, what is built and which backend serves which device, and check it on a small example."
PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "datasets", "peft", "scikit-learn", "numpy")
REPETITIONS = 5
TOLERANCE = 1e-4  # of the loss and its gradient against fp64; fp32 arithmetic stays well below


@dataclass(frozen=True)
class CheckResult:
    """The self-check of one device.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        backend: The backend that served it.
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
        """Whether the device computes what the definition says."""
        return self.failure is None and self.error <= TOLERANCE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``vgpo doctor`` has no options."""


def run(arguments: argparse.Namespace) -> int:
    """Print the diagnosis; 0 if every device passed its check, else 1."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vgpo_kernels import backends

    console = Console(highlight=False)
    described = backends.describe()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in diagnosis(described):
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(table)
    console.print()
    results = [check_device(device, backend) for device, backend in described["serves"].items()]
    for result in results:
        if result.failure is not None:
            verdict = Text(f"failed: {result.failure}", style="bold red")
        elif result.passed:
            verdict = Text(f"works, error {result.error:.1e}, {result.milliseconds:.2f} ms", style="green")
        else:
            verdict = Text(f"wrong by {result.error:.1e}", style="bold red")
        console.print(Text.assemble(f"{result.device} by {result.backend}: ", verdict))
    if not described["built"]["cpp"]:
        console.print("The C++ extension is not built; `pip install -e .` with a C++ compiler builds it.")
    return 0 if all(result.passed for result in results) else 1


def diagnosis(described: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of everything worth knowing.

    Args:
        described: From :func:`vgpo_kernels.backends.describe`.
    """
    import torch

    import vgpo_kernels

    lines = [
        ("vgpo_kernels", vgpo_kernels.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    lines += [(name, installed_version(name)) for name in PACKAGES]
    lines.append(("cpu threads", str(torch.get_num_threads())))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines.append((f"gpu {index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"))
    else:
        lines.append(("gpu", "none that torch can use"))
    built = [name for name, is_built in described["built"].items() if is_built]
    lines.append(("built", ", ".join(built)))
    lines += [("extension", f"{name}: {value}") for name, value in (described["extension"] or {}).items()]
    lines += [(f"{device} tensors", f"served by {name}") for device, name in described["serves"].items()]
    if described["forced"]:
        lines.append(("forced", f"{described['forced']}, by VGPO_BACKEND"))
    return lines


def installed_version(package: str) -> str:
    """The version of an installed package, in words."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def check_device(device: str, backend: str) -> CheckResult:
    """Compute a VGPO loss, its gradient and the factors, and compare them with the fp64 definition.

    Args:
        device: Where to compute.
        backend: The backend that serves it, for the record.
    """
    import torch

    from vgpo_kernels import VGPOConfig, policy_loss, visual_focus, visual_weights
    from vgpo_kernels import backend as forced_backend

    generator = torch.Generator().manual_seed(0)
    responses, length, tokens, width = 8, 96, 64, 128
    hidden = torch.randn(responses, length, width, generator=generator)
    visual_mask = torch.zeros(responses, length, dtype=torch.bool)
    visual_mask[:, 4:24] = True
    response_mask = torch.rand(responses, tokens, generator=generator) > 0.1
    logp = -torch.rand(responses, tokens, generator=generator)
    old_logp = logp + 0.2 * torch.randn(responses, tokens, generator=generator)
    advantages = torch.randn(responses, generator=generator)
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
