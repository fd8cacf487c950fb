"""The demo: train a small vision-language model with VGPO on a laptop, and show what it learned.

A model that adds up handwritten digits two times in five (see :mod:`vgpo_trainer.demo.warm_start`) is trained with
reinforcement learning: it answers, the answers are checked, and VGPO weighs each token's advantage by how much the
token looks at the image. Held-out accuracy is measured before, during and after, on scans that no training problem
uses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from vgpo_trainer.demo.settings import EVALUATION_SEED, DemoSettings
from vgpo_trainer.runs.folder import RunFolder, versions_of_a_run
from vgpo_trainer.runs.writing import writing

# The modules of PyTorch, transformers and TRL are imported where they are used, after the display has said so.
if TYPE_CHECKING:
    from vgpo_trainer.demo.callback import Listener
    from vgpo_trainer.demo.digits import Problem
    from vgpo_trainer.demo.evaluation import Evaluation
    from vgpo_trainer.trainer import VGPOTrainer

SHOWN_EXAMPLES = 12


@dataclass(frozen=True)
class Reinforcement:
    """A run of reinforcement that has ended: its trainer, the held-out problems, and the answers to them."""

    trainer: VGPOTrainer
    problems: list[Problem]
    before: Evaluation
    after: Evaluation


@dataclass(frozen=True)
class DemoResult:
    """What a demo showed: held-out evaluations before and after, the folder, steps done and seconds taken."""

    before: Evaluation
    after: Evaluation
    folder: RunFolder
    steps: int
    seconds: float


def run_demo(settings: DemoSettings, display: Listener) -> DemoResult:
    """Run the demo into a folder that exists, and return what it showed.

    Args:
        settings: What to run.
        display: What is told as it happens.
    """
    start = time.monotonic()
    display.stage("loading PyTorch, transformers and TRL")
    folder = RunFolder(settings.out)

    def probe(when: Literal["before", "after"], model: Any, processor: Any, problems: Sequence[Problem]) -> None:
        from vgpo_trainer.demo.probes import write_probe

        display.stage(f"probing which tokens need the image, {when} training")
        write_probe(folder, when, model, processor, problems, settings)

    run = reinforce(settings, display, start, before_training=partial(probe, "before"))
    trainer = run.trainer
    probe("after", trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, run.problems)

    display.stage("writing the checkpoint and the report")
    from vgpo_trainer.demo.inspections import write_inspections
    from vgpo_trainer.reports.run import write_report

    policy = trainer.accelerator.unwrap_model(trainer.model)
    with writing(folder.model):
        policy.save_pretrained(folder.model)
        trainer.processing_class.save_pretrained(folder.model)
    store_evaluation(folder, run.problems, run.before, run.after)
    write_inspections(folder, policy, trainer.processing_class, f"model trained with {settings.algo.upper()}")
    seconds = time.monotonic() - start
    record = config_record(settings)
    record["result"] = {"seconds": round(seconds, 1), "steps": trainer.state.global_step}
    folder.write_config(record)
    write_report(folder)
    return DemoResult(run.before, run.after, folder, trainer.state.global_step, time.monotonic() - start)


def reinforce(
    settings: DemoSettings,
    display: Listener,
    start: float | None = None,
    before: Evaluation | None = None,
    before_training: Callable[[Any, Any, Sequence[Problem]], None] | None = None,
) -> Reinforcement:
    """Train into a folder that exists, with settings, metrics and rollouts as its files, and measure before and after.

    Args:
        settings: What to run.
        display: What is told as it happens.
        start: When the time of ``settings.minutes`` began, on :func:`time.monotonic`; default: now.
        before: The evaluation of the starting point, where it is known already.
        before_training: Handed the model, its processor and the held-out problems, once these are there.
    """
    start = time.monotonic() if start is None else start
    import torch

    from vgpo_trainer.demo.callback import DemoCallback
    from vgpo_trainer.demo.digits import make_problems
    from vgpo_trainer.demo.evaluation import evaluate

    silence_libraries()
    # The matrices are small: past a few threads, waiting for each other costs more than they gain.
    torch.set_num_threads(min(torch.get_num_threads(), 4))
    folder = RunFolder(settings.out)
    folder.write_config(config_record(settings))

    model, processor = starting_point(settings, display)
    held_out = make_problems(settings.evaluation_problems, "held_out", EVALUATION_SEED)
    if before is None:
        display.stage(f"measuring accuracy on {len(held_out)} held-out problems")
        before = evaluate(model, processor, held_out)
    display.evaluated(0, before)
    if before_training is not None:
        before_training(model, processor, held_out)

    trainer = build_trainer(settings, model, processor)
    # What comes after training, evaluation and report, takes about as long as what came before it.
    deadline = start + 60 * settings.minutes - max(10.0, 0.05 * 60 * settings.minutes)
    callback = DemoCallback(trainer, folder, held_out, before, settings.evaluate_every, deadline, display)
    trainer.add_callback(callback)
    display.stage(f"training with {settings.algo.upper()}")
    trainer.train()
    return Reinforcement(trainer, held_out, before, callback.latest)


def starting_point(settings: DemoSettings, display: Listener) -> tuple[Any, Any]:
    """The model and processor that reinforcement starts from: shipped, or made now."""
    from vgpo_trainer.demo.tiny_vlm import build_model, build_processor
    from vgpo_trainer.demo.warm_start import SHIPPED, WarmStartSettings, load_checkpoint, warm_start

    if settings.warm_start == "shipped":
        return load_checkpoint(SHIPPED)
    display.stage("warm start: imitating worked solutions until two in five training problems are solved")
    processor = build_processor()
    model = build_model(processor, settings.seed)
    imitation = WarmStartSettings(max_steps=settings.warm_start_steps)
    warm_start(model, processor, settings.seed, imitation, display.imitated)
    return model, processor


def build_trainer(settings: DemoSettings, model: Any, processor: Any, **changes: Any) -> VGPOTrainer:
    """The trainer of the demo: whole groups in one batch, one generation a step.

    ``changes`` are settings of :class:`~vgpo_trainer.config.VGPOTrainingConfig` that differ from the demo's.
    """
    from datasets import Dataset
    from transformers import PrinterCallback

    from vgpo_trainer.config import VGPOTrainingConfig
    from vgpo_trainer.demo.digits import exact_answer_reward, make_problems
    from vgpo_trainer.trainer import VGPOTrainer

    problems = make_problems(settings.prompts * settings.steps, "train", settings.seed)
    rows = [problem.row() for problem in problems]
    training = VGPOTrainingConfig(**{**_training(settings), **changes})
    trainer = VGPOTrainer(model, exact_answer_reward, training, Dataset.from_list(rows), processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _training(settings: DemoSettings) -> dict[str, Any]:
    """Settings of :class:`~vgpo_trainer.config.VGPOTrainingConfig`."""
    from vgpo_trainer.demo.digits import MAX_RESPONSE_TOKENS

    responses = settings.prompts * settings.generations
    return dict(
        output_dir=str(settings.out),
        vgpo="paper" if settings.algo == "vgpo" else None,
        vgpo_diagnostics=settings.algo != "vgpo",
        **{f"vgpo_{name}": value for name, value in settings.changes.items()},
        rollout_samples=responses,
        loss_type="dapo",
        epsilon_high=0.28,
        per_device_train_batch_size=responses,
        num_generations=settings.generations,
        max_completion_length=MAX_RESPONSE_TOKENS,
        temperature=settings.temperature,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=min(5, settings.steps // 4),
        max_steps=settings.steps,
        seed=settings.seed,
        use_cpu=settings.use_cpu,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def store_evaluation(folder: RunFolder, problems: Sequence[Any], before: Evaluation, after: Evaluation) -> None:
    """Write the held-out results: counts, intervals, all responses, and some problems with their image."""
    answered = list(zip(problems, before.responses, after.responses, before.correct, after.correct, strict=True))
    learned = [item for item in answered if item[4] and not item[3]]
    failing = [item for item in answered if not item[4]]
    shown = learned[: SHOWN_EXAMPLES - 4] + failing[:4]
    folder.write_evaluation(
        {
            "problems": len(answered),
            "before": {"accuracy": before.accuracy, "interval": before.interval},
            "after": {"accuracy": after.accuracy, "interval": after.interval},
            "newly_right": len(learned),
            "newly_wrong": sum(was and not now for *_, was, now in answered),
            "examples": [
                {
                    "image": folder.store_image(problem.image),
                    "answer": problem.answer,
                    "before": first,
                    "after": last,
                    "right_before": was,
                    "right_after": now,
                }
                for problem, first, last, was, now in shown
            ],
            "responses": [
                {"digits": problem.digits, "answer": problem.answer, "before": first, "after": last}
                for problem, first, last, *_ in answered
            ],
        }
    )


def config_record(settings: DemoSettings) -> dict[str, Any]:
    """What ``config.json`` says of a run."""
    from vgpo_kernels import VGPOConfig, backends

    return {
        "command": "demo",
        "settings": asdict(settings),
        "vgpo": asdict(VGPOConfig.paper(**settings.changes)) if settings.algo == "vgpo" else None,
        "versions": versions_of_a_run(),
        "backend": backends.describe()["serves"],
    }


def silence_libraries() -> None:
    """Keep progress bars and notices of the libraries out of the display; warnings and errors still show."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
