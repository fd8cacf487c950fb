"""Held-out accuracy of a model on the digit task, with its 95% interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vgpo_trainer.demo.digits import MAX_RESPONSE_TOKENS, PROMPT, Problem, final_answer


@dataclass(frozen=True)
class Evaluation:
    """Greedy responses to a list of problems.

    Attributes:
        responses: One for each problem.
        correct: Whether its final answer is right.
    """

    responses: list[str]
    correct: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson score interval of the accuracy: it stays within 0 and 1, and holds its level near both."""
        from scipy.stats import binomtest

        found = binomtest(sum(self.correct), len(self.correct)).proportion_ci(method="wilson")
        return float(found.low), float(found.high)


def encode_prompts(processor: Any, problems: Sequence[Problem]) -> Any:
    """The inputs of ``model.generate`` for some problems: ids, mask and pixels as tensors."""
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": problem.image}, {"type": "text", "text": PROMPT}]}]
        for problem in problems
    ]
    return processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@torch.no_grad()
def evaluate(model: Any, processor: Any, problems: Sequence[Problem], batch_size: int = 256) -> Evaluation:
    """Let a model answer problems greedily and check the answers. The model is left in the mode it was in.

    Args:
        model: A Hugging Face image-text-to-text model.
        processor: Its processor.
        problems: At least one.
        batch_size: Problems generated together.
    """
    training = model.training
    model.eval()
    responses: list[str] = []
    for start in range(0, len(problems), batch_size):
        inputs = encode_prompts(processor, problems[start : start + batch_size]).to(model.device)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_RESPONSE_TOKENS)
        generated = output[:, inputs["input_ids"].shape[1] :]
        responses += processor.batch_decode(generated, skip_special_tokens=True)
    model.train(training)
    correct = [final_answer(response) == problem.answer for response, problem in zip(responses, problems, strict=True)]
    return Evaluation(responses, correct)
