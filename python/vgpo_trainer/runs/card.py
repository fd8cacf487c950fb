"""The model card of a trained model: ``README.md`` with the metadata that the Hugging Face hub reads.

It says what was trained on what, how and with which numbers, and by which command. It is made from the trainer and from
``metrics.jsonl``; :class:`RunFacts` adds what these do not know. No absolute path of the machine and no secret is in
it, and what is somebody's text is escaped.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer

from vgpo_trainer.config import VGPOTrainingConfig
from vgpo_trainer.methods import METHODS, Method
from vgpo_trainer.runs.folder import version_of
from vgpo_trainer.runs.metrics import evaluations, first_and_last, read_metrics, seconds_of, write_time
from vgpo_trainer.runs.writing import write_atomically, writing
from vgpo_trainer.signals.words import words_of

TRL = "https://github.com/huggingface/trl"
PACKAGES = ("vgpo-kernels", "torch", "transformers", "trl", "peft", "datasets")

# Settings that say nothing about what was trained: places, logs, uploads, and what others are worked out from.
_BESIDE_THE_POINT = re.compile(
    r"output_dir|run_name|project|report_to|disable_tqdm|resume_from|local_rank|full_determinism|do_|debug|"
    r"log_|logging_|save_|eval_|hub_|push_to_hub|trackio_|dataloader_|ddp_|vllm_server|vllm_group_port|num_completions|"
    r"remove_unused|use_cpu|rollout_samples|generation_batch_size|steps_per_generation|per_device_eval|accelerator_config|"
    r"signal$|vgpo$|method$|method_kwargs$|loss_type$|gradient_checkpointing$|seed$|load_best|metric_for_best|greater_is"
)
_SECRET = re.compile(r"token$|key$|secret|password", re.IGNORECASE)
_WORD = re.compile(r"[\w.+:-]*")  # no path, no address
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SNAPSHOT = re.compile(r"(?:models|datasets)--([^/]+)/snapshots/")

MEASURED = {"reward": "reward", "accuracy": "accuracy"}  # in training and in evaluation


@dataclass(frozen=True)
class RunFacts:
    """What a trainer does not know of its run.

    Attributes:
        dataset: What it was trained on: a hub id, a folder or a file.
        split: Of the dataset.
        evaluation: What it was evaluated on, likewise.
        command: What makes the run again: program and arguments.
    """

    dataset: str | None = None
    split: str | None = None
    evaluation: str | None = None
    command: Sequence[str] = ()


class WithCard(Trainer):
    """A trainer of TRL that writes our model card where TRL writes its own: with checkpoints, and before it uploads.

    Attributes:
        run_facts: What it does not know of its run, for the card.
    """

    run_facts = RunFacts()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | Iterable[str] | None = None
    ) -> None:
        """Write the card into the run's folder; on the main process only.

        Args:
            model_name: Of the model; default: that of the run's folder.
            dataset_name: Of the training data, in place of that in ``run_facts``.
            tags: For the hub, besides ours.
        """
        if self.is_world_process_zero():
            facts = self.run_facts if dataset_name is None else replace(self.run_facts, dataset=dataset_name)
            told = [tags] if isinstance(tags, str) else tags or ()
            write_card(self, self.args.output_dir, facts, name=model_name, tags=told)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        # In place of PEFT's, which names folders of this machine.
        if self.is_world_process_zero() and (folder / "README.md").is_file():
            write_card(self, folder)


def write_card(
    trainer: Trainer,
    folder: str | Path,
    facts: RunFacts | None = None,
    *,
    name: str | None = None,
    tags: Iterable[str] = (),
) -> Path:
    """Write ``README.md`` of a model and return its path; one process is to call it.

    Args:
        trainer: A :class:`~vgpo_trainer.trainer.VGPOTrainer`, training or done.
        folder: Of the saved model.
        facts: What the trainer does not know; default: its ``run_facts``.
        name: Of the model; default: that of the run's folder.
        tags: For the hub, besides ours.

    Raises:
        RunFailure: It cannot be written.
    """
    facts = facts or trainer.run_facts
    path = Path(folder) / "README.md"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, str(build_card(trainer, facts, name or run_name(trainer), tags)))
    return path


def build_card(trainer: Trainer, facts: RunFacts, name: str, tags: Iterable[str] = ()) -> ModelCard:
    """Return the card of a trainer's model."""
    args: VGPOTrainingConfig = trainer.args
    base = base_model(trainer)
    adapter = lora_settings(trainer)
    data = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        datasets=[facts.dataset] if facts.dataset is not None and is_hub_id(facts.dataset) else None,
        library_name="transformers" if adapter is None else "peft",
        model_name=name,
        pipeline_tag="image-text-to-text"
        if hasattr(trainer.processing_class, "image_processor")
        else "text-generation",
        tags=sorted({"generated_from_trainer", *trainer._tag_names, *tags, *method_tags(args)}),
    )
    used = method_of(args)
    method = f"TRL's {args.loss_type} loss" if used is None else used.title
    paper = "" if used is None else f" ([{used.paper}]({used.address}))"
    start = code(short_name(base)) if base else f"A model built in memory ({code(type(trainer.model).__name__)})"
    sections = [
        f"# {plain_text(name)}",
        f"{start}, trained with {method}{paper} by `vgpo_trainer`, which stands on [TRL]({TRL}).",
        *_numbers(trainer, args),
        *_data(trainer, facts),
        *_method(args, adapter),
    ]
    if facts.command:
        command = shown_command(facts.command)
        fence = _fence(command, least=3)
        sections += ["## The same again", f"{fence}\n{command}\n{fence}"]
    versions = ", ".join(f"{package} {found}" for package in PACKAGES if (found := _version(package)))
    sections += ["## Versions", versions, "## Citation", CITATION if used is None else _citation(used)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


CITATION = """```bibtex
@inproceedings{wang2026vgpo,
  title     = {Visually-Guided Policy Optimization for Multimodal Reasoning},
  author    = {Wang, Zengbin and Xiong, Feng and Lin, Liang and Hu, Xuecai and Wang, Yong and Wang, Yanlin and
               Zhang, Man and Chu, Xiangxiang},
  booktitle = {Proceedings of the 64th Annual Meeting of the Association for Computational Linguistics},
  pages     = {6646--6664},
  year      = {2026},
  url       = {https://arxiv.org/abs/2604.09349}
}
```"""


def method_of(args: VGPOTrainingConfig) -> Method | None:
    """Return the method that a run trains with; ``None`` where its loss is TRL's alone."""
    return None if args.method == "vgpo" and args.vgpo is None else METHODS[args.method]


def method_tags(args: VGPOTrainingConfig) -> list[str]:
    """Return the tag of a method beside VGPO, whose name all cards have."""
    return [] if args.method == "vgpo" else [args.method]


def _citation(method: Method) -> str:
    """Return what to cite: VGPO, and the paper of the method."""
    if method is METHODS["vgpo"]:
        return CITATION
    key = f"{method.title.lower()}-{method.arxiv}"
    lines = [f"  title         = {{{method.paper}}}", f"  eprint        = {{{method.arxiv}}}"]
    lines += ["  archivePrefix = {arXiv}", f"  url           = {{{method.address}}}"]
    entry = ",\n".join([f"@misc{{{key}", *lines])
    return f"```bibtex\n{entry}\n}}\n```\n\n{CITATION}"


def _numbers(trainer: Trainer, args: VGPOTrainingConfig) -> list[str]:
    """What the run began and ended with."""
    path = Path(args.output_dir) / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    signal = words_of(str(args.signal)).name if args.reads_signal() else None
    rows = []
    for key, name in {**MEASURED, "vgpo/visual_focus": signal, "completions/mean_length": "tokens a response"}.items():
        if name is not None and (found := first_and_last(records, key)) is not None:
            when = (
                f"mean of the first and of the last {found.steps} steps" if found.steps > 1 else "first and last step"
            )
            rows.append((name, f"{found.first:.4g}", f"{found.last:.4g}", when))
    for key, name in MEASURED.items():
        if measured := evaluations(records, key):
            (before, first), (after, last) = measured[0], measured[-1]
            when = f"after step {before} and after step {after}" if len(measured) > 1 else f"after step {after} only"
            rows.append((f"held-out {name}", f"{first:.4g}" if len(measured) > 1 else "", f"{last:.4g}", when))
    steps = trainer.state.global_step
    spent = f"{steps} step{'' if steps == 1 else 's'} in {write_time(seconds_of(records))} on {device(trainer)}."
    head = "| | first | last | |\n|---|---|---|---|\n"
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return ["## Numbers", *([head + table] if rows else []), spent]


def _data(trainer: Trainer, facts: RunFacts) -> list[str]:
    """What it was trained and evaluated on."""
    lines = []
    for what, place, split, rows in (
        ("Training", facts.dataset, facts.split, trainer.train_dataset),
        ("Evaluation", facts.evaluation, None, trainer.eval_dataset),
    ):
        if place is None and rows is None:
            continue
        parts = ["a dataset in memory" if place is None else _linked(place)]
        parts += [] if split is None else [f"split {code(split)}"]
        parts += [f"{len(rows):,} rows"] if hasattr(rows, "__len__") and not isinstance(rows, Mapping) else []
        lines.append(f"- {what}: {', '.join(parts)}")
    return ["## Data", "\n".join(lines)] if lines else []


def _method(args: VGPOTrainingConfig, adapter: str | None) -> list[str]:
    """How it was trained: the method in sentences, and every setting that is not the default."""
    lines = [f"- Loss: {code(args.loss_type)}, seed {args.seed}"]
    if not args.weighs():
        lines += [f"- Method: {METHODS[args.method].title}"] if args.method != "vgpo" else []
        lines.append("- Visual signal: not in the loss")
    elif args.method != "vgpo":
        told = args.method_kwargs if isinstance(args.method_kwargs, dict) else {}
        changed = ", ".join(f"{code(name)} {code(value)}" for name, value in told.items())
        lines.append(f"- Method: {METHODS[args.method].title}{f', with {changed}' if changed else ''}")
        lines.append(f"- Visual signal: {code(args.signal)}. {words_of(str(args.signal)).explanation}")
    else:
        changes = {setting.name: getattr(args, setting.name) for setting in fields(args)}
        changes = {name: value for name, value in changes.items() if name.startswith("vgpo_") and name in _OF_PRESET}
        told = ", ".join(f"{code(name)} {code(value)}" for name, value in changes.items() if value is not None)
        lines.append(f"- VGPO: preset {code(args.vgpo)}{f', with {told}' if told else ''}")
        lines.append(f"- Visual signal: {code(args.signal)}. {words_of(str(args.signal)).explanation}")
    if args.passes_views():
        strength = "" if args.view_strength is None else f", strength {args.view_strength}"
        term = f"; its term of the loss has weight {args.view_coef}, {args.view_estimator}" if args.view_coef else ""
        lines.append(f"- Spoilt view of the image: {code(args.view)}{strength}{term}")
    lines.append(f"- Trained weights: {'all' if adapter is None else adapter}")
    rows = "\n".join(f"| {code(name)} | {code(value)} |" for name, value in changed_settings(args).items())
    table = f"Settings of `VGPOTrainingConfig` that are not its defaults:\n\n| setting | value |\n|---|---|\n{rows}"
    return ["## Method", "\n".join(lines), *([table] if rows else [])]


_OF_PRESET = {
    setting.name
    for setting in fields(VGPOTrainingConfig)
    if setting.name.startswith("vgpo_") and setting.default is None
}


def changed_settings(args: VGPOTrainingConfig) -> dict[str, Any]:
    """Return the settings that differ from their defaults and say how a model was trained.

    Only numbers, words, and lists and tables of these: a path or an address is none.
    """
    changed, settled = {}, args.of_method()
    for name, value in args.to_dict().items():
        setting = args.__dataclass_fields__.get(name)
        if setting is None or _BESIDE_THE_POINT.match(name) or _SECRET.search(name) or name in _OF_PRESET:
            continue
        default = setting.default if setting.default_factory is MISSING else setting.default_factory()
        default = settled.get(name, default)
        if value != default and value not in ({}, [], "", None) and _is_plain(value):
            changed[name] = value
    return changed


def base_model(trainer: Trainer) -> str:
    """Return where a trainer's model came from, or nothing for one that was built in memory."""
    return str(getattr(trainer.model.config, "_name_or_path", "") or "")


def run_name(trainer: Trainer) -> str:
    """Return what to call a trainer's model: as its repository on the hub is called, or its run's folder."""
    return str(trainer.args.hub_model_id or Path(trainer.args.output_dir).absolute().name).rpartition("/")[2]


def lora_settings(trainer: Trainer) -> str | None:
    """Return the adapter of a trainer's model in words; None where all weights are trained."""
    configs = getattr(trainer.model, "peft_config", None)
    if not configs:
        return None
    config = next(iter(configs.values()))
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    targets = config.target_modules
    if isinstance(targets, str):
        listed = f"layers that match {code(targets)}"
    else:
        listed = ", ".join(code(name) for name in sorted(targets or ()))
    size = f" of rank {config.r}, alpha {config.lora_alpha}" if hasattr(config, "lora_alpha") else ""
    return f"a {plain_text(kind)} adapter{size}{f', on {listed}' if listed else ''}"


def device(trainer: Trainer) -> str:
    """Return what a trainer computes on: how many processes, and the name of their device."""
    from vgpo_trainer.accelerators import device_name

    name = device_name(trainer.accelerator.device)
    number = trainer.accelerator.num_processes
    return f"{number} x {name}" if number > 1 else name


def shown_command(command: Sequence[str]) -> str:
    """Return a command line without paths of this machine and without secrets."""
    shown, hidden = [], False
    for part in command:
        option, equals, value = part.partition("=")
        if hidden:
            shown.append("...")
        elif part.startswith("-") and equals:
            shown.append(f"{option}={'...' if _SECRET.search(option) else short_name(value)}")
        else:
            shown.append(short_name(part))
        hidden = part.startswith("-") and not equals and _SECRET.search(option) is not None
    return shlex.join(shown)


def short_name(place: str) -> str:
    """Return what to call a model or dataset: of an absolute path its last part, anything else as it is."""
    path = PurePath(os.path.expanduser(place))
    if not path.is_absolute():
        return place
    snapshot = _SNAPSHOT.search(f"{place}/")
    return snapshot.group(1).replace("--", "/") if snapshot else path.name or place


def is_hub_id(place: str) -> bool:
    """Whether a name is that of a repository on the hub, as far as its form and this machine's files tell."""
    return _HUB_ID.fullmatch(place) is not None and not Path(place).exists()


def code(value: Any) -> str:
    """Return a value as Markdown's code, in one line and fit for a table; it cannot end the code."""
    text = " ".join((value if isinstance(value, str) else json.dumps(value, default=str)).split())
    text = text.replace("|", "\\|")
    fence = _fence(text, least=1)
    return f"{fence} {text} {fence}" if "`" in text or not text else f"{fence}{text}{fence}"


def plain_text(text: str) -> str:
    """Return a text in one line in which Markdown and HTML find nothing to do."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(text.split()))


def _fence(text: str, least: int) -> str:
    """Return what code can stand between: more backticks than the text has in a row."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def _linked(place: str) -> str:
    return (
        f"[{plain_text(place)}](https://huggingface.co/datasets/{place})"
        if is_hub_id(place)
        else code(short_name(place))
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) and not _SECRET.search(str(name)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return value is None or isinstance(value, (bool, int, float))


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError

    try:
        return version_of(package)
    except PackageNotFoundError:
        return None
