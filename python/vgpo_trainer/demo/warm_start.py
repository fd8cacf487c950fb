"""The supervised start of the demo: enough imitation that reinforcement has something to reinforce.

An untrained model never stumbles on a right answer, so nothing could be learned from rewards. The warm start shows it
worked solutions until it solves two in five of the *training* problems, and stops there on purpose.

The package ships the result, so that the demo spends its minutes on reinforcement learning. This makes it again::

    python -m vgpo_trainer.demo.warm_start --out python/vgpo_trainer/demo/assets/digits-warm-start
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgpo_trainer.demo.digits import Problem, make_problem, make_problems
from vgpo_trainer.demo.evaluation import encode_prompts, evaluate
from vgpo_trainer.demo.tiny_vlm import build_model, build_processor
from vgpo_trainer.runs.terminal import without_bars

SHIPPED = Path(__file__).parent / "assets" / "digits-warm-start"
RISE_STEPS = 30  # over which the learning rate rises
CHECK_SEED = 1_000_003  # of the problems that decide when to stop; no other seed of the project comes near


@dataclass(frozen=True)
class WarmStartSettings:
    """How long and how fast to imitate.

    Attributes:
        target: Settle when this share of training problems is solved, 0 to 1.
        max_steps: Settle here even if the target was not reached.
        settle_steps: Steps at the end over which the learning rate falls to zero; 0 stops at once.
        batch_size: Worked solutions a step.
        learning_rate: AdamW's, after a short linear rise.
        check_every: Steps between two looks at the target.
        check_problems: Training problems a look.
    """

    target: float = 0.4
    max_steps: int = 800
    settle_steps: int = 0
    batch_size: int = 64
    learning_rate: float = 1e-3
    check_every: int = 20
    check_problems: int = 256


@dataclass(frozen=True)
class WarmStartProgress:
    """Where a warm start is: the step it finished, its loss, and the accuracy if it just looked (else None)."""

    step: int
    loss: float
    accuracy: float | None


def imitation_batch(processor: Any, problems: list[Problem]) -> dict[str, Tensor]:
    """Prompts with their worked solutions, and labels that score the solutions only.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` ``[B, S]`` int64 (padded on the right, labels -100 off the
        solutions) and ``pixel_values``.
    """
    tokenizer = processor.tokenizer
    inputs = encode_prompts(processor, problems)
    solutions = tokenizer(
        [problem.solution + tokenizer.eos_token for problem in problems],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    labels = solutions["input_ids"].masked_fill(solutions["attention_mask"] == 0, -100)
    return {
        "input_ids": torch.cat([inputs["input_ids"], solutions["input_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], solutions["attention_mask"]], dim=1),
        "labels": torch.cat([torch.full_like(inputs["input_ids"], -100), labels], dim=1),
        "pixel_values": inputs["pixel_values"],
    }


def warm_start(
    model: Any,
    processor: Any,
    seed: int,
    settings: WarmStartSettings | None = None,
    on_step: Callable[[WarmStartProgress], None] | None = None,
) -> float:
    """Train a model in place by imitation and return the share of training problems it solves at the end.

    Args:
        model: From :func:`~vgpo_trainer.demo.tiny_vlm.build_model`.
        processor: Its processor.
        seed: Of the problems drawn.
        settings: Defaults to :class:`WarmStartSettings`.
        on_step: Called after every step.
    """
    settings = settings or WarmStartSettings()
    rng = np.random.default_rng([seed, 2])
    check = make_problems(settings.check_problems, "train", CHECK_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    last = settings.max_steps + settings.settle_steps
    accuracy, step = 0.0, 0
    model.train()
    while step < last:
        step += 1
        settling = max(0, step - last + settings.settle_steps)
        share = min(1.0, step / RISE_STEPS) * (1 - settling / (settings.settle_steps + 1))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * share
        problems = [make_problem(rng, "train") for _ in range(settings.batch_size)]
        loss = model(**imitation_batch(processor, problems)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        looks = step == last or (not settling and step % settings.check_every == 0)
        if looks:
            accuracy = evaluate(model, processor, check).accuracy
        if looks and not settling and accuracy >= settings.target:
            last = step + settings.settle_steps
        if on_step is not None:
            on_step(WarmStartProgress(step, loss.item(), accuracy if looks else None))
    return accuracy


def load_checkpoint(folder: str | Path) -> tuple[Any, Any]:
    """Load a model (fp32) and its processor from a local folder, without any network.

    Raises:
        OSError: The folder does not hold a Hugging Face checkpoint.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not (Path(folder) / "config.json").is_file():
        raise OSError(f"no checkpoint in {folder}")
    local = {"local_files_only": True, "trust_remote_code": False}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **local)
    return model, AutoProcessor.from_pretrained(folder, **local)


def load_demo_model() -> tuple[Any, Any]:
    """Load the demo's model and its processor from the files of this package, without a network.

    A LLaVA of 1.3 million parameters in fp32 on the CPU that adds up handwritten digits, and solves two problems in
    five. ``make_problems`` of ``vgpo_trainer.demo.digits`` makes problems for it::

        model, processor = vgpo_trainer.load_demo_model()
        row = make_problems(1, "held_out", seed=0)[0].row()
        text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
        inputs = processor(text=text, images=row["image"], return_tensors="pt")
        answer = model.generate(**inputs)

    Returns:
        The model (``LlavaForConditionalGeneration``, in evaluation mode) and its processor (``LlavaProcessor``).

    Raises:
        ImportError: A package of ``vgpo-kernels[train]`` is missing.

    """
    with without_bars():  # five megabytes need none
        return load_checkpoint(SHIPPED)


def main() -> None:
    """Make the checkpoint that the package ships."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    processor = build_processor()
    model = build_model(processor, arguments.seed)

    def show(progress: WarmStartProgress) -> None:
        if progress.accuracy is not None:
            print(f"step {progress.step}: loss {progress.loss:.3f}, solves {progress.accuracy:.0%}", flush=True)

    warm_start(model, processor, arguments.seed, on_step=show)
    model.save_pretrained(arguments.out)
    processor.save_pretrained(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
