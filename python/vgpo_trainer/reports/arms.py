"""What an ablation compares: its arms, and the result of one run. A command line needs these without the pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BASELINE = "dapo"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        title: For the table and the plot.
        meaning: What it is, for the command line.
        changes: Fields of :class:`~vgpo_kernels.VGPOConfig` that differ from the paper's; None trains without VGPO.
    """

    title: str
    meaning: str
    changes: dict[str, Any] | None


ARMS = {
    "dapo": Arm("DAPO", "no visual signal: what the others are compared with", None),
    "intra": Arm("DAPO + intra", "tokens re-weighted within a response alone", {"inter": False}),
    "inter": Arm("DAPO + inter", "responses re-weighted within a group alone", {"intra": False}),
    "vgpo": Arm("VGPO: both, linear, tail gate", "both of them, as the paper sets them", {}),
    "exponential": Arm(
        "VGPO, exponential schedule", "vgpo with compensation that grows exponentially", {"schedule": "exponential"}
    ),
    "step": Arm("VGPO, step schedule", "vgpo with compensation from the middle on", {"schedule": "step"}),
    "full": Arm("VGPO, full compensation", "vgpo with compensation of every token, without the gate", {"gate": False}),
}


def arm_named(name: str) -> str:
    """Return the name of an arm.

    Raises:
        ValueError: There is none of that name; the message says what each is.
    """
    if name not in ARMS:
        raise ValueError(f"there is no arm {name!r}; the arms are {meanings()}")
    return name


def meanings() -> str:
    """Say in a line what each arm is."""
    return ", ".join(f"{name} ({arm.meaning})" for name, arm in ARMS.items())


@dataclass(frozen=True)
class Run:
    """Result of one arm with one seed.

    Attributes:
        accuracy_before, accuracy: Held-out accuracy of greedy answers, 0 to 1.
        late_early_ratio: Visual accumulation of the second half of a response divided by that of the first half, mean
            over the responses sampled in the last ten steps.
        reward: Mean over the last ten steps.
        steps: Optimisation steps that were done.
        seconds: Wall-clock time.
        cpu_seconds: CPU time of all threads.
        rewards: Mean reward of every step.
    """

    arm: str
    seed: int
    accuracy_before: float
    accuracy: float
    late_early_ratio: float
    reward: float
    steps: int
    seconds: float
    cpu_seconds: float
    threads: int
    versions: dict[str, str]
    rewards: list[float]
