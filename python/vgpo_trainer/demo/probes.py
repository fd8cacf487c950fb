"""Probes of the model before and after training: which signals find the tokens that need the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from vgpo_trainer.demo.digits import MAX_RESPONSE_TOKENS, PROMPT, Problem, exact_answer_reward
from vgpo_trainer.demo.settings import DemoSettings
from vgpo_trainer.probe import Findings, ProbeError, ProbeSettings, Question, probe_model
from vgpo_trainer.reports.probe import write_page
from vgpo_trainer.runs.folder import RunFolder
from vgpo_trainer.runs.writing import writing

PROMPTS = 64
BATCH_SIZE = 64


def probe_settings(settings: DemoSettings) -> ProbeSettings:
    """Return how a demo's model is probed."""
    return ProbeSettings(
        prompts=PROMPTS,
        temperature=settings.temperature,
        max_new_tokens=MAX_RESPONSE_TOKENS,
        batch_size=BATCH_SIZE,
        seed=settings.seed,
    )


def write_probe(
    folder: RunFolder,
    when: Literal["before", "after"],
    model: Any,
    processor: Any,
    problems: Sequence[Problem],
    settings: DemoSettings,
) -> Findings | None:
    """Probe a model on held-out problems and write the findings and their page.

    Args:
        folder: Of the run.
        when: Whether the model is about to be trained, or was.
        model: The model; it is left in the mode it was in.
        processor: Its processor.
        problems: Held-out problems, of which some are drawn.
        settings: Of the demo.

    Returns:
        The findings; ``None`` where there are too few problems to exchange images.
    """
    questions = [
        Question(
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": problem.image}, {"type": "text", "text": PROMPT}],
                }
            ],
            problem.answer,
        )
        for problem in problems
    ]
    name = f"model {when} training with {settings.algo.upper()}"
    try:
        found, asked = probe_model(
            model, processor, questions, probe_settings(settings), reward=exact_answer_reward, name=name
        )
    except ProbeError:
        return None
    with writing(folder.probes):
        folder.probes.mkdir(exist_ok=True)
    found.write(folder.probe(when).with_suffix(".json"))
    write_page(found, [question.images[0] for question in asked], folder.probe(when))
    return found
