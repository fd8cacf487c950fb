"""Which visual signal of a model says where its answers depend on the image; no training needed.

A model answers questions about images. One pass over its answers reads every signal that a trainer could weigh tokens
by, and passes with other images say how much each token depends on the image: by the exact divergence of the two
predictions. :func:`probe_model` does all of this, :func:`probe_rollouts` the same for responses that are there already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from vgpo_kernels import VGPOConfig
from vgpo_trainer.probe.findings import GAIN_AT, Tokens, choose_examples
from vgpo_trainer.probe.gradient import gradient_efficiency
from vgpo_trainer.probe.measuring import VIEWS, measure
from vgpo_trainer.probe.record import Findings
from vgpo_trainer.probe.responses import phi_findings
from vgpo_trainer.probe.sampling import (
    ProbeError,
    Question,
    Questions,
    RolloutBatch,
    different_pictures,
    neighbours_differ,
    sample_rollouts,
)
from vgpo_trainer.probe.statistics import Resampling, gain_curve
from vgpo_trainer.probe.verdict import verdict
from vgpo_trainer.runs.folder import version_of

__all__ = [
    "Findings",
    "ProbeError",
    "ProbeSettings",
    "Question",
    "Questions",
    "RolloutBatch",
    "probe_model",
    "probe_rollouts",
]


@dataclass(frozen=True)
class ProbeSettings:
    """How to probe.

    Attributes:
        view: What the dependency is the divergence to: ``"swap"``, another row's image, ``"blank"`` or ``"noise"``.
            An image that is blank is like none that the model was trained on, and moves predictions for that alone.
        prompts: At most this many.
        generations: Responses a prompt.
        temperature: Of sampling.
        max_new_tokens: Longest response.
        batch_size: Responses of a pass.
        layers: Decoder layers whose attention is averaged, negative ones from the last; ``None``: all.
        gradient: Compare gradients of weightings, too: a backward pass for each weighting and batch.
        top: Share of the tokens that count as those with the highest dependency.
        replicates: Of the bootstrap.
        examples: Responses to show.
        seed: Of everything that is drawn.
        vgpo: What psi and phi are computed with.
    """

    view: str = "swap"
    prompts: int = 64
    generations: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 256
    batch_size: int = 16
    layers: Sequence[int] | None = None
    gradient: bool = False
    top: float = 0.2
    replicates: int = 500
    examples: int = 6
    seed: int = 0
    vgpo: VGPOConfig = field(default_factory=VGPOConfig.paper)

    def __post_init__(self) -> None:
        if self.view not in VIEWS:
            raise ValueError(f"view must be one of {', '.join(VIEWS)}, got {self.view!r}")
        if not 0 < self.top < 1:
            raise ValueError(f"top must lie between 0 and 1, got {self.top}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


def probe_model(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    settings: ProbeSettings | None = None,
    *,
    reward: Callable[..., list[float]] | None = None,
    name: str = "",
    dataset: str = "",
) -> tuple[Findings, list[Question]]:
    """Let a model answer questions and find out which of its signals say where the answers need the image.

    Args:
        model: A vision-language model of transformers whose image tokens are in its sequence. It is left in the mode
            it was in.
        processor: Its processor, with a chat template.
        questions: Questions about images, of which ``settings.prompts`` are drawn; those of text alone are left out.
        settings: By default :class:`ProbeSettings`.
        reward: A reward function of TRL's form.
        name: What to call the model.
        dataset: What to call the questions.

    Returns:
        The findings, and the questions in the order of their numbers there.

    Raises:
        ProbeError: A model that reads no images, or questions that cannot be probed with.
        ValueError: Images or attention that cannot be handled.
        TypeError: No final norm was found in the model.
    """
    settings = settings or ProbeSettings()
    drawn = np.random.default_rng(settings.seed).permutation(len(questions))[: settings.prompts]
    chosen = [questions[int(place)] for place in drawn]
    asked = neighbours_differ([question for question in chosen if question.images])
    if len(asked) < 2:
        raise ProbeError(f"a probe takes two questions with images at least, got {len(asked)}")
    if different_pictures(asked) < 2:
        raise ProbeError(
            f"all {len(asked)} questions are about the same image, and the probe exchanges the images of questions"
        )
    training = model.training
    model.eval()
    try:
        batches = sample_rollouts(
            model,
            processor,
            asked,
            generations=settings.generations,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            seed=settings.seed,
            reward=reward,
        )
        found = probe_rollouts(
            model, batches, getattr(processor, "tokenizer", processor), settings, name=name, dataset=dataset
        )
    finally:
        model.train(training)
    return found, asked


def probe_rollouts(
    model: Any,
    batches: Sequence[RolloutBatch],
    tokenizer: Any,
    settings: ProbeSettings | None = None,
    *,
    name: str = "",
    dataset: str = "",
) -> Findings:
    """Find out which signals of a model say where given responses need the image.

    Args:
        model: The model that wrote them, in inference mode.
        batches: The responses. A batch exchanges the images of its prompts, so each needs two that differ.
        tokenizer: Tells the text of a token.
        settings: By default :class:`ProbeSettings`; ``temperature`` is that of the sampling, and what only sampling
            needs is not read.
        name: What to call the model.
        dataset: What to call the prompts.

    Raises:
        ProbeError: No image token in the prompts, or a model whose divergences cannot be computed.
        ValueError: Images or attention that cannot be handled.
        TypeError: No final norm was found in the model.
    """
    settings = settings or ProbeSettings()
    measured = measure(
        model,
        batches,
        view=settings.view,
        temperature=settings.temperature,
        layers=settings.layers,
        seed=settings.seed,
    )
    if not measured.mask.any():
        raise ProbeError("no token was predicted with an image in view: the responses are empty")

    def decode(token: int) -> str:
        return str(tokenizer.decode([token]))

    tokens = Tokens(measured, settings.vgpo, top=settings.top, replicates=settings.replicates, seed=settings.seed)
    gradient = None
    if settings.gradient:
        gradient = gradient_efficiency(
            model,
            batches,
            measured,
            settings.vgpo,
            temperature=settings.temperature,
            replicates=settings.replicates,
            seed=settings.seed,
        )
    told = {key: value for key, value in vars(settings).items() if key != "vgpo"}
    rewards = measured.rewards
    found = Findings(
        model=name,
        dataset=dataset,
        settings={**told, "vgpo": asdict(settings.vgpo)},
        versions={package: version_of(package) for package in ("torch", "transformers")},
        view=settings.view,
        prompts=len(measured.groups.unique()),
        responses=len(measured.groups),
        tokens=int(measured.mask.sum()),
        length=float(measured.mask.sum(dim=1).double().mean()),
        reward=float("nan") if rewards is None else float(rewards.nanmean()),
        half=tokens.half(),
        energy=tokens.energy(),
        signals=tokens.signals(),
        views=tokens.views(settings.view),
        phi=phi_findings(
            measured,
            settings.vgpo,
            Resampling(measured.groups.numpy(), settings.replicates, settings.seed),
            np.random.default_rng([settings.seed, 3]),
        ),
        texts=tokens.texts(decode),
        gain_at=GAIN_AT.tolist(),
        gain=gain_curve(tokens.dependency, tokens.dependency, GAIN_AT),
        positions=tokens.positions(),
        seconds=dict(measured.seconds),
        gradient=gradient,
        verdict=[],
        examples=choose_examples(measured, settings.vgpo, decode, settings.examples),
    )
    return replace(found, verdict=verdict(found))
