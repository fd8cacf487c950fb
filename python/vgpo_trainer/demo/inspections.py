"""Pages of what the trained model looks at, for a few held-out examples of a demo; its report links them."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from PIL import Image

from vgpo_trainer.demo.digits import MAX_RESPONSE_TOKENS, PROMPT
from vgpo_trainer.inspection import inspect_answer
from vgpo_trainer.runs.folder import RunFolder
from vgpo_trainer.runs.writing import writing

PAGES = 4


def write_inspections(folder: RunFolder, model: Any, processor: Any, name: str) -> None:
    """Let the model answer some examples of the stored evaluation again, and write the page of each.

    Args:
        folder: Of the run, its evaluation stored.
        model: The trained model; it is left in the mode it was in.
        processor: Its processor.
        name: What to call the model.

    Raises:
        RunFailure: A page cannot be written.
    """
    training = model.training
    model.eval()
    with writing(folder.inspections):
        folder.inspections.mkdir(exist_ok=True)
    for example in choose_examples((folder.read_evaluation() or {}).get("examples", [])):
        with Image.open(folder.images / example["image"]) as image:
            inspection = inspect_answer(
                model,
                processor,
                image.convert("RGB"),
                PROMPT,
                name=name,
                image_name=f"held-out problem, sum {example['answer']}",
                max_new_tokens=MAX_RESPONSE_TOKENS,
            )
        page = folder.inspection(example["image"])
        with writing(page):
            inspection.save(page)
    model.train(training)


def choose_examples(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most ``PAGES`` examples, those that training turned right and those that it did not by turns."""
    right = [example for example in examples if example["right_after"]]
    wrong = [example for example in examples if not example["right_after"]]
    return [example for pair in zip_longest(right, wrong) for example in pair if example is not None][:PAGES]
