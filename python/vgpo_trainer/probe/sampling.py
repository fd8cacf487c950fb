"""Answers of a model to questions about images, in batches that one more forward pass reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor

from vgpo_kernels.integrations.transformers import visual_token_ids
from vgpo_trainer.sequences import extended_inputs


class ProbeError(ValueError):
    """What keeps a model or a dataset from being probed; the message says what to change."""


@dataclass(frozen=True)
class Question:
    """A prompt about images.

    Attributes:
        messages: Chat messages, their contents lists of parts ``{"type": "text", "text": ...}`` and ``{"type":
            "image", "image": ...}`` with a picture of Pillow.
        answer: The right answer, for a reward; may be empty.
        others: Further columns of its row, for a reward function.
    """

    messages: list[dict[str, Any]]
    answer: str = ""
    others: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Question:
        """Read a row of :func:`vgpo_trainer.data.load_rows`, whose images are decoded.

        Raises:
            ProbeError: It has a video.
        """
        if row.get("videos"):
            raise ProbeError(f"{row['row']} has a video: a probe exchanges images")
        pictures = iter(row["images"])
        messages = [
            {
                "role": message["role"],
                "content": [
                    {"type": "image", "image": next(pictures)} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in row["prompt"]
        ]
        others = {name: value for name, value in row.items() if name not in ("prompt", "images", "videos", "answer")}
        return cls(messages, row["answer"] or "", others)

    @property
    def images(self) -> list[Image.Image]:
        """Its pictures, in order."""
        parts = (part for message in self.messages for part in message["content"])
        return [part["image"] for part in parts if part["type"] == "image"]


class Questions(Sequence[Question]):
    """Rows of a dataset as questions, whose images are decoded when a question is asked for.

    Args:
        rows: Of :func:`vgpo_trainer.data.load_rows`: a dataset, or a list.
    """

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    @classmethod
    def of(cls, dataset: Any, number: int, seed: int) -> Questions:
        """Questions of a dataset; of a stream, ``number`` rows drawn at random from the first thousands."""
        if hasattr(dataset, "__len__"):
            return cls(dataset)
        return cls(list(dataset.shuffle(seed=seed).take(number)))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Question: ...

    @overload
    def __getitem__(self, place: slice) -> list[Question]: ...

    def __getitem__(self, place: int | slice) -> Question | list[Question]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        return Question.of(self._rows[place])


@dataclass
class RolloutBatch:
    """Responses that one forward pass reads.

    Attributes:
        inputs: Keyword arguments of a forward pass over prompts and responses as the model's processor makes them:
            ``input_ids`` and ``attention_mask`` ``[B, S]``, ``pixel_values`` and so on.
        response_mask: True at sampled tokens, bool or integer ``[B, T]``: the last T positions.
        groups: The prompt of each response, integers ``[B]``; no other batch has them.
        rewards: ``[B]``, where they are known.
        correct: Whether an answer is right, where a reward function says so.
    """

    inputs: dict[str, Any]
    response_mask: Tensor
    groups: Tensor
    rewards: Tensor | None = None
    correct: list[bool] | None = None


def different_pictures(questions: Sequence[Question]) -> int:
    """Number of pictures, or of sets of them, that differ."""
    return len({_pixels(question) for question in questions})


def neighbours_differ(questions: Sequence[Question]) -> list[Question]:
    """Order questions so that, where it can be, those with the same pictures do not follow one another."""
    rounds: dict[Any, int] = {}
    keyed = []
    for place, question in enumerate(questions):
        key = _pixels(question)
        rounds[key] = rounds.get(key, 0) + 1
        keyed.append((rounds[key], place, question))
    return [question for _, _, question in sorted(keyed, key=lambda item: item[:2])]


def _pixels(question: Question) -> Any:
    return tuple((image.size, image.mode, image.tobytes()) for image in question.images)


def sample_rollouts(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    generations: int,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    reward: Callable[..., list[float]] | None = None,
) -> list[RolloutBatch]:
    """Sample answers, a few for each question.

    Args:
        model: A vision-language model of transformers whose image tokens are in its sequence.
        processor: Its processor, with a chat template.
        questions: At least two.
        generations: Answers to each.
        temperature: Of sampling; no token is ruled out but those that stand for images.
        max_new_tokens: Longest answer.
        batch_size: Answers at a time, rounded to whole questions, two at least: a batch exchanges its images.
        seed: Of sampling. The global random state is left as it was.
        reward: A reward function of TRL's form.

    Raises:
        ProbeError: The processor has no chat template, or the model is none that reads images.
    """
    if not getattr(processor, "chat_template", None):
        raise ProbeError("the model's processor has no chat template to put a prompt into")
    try:
        suppressed = list(visual_token_ids(model, processor))
    except ValueError as error:
        raise ProbeError(f"this is no model whose use of images can be probed: {error}") from error
    size = max(batch_size // generations, 2)
    begins = list(range(0, len(questions), size))
    if len(begins) > 1 and len(questions) - begins[-1] < 2:  # one question has no other to exchange images with
        begins.pop()
    kind = model.device.type
    with torch.random.fork_rng([model.device] if kind != "cpu" else [], device_type=kind), left_padded(processor):
        torch.manual_seed(seed)
        return [
            _sample_batch(
                model,
                processor,
                questions[begin:end],
                begin,
                generations,
                reward,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                max_new_tokens=max_new_tokens,
                suppress_tokens=suppressed,
            )
            for begin, end in zip(begins, [*begins[1:], len(questions)], strict=True)
        ]


@torch.no_grad()
def _sample_batch(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    first: int,
    generations: int,
    reward: Callable[..., list[float]] | None,
    **options: Any,
) -> RolloutBatch:
    repeated = [question for question in questions for _ in range(generations)]
    inputs = processor.apply_chat_template(
        [question.messages for question in repeated],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device)
    sequence = model.generate(**inputs, **options)
    prompt_length = inputs["input_ids"].shape[1]
    answers = sequence[:, prompt_length:]
    response_mask = until_end(answers, model.generation_config.eos_token_id)
    whole = extended_inputs(inputs, sequence)
    whole["attention_mask"] = torch.cat([inputs["attention_mask"], response_mask.to(sequence.dtype)], dim=1)
    groups = torch.arange(first, first + len(questions), device=sequence.device).repeat_interleave(generations)
    batch = RolloutBatch(whole, response_mask, groups)
    if reward is not None:
        ids = [row[mask].tolist() for row, mask in zip(answers, response_mask, strict=True)]
        batch.rewards, batch.correct = _rewards(reward, processor, repeated, ids)
    return batch


def _rewards(
    reward: Callable[..., list[float]], processor: Any, questions: Sequence[Question], ids: list[list[int]]
) -> tuple[Tensor, list[bool] | None]:
    """Call a reward function as TRL does."""
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    told: dict[str, list[Any]] = {}
    names = sorted({name for question in questions for name in question.others})
    values = reward(
        prompts=[question.messages for question in questions],
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completion_ids=ids,
        answer=[question.answer for question in questions],
        log_extra=told.__setitem__,
        log_metric=lambda name, value: None,
        **{name: [question.others.get(name) for question in questions] for name in names},
    )
    numbers = [float("nan") if value is None else float(value) for value in values]
    correct = [bool(right) for right in told["correct"]] if "correct" in told else None
    return torch.tensor(numbers, dtype=torch.float64), correct


def until_end(answers: Tensor, end: int | list[int] | None) -> Tensor:
    """Return True up to and with the first token that ends an answer, bool ``[B, T]``."""
    ends = torch.zeros_like(answers, dtype=torch.bool)
    for token in [end] if isinstance(end, int) else end or []:
        ends |= answers == token
    return ends.cumsum(dim=1) - ends.long() == 0


@contextmanager
def left_padded(processor: Any) -> Iterator[None]:
    """Pad prompts on the left in the block, so that responses begin together."""
    tokenizer = getattr(processor, "tokenizer", processor)
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side
