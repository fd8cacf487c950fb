"""``vgpo train``: train a vision-language model with VGPO on a folder or jsonl file of images, prompts and answers.

The run folder gets ``config.json`` (every setting), ``metrics.jsonl`` (a record a step), ``checkpoint-<step>`` folders
to resume from, and ``model``, a Hugging Face checkpoint of the result. A run whose folder already has checkpoints goes
on from the last one. A loss or gradient that is not finite ends a run before it reaches a checkpoint, and leaves the
batch that made it in ``nonfinite-step-<step>.safetensors``.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgpo_trainer.commands.arguments import positive
from vgpo_trainer.runs.checkpoints import CheckpointError, check_checkpoint, checkpoints
from vgpo_trainer.runs.folder import RunFolder, RunFolderError, versions_of_a_run
from vgpo_trainer.runs.writing import RunFailure, writing
from vgpo_trainer.signals import SIGNALS, VIEWS

if TYPE_CHECKING:
    from vgpo_trainer.config import VGPOTrainingConfig
    from vgpo_trainer.trainer import VGPOTrainer

DESCRIPTION = "Train a vision-language model with VGPO on images, prompts and answers."


class RunError(ValueError):
    """A run that cannot start as asked; the message says what to change."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``vgpo train`` to a parser."""
    parser.add_argument("--model", required=True, metavar="ID_OR_PATH", help="model to train: hub id or folder")
    parser.add_argument(
        "--dataset", required=True, type=Path, metavar="PATH", help="folder with metadata.jsonl, or a jsonl file"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument("--eval-dataset", type=Path, metavar="PATH", help="held-out rows, evaluated as they are")
    parser.add_argument("--system", metavar="TEXT", help="system message put before every prompt")
    parser.add_argument(
        "--reward",
        metavar="MODULE:FUNCTION",
        help="reward function of TRL's form; default: 1 for the right answer, else 0",
    )
    parser.add_argument(
        "--vgpo", choices=("paper", "released", "none"), default="paper", help="preset of the visual signal"
    )
    parser.add_argument(
        "--signal",
        choices=tuple(SIGNALS),
        default="focus",
        help="what tokens are weighed by: %(choices)s (default: %(default)s)",
    )
    parser.add_argument(
        "--view",
        choices=VIEWS,
        default="swap",
        help="how images are spoilt for --signal dependency or view_coef: %(choices)s (default: %(default)s)",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, help="optimisation steps")
    length.add_argument("--epochs", type=float, default=1.0, help="passes over the dataset (default: %(default)s)")
    add = parser.add_argument
    add("--batch-size", type=positive, default=8, help="responses a process and micro-batch (default: %(default)s)")
    add("--accumulate", type=positive, default=1, help="micro-batches a step (default: %(default)s)")
    add("--generations", type=positive, default=8, help="responses a prompt (default: %(default)s)")
    add("--max-completion-length", type=positive, default=512, help="tokens a response (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-6, help="(default: %(default)s)")
    add("--kl", type=float, default=0.0, metavar="BETA", help="weight of the KL term (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="of sampling (default: %(default)s)")
    add("--seed", type=int, default=42, help="(default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: %(default)s)")
    add("--lora-rank", type=positive, help="train a LoRA adapter of this rank instead of all weights")
    add("--lora-alpha", type=positive, help="scale of the adapter; default: twice the rank")
    add(
        "--lora-targets",
        nargs="+",
        metavar="NAME",
        help="linear layers of the decoder that the adapter is added to, q_proj say; default: all-linear",
    )
    add("--save-every", type=positive, default=50, metavar="STEPS", help="checkpoint (default: %(default)s)")
    add("--eval-every", type=positive, default=50, metavar="STEPS", help="evaluate (default: %(default)s)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="any field of VGPOTrainingConfig, and so of TRL's GRPOConfig, e.g. --set loss_type=grpo; may be repeated",
    )
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="go on from the last checkpoint in --out; default: if there is one",
    )
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vgpo train`` and return its exit status."""
    parser = argparse.ArgumentParser(prog="vgpo train", description=DESCRIPTION)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Train as ``arguments`` say.

    Returns:
        0 when done, 1 for a run that broke off, 2 for one that cannot start, 130 when interrupted.

    """
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    from vgpo_kernels.integrations.surface import UnknownSurfaceError

    folder = RunFolder(arguments.out)
    try:
        checkpoint = checkpoint_to_resume(arguments.out, arguments.resume)
        if checkpoint is not None:
            refuse_another_run(arguments)
        trainer = build_trainer(arguments)
        if trainer.is_world_process_zero():
            write_run_config(arguments, trainer.args)
            if checkpoint is not None:
                print(f"resuming from {checkpoint}", flush=True)
    except ModuleNotFoundError:
        raise  # told by the vgpo command, with the extra that brings it
    except (OSError, ValueError, ImportError, UnknownSurfaceError, RunFailure) as error:
        print(f"vgpo train: {error}", file=sys.stderr)
        return 2
    except (SafetensorError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        print(f"vgpo train: the weights of {arguments.model} are damaged: {reason}", file=sys.stderr)
        return 2
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        with writing(folder.model):
            trainer.save_model(str(folder.model))
    except (KeyboardInterrupt, RunFailure) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        last = last_checkpoint(arguments.out)
        ending = "no checkpoint was saved" if last is None else f"the same command goes on from {last.name}"
        print(f"vgpo train: {'interrupted' if interrupted else error}; {ending}", file=sys.stderr)
        return 130 if interrupted else 1
    if trainer.is_world_process_zero():
        print(f"model: {folder.model}\nmetrics: {folder.metrics}", flush=True)
    return 0


def build_trainer(arguments: argparse.Namespace) -> VGPOTrainer:
    """Read the data and build the trainer, slow imports last.

    Raises:
        DatasetError: The dataset cannot be trained on.
        ValueError: A setting is wrong, or the dataset is smaller than a batch.

    """
    from vgpo_trainer.data import build_dataset, load_examples
    from vgpo_trainer.lora import lora_config
    from vgpo_trainer.rewards import exact_answer, load_reward

    reward = exact_answer if arguments.reward is None else load_reward(arguments.reward)
    examples = load_examples(arguments.dataset, arguments.system)
    held_out = None if arguments.eval_dataset is None else load_examples(arguments.eval_dataset, arguments.system)

    from vgpo_trainer.trainer import VGPOTrainer

    training = training_config(arguments)
    prompts = training.generation_batch_size // training.num_generations
    if len(examples) < prompts:
        raise RunError(
            f"a generation batch takes {prompts} prompts ({training.generation_batch_size} responses, "
            f"{training.num_generations} a prompt), and {arguments.dataset} has {len(examples)}: lower --batch-size or "
            "--accumulate, or raise --generations"
        )
    return VGPOTrainer(
        arguments.model,
        reward,
        training,
        build_dataset(examples),
        None if held_out is None else build_dataset(held_out),
        peft_config=lora_config(arguments),
    )


def training_config(arguments: argparse.Namespace) -> VGPOTrainingConfig:
    """Translate the options to the settings of a run."""
    import torch

    from vgpo_trainer.config import VGPOTrainingConfig

    settings: dict[str, Any] = {
        "output_dir": str(arguments.out),
        "vgpo": arguments.vgpo,
        "signal": arguments.signal,
        "view": arguments.view,
        "num_train_epochs": arguments.epochs,
        "per_device_train_batch_size": arguments.batch_size,
        "per_device_eval_batch_size": arguments.batch_size,
        "gradient_accumulation_steps": arguments.accumulate,
        "num_generations": arguments.generations,
        "max_completion_length": arguments.max_completion_length,
        "learning_rate": arguments.learning_rate,
        "beta": arguments.kl,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "model_init_kwargs": {"dtype": arguments.dtype},
        "trust_remote_code": arguments.trust_remote_code,
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "save_strategy": "steps",
        "save_steps": arguments.save_every,
        "save_total_limit": 2,
        "report_to": "none",
    }
    if arguments.steps is not None:
        settings["max_steps"] = arguments.steps
    if arguments.eval_dataset is not None:
        settings.update(eval_strategy="steps", eval_steps=arguments.eval_every)
    settings.update(parse_settings(arguments.settings))
    return VGPOTrainingConfig(**settings)


def parse_settings(assignments: Sequence[str]) -> dict[str, Any]:
    """Return ``NAME=VALUE`` assignments as settings; a value is JSON where it parses as that, else text.

    Raises:
        RunError: No ``=``, or a name that VGPOTrainingConfig does not have.

    """
    from dataclasses import fields

    from vgpo_trainer.config import VGPOTrainingConfig

    known = {setting.name for setting in fields(VGPOTrainingConfig) if setting.init}
    settings = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise RunError(f"--set takes NAME=VALUE, got {assignment!r}")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise RunError(f"--set {name}: VGPOTrainingConfig has no such field{hint}")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def last_checkpoint(out: Path) -> Path | None:
    """Return the last complete checkpoint in a run folder."""
    complete = checkpoints(out)
    return complete[-1] if complete else None


def checkpoint_to_resume(out: Path, resume: bool | None) -> Path | None:
    """Return where a run starts: at a checkpoint, or (``None``) at the beginning.

    Raises:
        RunError: ``--resume`` without a checkpoint, ``--no-resume`` where there are some, or a damaged one.

    """
    last = last_checkpoint(out)
    if resume and last is None:
        raise RunError(f"--resume: {out} has no checkpoint")
    if resume is False and last is not None:
        raise RunError(f"--no-resume: {out} already has {last.name}; choose another --out")
    if last is not None:
        try:
            check_checkpoint(last)
        except CheckpointError as error:
            earlier = checkpoints(out)[:-1]
            start = f"from {earlier[-1].name}" if earlier else "from the beginning"
            raise RunError(f"{error}; delete {last} to go on {start}") from error
    return last


def run_identity(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what makes a run the run it is; anything else may change when it is resumed."""
    return {
        "model": arguments.model,
        "dataset": str(arguments.dataset.resolve()),
        "vgpo": arguments.vgpo,
        "signal": arguments.signal,
        "view": arguments.view,
        "lora_rank": arguments.lora_rank,
    }


def refuse_another_run(arguments: argparse.Namespace) -> None:
    """Raise RunError if the run folder belongs to a run of another model, dataset or method."""
    folder = RunFolder(arguments.out)
    if not folder.config.is_file():
        return
    try:
        earlier = folder.read_config()["run"]
    except (RunFolderError, KeyError) as error:
        raise RunError(f"{folder.config} does not say which run it belongs to; choose another --out") from error
    for name, value in run_identity(arguments).items():
        if earlier.get(name, value) != value:
            option = f"--{name.replace('_', '-')}"
            raise RunError(
                f"{arguments.out} holds a run with {option} {earlier[name]}, not {value}; choose another --out"
            )


def write_run_config(arguments: argparse.Namespace, training: VGPOTrainingConfig) -> None:
    """Write every setting of a run to its folder."""
    from dataclasses import asdict

    config = training.vgpo_config()
    content = {
        "run": run_identity(arguments),
        "arguments": {name: value for name, value in vars(arguments).items() if not callable(value)},
        "vgpo": None if config is None else asdict(config),
        "training": training.to_dict(),
        "versions": versions_of_a_run(),
    }
    folder = RunFolder(arguments.out)
    with writing(folder.config):
        folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_config(content)


if __name__ == "__main__":
    sys.exit(main())
