"""``vgpo train``: train a vision-language model with VGPO on a dataset of images, prompts and answers.

The run folder gets ``config.json`` (every setting; ``--config`` reads it back), ``metrics.jsonl`` (a record a step),
``checkpoint-<step>`` folders to resume from, and ``model``, a Hugging Face checkpoint of the result. A run whose folder
already has checkpoints goes on from the last one; one that is finished stays as it is. A loss or gradient that is not
finite ends a run before it reaches a checkpoint, and leaves the batch that made it in
``nonfinite-step-<step>.safetensors``.
"""

from __future__ import annotations

import atexit
import os
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgpo_trainer.runs.folder import RunFolder, versions_of_a_run
from vgpo_trainer.runs.processes import complain, is_first
from vgpo_trainer.runs.writing import RunFailure, writing

if TYPE_CHECKING:
    from vgpo_trainer.options.parser import Options
    from vgpo_trainer.trainer import VGPOTrainer

DESCRIPTION = "Train a vision-language model with VGPO on images, prompts and answers."


class RunError(ValueError):
    """A run that cannot start as asked; the message says what to change."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train as a command line says.

    Returns:
        0 when done, 1 for a run that broke off, 2 for one that cannot start, 130 when interrupted.

    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or "-h" in argv or "--help" in argv:
        from vgpo_trainer.options.help import help_parser

        help_parser().print_help()
        return 0
    if not sys.stderr.isatty():  # bars would fill a log
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"

    from pickle import UnpicklingError

    from safetensors import SafetensorError

    from vgpo_kernels.integrations.surface import UnknownSurfaceError
    from vgpo_trainer.options.parser import parse_options

    model = ""
    try:
        options = parse_options(argv)
        model = options.model.model_name_or_path or ""
        run = prepare(options, argv)
    except ModuleNotFoundError:
        raise  # told by the vgpo command, with the extra that brings it
    except (OSError, ValueError, TypeError, NotImplementedError, ImportError, UnknownSurfaceError, RunFailure) as error:
        complain(f"vgpo train: {one_line(error)}")
        return 2
    except (SafetensorError, UnpicklingError) as error:
        complain(f"vgpo train: the weights of {model} are damaged: {one_line(error)}")
        return 2
    return 0 if run is None else run.train()


def prepare(options: Options, argv: Sequence[str] = ()) -> Run | None:
    """Read the data and build the trainer, slow imports last; ``None`` for a run that is finished already.

    Args:
        options: Of the run.
        argv: The command line that gave them, for the model card.

    Raises:
        RunError: The run cannot start as asked.
        ValueError: A setting is wrong, the dataset cannot be trained on, or the folder holds something else.

    """
    from vgpo_trainer.runs.resume import (
        ResumeError,
        checkpoint_to_resume,
        earlier_run,
        is_complete,
        progress_of,
        refuse_another_run,
    )

    training, model = options.training, options.model
    for name, given in (("model", model.model_name_or_path), ("dataset", options.own.dataset)):
        if not given:
            raise RunError(f"--{name} ID_OR_PATH is missing")
    folder = RunFolder(training.output_dir)
    earlier = earlier_run(folder, str(model.model_name_or_path))
    if earlier is not None:
        refuse_another_run(folder, earlier, run_identity(options))
    checkpoint = checkpoint_to_resume(folder, options.own.resume)
    finished = (earlier or {}).get("finished")
    if finished is not None and folder.model.is_dir() and is_complete(finished, training):
        if is_first():
            steps = finished["global_step"]
            print(f"{folder.path} is finished, after {steps} steps: more --steps or --epochs go on from there")
        return None
    if checkpoint is None and finished is not None:
        raise ResumeError(f"{folder.path} holds a finished run without a checkpoint; choose another --out")
    if is_first() and training.max_steps > 0 and "num_train_epochs" in options.given:
        both = f"--steps {training.max_steps} --epochs {training.num_train_epochs:g}"
        print(f"{both}: steps go before epochs, and the run ends after {training.max_steps} steps", file=sys.stderr)
    trainer = build_trainer(options)

    from vgpo_trainer.runs.card import RunFacts

    complete = checkpoint is not None and is_complete(progress_of(checkpoint), training)
    run = Run(options, folder, trainer, checkpoint, complete)
    own = options.own
    trainer.run_facts = RunFacts(
        dataset=own.dataset,
        split=own.split,
        evaluation=(own.eval_dataset or own.dataset) if own.eval_dataset or own.eval_split else None,
        command=("vgpo", "train", *argv),
    )
    if trainer.is_world_process_zero():
        run.lock()
        run.write_config()
        if checkpoint is not None:
            print(f"resuming from {checkpoint}", flush=True)
    return run


def build_trainer(options: Options) -> VGPOTrainer:
    """Read the data, and build the trainer.

    Raises:
        DatasetError: The dataset cannot be trained on.
        ValueError: A setting is wrong, or the dataset is smaller than a batch.

    """
    from vgpo_trainer.data import load_rows
    from vgpo_trainer.lora import lora_config, quantization_config
    from vgpo_trainer.options.arguments import source_of, tell_skipped
    from vgpo_trainer.rewards import load_rewards, needs_answer

    own, training, model = options.own, options.training, options.model
    adapter = lora_config(model, trust_remote_code=training.trust_remote_code)
    rewards = load_rewards(own.reward or [], max_completion_length=training.max_completion_length)
    if training.reward_weights is not None and len(training.reward_weights) != len(rewards):
        raise RunError(
            f"--reward-weights has {len(training.reward_weights)} numbers for {len(rewards)} rewards: "
            f"{', '.join(reward.__name__ for reward in rewards)}"
        )
    rows = load_rows(source_of(own, needs_answer=needs_answer(rewards)))
    held_out = None
    if own.eval_dataset or own.eval_split:
        held_out = load_rows(source_of(own, needs_answer=needs_answer(rewards), held_out=True))
    if is_first():
        tell_skipped(rows.skipped)
        tell_skipped([] if held_out is None else held_out.skipped)

    from vgpo_trainer.trainer import VGPOTrainer

    refuse_few(rows.dataset, training, own.dataset)
    settings = {
        "dtype": model.dtype,
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        **(training.model_init_kwargs or {}),
    }
    training.model_init_kwargs = {name: value for name, value in settings.items() if value is not None}
    return VGPOTrainer(
        str(model.model_name_or_path),
        rewards,
        training,
        rows.dataset,
        None if held_out is None else held_out.dataset,
        quantization_config=quantization_config(model),
        peft_config=adapter,
    )


def refuse_few(dataset: Any, training: Any, name: str) -> None:
    """Raise RunError for a dataset smaller than a batch, or one without an end where no steps are asked for."""
    if not hasattr(dataset, "__len__"):
        if training.max_steps <= 0:
            raise RunError("--streaming has no end that is known: say how long to train with --steps")
        return
    prompts = training.generation_batch_size // training.num_generations
    if len(dataset) < prompts:
        raise RunError(
            f"a generation batch takes {prompts} prompts ({training.generation_batch_size} responses, "
            f"{training.num_generations} a prompt), and {name} has {len(dataset)}: lower --batch-size or "
            "--accumulate, or raise --generations"
        )


@dataclass
class Run:
    """A run that is ready to train.

    Attributes:
        options: What it was asked for with.
        folder: Where it writes.
        trainer: What trains.
        checkpoint: Where it starts; ``None`` for the beginning.
        complete: Whether the checkpoint is that of its last step, so that only the model is to be written.
    """

    options: Options
    folder: RunFolder
    trainer: VGPOTrainer
    checkpoint: Path | None
    complete: bool
    _lock: Any = None

    def train(self) -> int:
        """Train, and write what comes of it.

        Returns:
            0 when done, 1 for a run that broke off, 130 when interrupted.
        """
        import torch

        from vgpo_trainer.data import DatasetError
        from vgpo_trainer.runs.checkpoints import checkpoints

        try:
            self._train()
        except (KeyboardInterrupt, RunFailure, DatasetError, torch.OutOfMemoryError) as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            complete = checkpoints(self.folder.path)
            ending = f"the same command goes on from {complete[-1].name}" if complete else "no checkpoint was saved"
            if isinstance(error, torch.OutOfMemoryError):
                ending = f"a smaller --batch-size with more --accumulate takes less; {ending}"
            complain(f"vgpo train: {'interrupted' if interrupted else one_line(error)}; {ending}")
            return 130 if interrupted else 1
        except Exception as error:  # of libraries, or a defect of ours: somebody will want to see where
            path = self.folder.path / f"error-{os.environ.get('RANK', '0')}.txt"
            with suppress(OSError):
                path.write_text(traceback.format_exc())
            complain(f"vgpo train: {type(error).__name__}: {one_line(error)}; the traceback is in {path}")
            return 1
        finally:
            if self._lock is not None:
                self._lock.release()
        if self.trainer.is_world_process_zero():
            folder = self.folder
            print(f"model: {folder.model}", flush=True)
            if folder.metrics.is_file():
                print(f"report: {folder.report}\nmetrics: {folder.metrics}", flush=True)
        return 0

    def _train(self) -> None:
        from vgpo_trainer.reports.run import write_report
        from vgpo_trainer.runs.card import write_card
        from vgpo_trainer.runs.progress import show_progress
        from vgpo_trainer.runs.resume import AllDone, ScheduleOfNow, StopBeforeTraining
        from vgpo_trainer.runs.rollouts import RolloutFile

        trainer, folder = self.trainer, self.folder
        if self.complete:
            trainer.add_callback(StopBeforeTraining())
        else:
            trainer.add_callback(ScheduleOfNow())
            trainer.add_callback(RolloutFile(trainer, folder))
        with show_progress(trainer):
            with suppress(AllDone):
                trainer.train(resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint))
            with writing(folder.model):
                trainer.save_model(str(folder.model))
        if trainer.is_world_process_zero():
            write_card(trainer, folder.model)
            self.write_config({"global_step": trainer.state.global_step, "epoch": trainer.state.epoch})
            if folder.metrics.is_file():  # none where no step was logged
                write_report(folder)
        if trainer.args.push_to_hub:
            trainer.push_to_hub(dataset_name=self.options.own.dataset)
        if hasattr(trainer, "end"):  # since transformers 5.18; it parts the processes for good
            atexit.register(trainer.end)

    def lock(self) -> None:
        """Keep the folder to this process while it lasts.

        Raises:
            RunError: Another process has it.

        """
        from filelock import FileLock, Timeout

        with writing(self.folder.path):
            self.folder.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(f"another process is training in {self.folder.path}; choose another --out") from error

    def write_config(self, finished: Mapping[str, Any] | None = None) -> None:
        """Write every setting of the run to its folder, and how far it came once it is finished."""
        training = self.trainer.args
        config = training.shaping()
        content = {
            "run": run_identity(self.options),
            "arguments": self.options.given,
            # What the method's signal becomes weights with, under the method's name.
            "vgpo": None,
            **({} if config is None else {training.method: asdict(config)}),
            "training": training.to_dict(),
            "model": asdict(self.options.model),
            "versions": versions_of_a_run(),
        }
        self.folder.write_config(content if finished is None else {**content, "finished": dict(finished)})


def run_identity(options: Options) -> dict[str, Any]:
    """Options that make a run the run it is, by their names; anything else may change when it goes on."""
    own, training, model = options.own, options.training, options.model
    dataset = Path(own.dataset)
    return {
        "model": model.model_name_or_path,
        "dataset": str(dataset.resolve()) if dataset.exists() else own.dataset,
        "dataset-config": own.dataset_config,
        "split": own.split,
        "reward": own.reward,
        "method": training.method,
        "method-kwargs": training.method_kwargs,
        "vgpo": training.vgpo,
        "signal": training.signal,
        "view": training.view,
        "view-coef": training.view_coef,
        "loss-type": training.loss_type,
        "learning-rate": training.learning_rate,
        "lora-rank": model.lora_r if model.use_peft else None,
    }


def one_line(error: BaseException) -> str:
    """What an error says, without its line breaks, or its kind where it says nothing."""
    if isinstance(error, ImportError) and "Torchvision" in str(error):  # a page of advice, on notebooks mostly
        return "the model's processor needs torchvision, also where no row has a video: pip install torchvision"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
