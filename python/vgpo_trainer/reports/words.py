"""What the report of a run says that depends on what was trained: the demo on digits, or a model on someone's data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vgpo_trainer.methods import METHODS
from vgpo_trainer.runs.card import short_name
from vgpo_trainer.signals.words import SignalWords, words_of

SETTINGS = (
    "method",
    "method_kwargs",
    "vgpo",
    "signal",
    "view",
    "view_strength",
    "view_coef",
    "loss_type",
    "beta",
    "learning_rate",
    "lr_scheduler_type",
    "num_generations",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_completion_length",
    "temperature",
    "max_steps",
    "num_train_epochs",
    "seed",
)  # of training, in the report


@dataclass(frozen=True)
class RunWords:
    """The words of a report, and what they depend on.

    Attributes:
        title: Of the page.
        introduction: What was trained on what.
        algorithm: ``"VGPO"`` or another method, or the loss of a run without one.
        weighs: Whether advantages were multiplied by the weights of a signal; else these were only looked at.
        signal: The words for the visual signal; None where it was not measured.
        reward: What the reward is, below its chart.
        accuracy: What the accuracy is, below its chart.
        answer: What stands before the right answer.
        picture: What a screen reader says instead of an image.
        demo: Whether it is the demo, whose rewards are shares of right answers, and whose digits have two kinds.
        settings: For the table at the end, in parts.
    """

    title: str
    introduction: str
    algorithm: str
    weighs: bool
    signal: SignalWords | None
    reward: str
    accuracy: str
    answer: str
    picture: str
    demo: bool
    settings: list[Mapping[str, Any]]

    @property
    def other_method(self) -> bool:
        """Whether the weights are those of another method than VGPO."""
        return self.weighs and self.algorithm != "VGPO"

    @property
    def signal_title(self) -> str:
        """The heading of the signal's chart."""
        name = "signal" if self.signal is None else self.signal.name
        return f"{name[:1].upper()}{name[1:]} along the response"


def run_words(config: Mapping[str, Any]) -> RunWords:
    """Return the words for a run whose ``config.json`` this is: of ``vgpo train`` where it has settings of training."""
    return train_words(config) if "training" in config else demo_words(config)


def demo_words(config: Mapping[str, Any]) -> RunWords:
    """Return the words for a run of ``vgpo demo`` or of its ablation."""
    settings = config.get("settings") or {}
    algorithm = str(settings.get("algo", "vgpo")).upper()
    return RunWords(
        title=f"{algorithm}, seed {settings.get('seed', '?')}: adding handwritten digits",
        introduction=(
            "A vision-language model of 1.3 million parameters reads handwritten digits from an image and adds them up "
            "step by step. Only the right sum earns a reward. Training problems and held-out problems use different "
            "scans."
        ),
        algorithm=algorithm,
        weighs=algorithm == "VGPO",
        signal=words_of("focus"),
        reward=(
            "Share of right answers among the responses sampled in each step, on training problems never seen before. "
            "The bold line is a running mean."
        ),
        accuracy="with 95% intervals. No training problem uses their scans.",
        answer="sum",
        picture="the digits to add",
        demo=True,
        settings=[config.get(part) or {} for part in ("settings", "vgpo", "versions")],
    )


def train_words(config: Mapping[str, Any]) -> RunWords:
    """Return the words for a run of ``vgpo train``."""
    run, training = config.get("run") or {}, config["training"]
    name = str(training.get("method", "vgpo"))  # runs of older versions have none
    method = METHODS.get(name, METHODS["vgpo"])
    trained = name != "vgpo" or training.get("vgpo") not in (None, "none")
    algorithm = method.title if trained else str(training.get("loss_type", "grpo")).upper()
    model, dataset = (short_name(str(run.get(name, f"a {name}"))) for name in ("model", "dataset"))
    weighs = trained and method.weighs
    measured = weighs or bool(training.get("vgpo_diagnostics"))
    # Settings that this run did not use, though they have values.
    unused = {"vgpo": name != "vgpo", "signal": not measured, "view_coef": not training.get("view_coef")}
    return RunWords(
        title=f"{algorithm}: {model} on {dataset}",
        introduction=f"The model {model}, trained with {algorithm} on the prompts of {dataset}.",
        algorithm=algorithm,
        weighs=weighs,
        signal=words_of(str(training.get("signal", "focus"))) if measured else None,
        reward="Mean reward of the responses sampled in each step. The bold line is a running mean.",
        accuracy="Share of right answers, as a reward function reports it.",
        answer="answer",
        picture="image of the prompt",
        demo=False,
        settings=[
            {"model": model, "dataset": dataset},
            {key: training[key] for key in SETTINGS if training.get(key) is not None and not unused.get(key)},
            {f"{name}: {field}": value for field, value in (config.get(name) or {}).items()},
            config.get("versions") or {},
        ],
    )
