"""Everything that decides how a demo runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EVALUATION_SEED = 2_000_003  # the held-out problems are the same for every run


@dataclass(frozen=True)
class DemoSettings:
    """The settings of a demo.

    Attributes:
        out: Folder of the run.
        algo: ``"vgpo"``, or ``"dapo"``: the same run without the visual signal in its loss.
        seed: Of the problems, of sampling, and of the weights of a fresh warm start.
        steps: Optimisation steps of reinforcement learning.
        warm_start: ``"shipped"`` starts from the checkpoint in the package, ``"fresh"`` makes one first.
        use_cpu: Train on the CPU, also where there is an accelerator.
        minutes: Reinforcement stops early where it would not end in this time.
        prompts: Problems a step.
        generations: Responses a problem.
        learning_rate: AdamW's, after a short linear rise.
        temperature: Of sampling.
        evaluate_every: Steps between two measurements of held-out accuracy.
        evaluation_problems: Held-out problems of a measurement.
        warm_start_steps: At most this many steps of a fresh warm start.
        changes: Fields of :class:`~vgpo_kernels.VGPOConfig` that are not to be the paper's.
    """

    out: str | Path
    algo: str = "vgpo"
    seed: int = 0
    steps: int = 120
    warm_start: str = "shipped"
    use_cpu: bool = False
    minutes: float = 6.0
    prompts: int = 64
    generations: int = 4
    learning_rate: float = 1e-4
    temperature: float = 1.0
    evaluate_every: int = 20
    evaluation_problems: int = 400
    warm_start_steps: int = 800
    changes: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse settings that cannot run.

        Raises:
            ValueError: Naming the option.
        """
        if self.generations < 2:
            raise ValueError(f"--generations must be at least 2 to compare responses, got {self.generations}")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning-rate must be positive, got {self.learning_rate}")
        if not self.temperature > 0:
            raise ValueError(f"--temperature must be positive, got {self.temperature}")
        if not self.minutes > 0:
            raise ValueError(f"--minutes must be positive, got {self.minutes}")
