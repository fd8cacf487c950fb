"""What each method of the trainer costs: seconds a step on the model and the task of ``vgpo demo``.

``python -m benchmarks.methods --steps 8 --rounds 3`` prints the table of docs/methods.md. Every method begins with the
same weights and the same prompts, and learns so slowly that all answer alike: what differs is the cost of the method.
Methods take turns, round by round, and each counts with its fastest step. ``--clock cpu`` takes the processor time of
this process in place of the time that passes: on a machine with other work it says more.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback
from vgpo_trainer.demo.settings import DemoSettings
from vgpo_trainer.demo.training import build_trainer, silence_libraries
from vgpo_trainer.demo.warm_start import SHIPPED, load_checkpoint
from vgpo_trainer.methods import METHODS

NOTHING = "none"  # TRL's loss alone
SLOW = 1e-9  # learning rate


class Stopwatch(TrainerCallback):
    """Takes the time of every step."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.steps: list[float] = []
        self.clock = clock
        self.begin = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin a step."""
        self.begin = self.clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """End it."""
        self.steps.append(self.clock() - self.begin)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(name: str, arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Return the time of each step of a method, and of generation in it; the first step warms up and is left out."""
    model, processor = load_checkpoint(SHIPPED)
    with tempfile.TemporaryDirectory() as folder:
        told = {"use_cpu": arguments.device == "cpu", "prompts": arguments.prompts, "learning_rate": SLOW}
        settings = DemoSettings(folder, steps=arguments.steps + 1, **told)
        changes = {"vgpo": None} if name == NOTHING else {"method": name, "vgpo": "paper"}
        trainer = build_trainer(settings, model, processor, vgpo_diagnostics=False, rollout_samples=0, **changes)
        clock, generated = CLOCKS[arguments.clock], []
        watch = Stopwatch(clock)
        generate = trainer._generate

        def generating(prompts: list[Any]) -> Any:
            begin = clock()
            found = generate(prompts)
            generated.append(clock() - begin)
            return found

        trainer._generate = generating
        trainer.add_callback(watch)
        trainer.train()
    return watch.steps[1:], generated[1:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="steps of a method in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=64, help="prompts a step, of four responses each")
    parser.add_argument("--threads", type=int, help="of torch; default: as it chooses")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--device", choices=("cpu", "accelerator"), default="cpu")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    silence_libraries()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    steps: dict[str, list[float]] = {}
    generation: list[float] = []
    for _ in range(arguments.rounds):
        for name in (NOTHING, *METHODS):
            taken, generated = seconds(name, arguments)
            steps.setdefault(name, []).extend(taken)
            generation += generated
    plain, fixed = min(steps[NOTHING]), min(generation)
    print(f"{torch.get_num_threads()} threads; of {plain:.2f} s a step without a method, generation is {fixed:.2f} s")
    print("| method | seconds a step | beside none | of a step without its generation |\n|---|---|---|---|")
    for name, taken in steps.items():
        beside, trained = min(taken) / plain - 1, (min(taken) - fixed) / (plain - fixed) - 1
        print(f"| {name} | {min(taken):.3f} | {100 * beside:+.0f} % | {100 * trained:+.0f} % |")


if __name__ == "__main__":
    main()
