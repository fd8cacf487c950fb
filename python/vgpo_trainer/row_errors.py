"""A row that cannot be read, or that the processor or the model refuses, ends a run in one line that names it.

Batches fail as a whole: datasets read several rows at once, processors and models take all prompts of a generation
batch together, and what they say does not tell which one is to blame. So after a failure the rows are tried one by one.
Nothing here runs the model, whose passes are shared by all processes where it is sharded.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages

from vgpo_trainer.data import DatasetError
from vgpo_trainer.generation_batch import RowError, row_name
from vgpo_trainer.rollouts import column_images, has_video
from vgpo_trainer.runs.writing import RunFailure, first_line
from vgpo_trainer.signals.reader import find_visual_tokens
from vgpo_trainer.videos import decoding, in_messages

# Functions in which a generation batch is read, made into tokens, and passed; what a user's own code does is no row's.
CHECKS = {"_number_groups", "generation_videos"}
TOKENS = {"_tokenize_prompts", "prepare_multimodal_messages", "apply_chat_template"}
PASSES = {"_generate_single_turn", "_get_per_token_logps_and_entropies"}
USERS = {"_calculate_rewards", "_tool_call_loop"}


@dataclass(frozen=True)
class UnreadRow:
    """Stands in a batch for a row that could not be read, also where another process reads the dataset.

    Attributes:
        name: Of the row.
        error: What reading it raised.
    """

    name: str
    error: Exception

    def failure(self) -> RunFailure:
        """Return what ends the run."""
        if isinstance(self.error, DatasetError):
            return RunFailure(first_line(self.error))
        return RunFailure(f"{self.name} cannot be read: {reason(self.error)}")


class ReadRows(Dataset[Any]):
    """A dataset with places, in which a row that cannot be read is an :class:`UnreadRow`.

    Args:
        rows: The dataset: of the Hugging Face library, or anything that has a length and takes an index.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """Read a row."""
        try:
            return self.rows[index]
        except Exception as error:
            return UnreadRow(self._name(index), _portable(error))

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Read rows, all at once where they can be."""
        if not hasattr(self.rows, "__getitems__"):
            return [self[index] for index in indices]
        try:
            return list(self.rows.__getitems__(indices))
        except Exception:
            return [self[index] for index in indices]

    def _name(self, index: int) -> str:
        try:
            return str(self.rows.select_columns(["row"])[index]["row"])
        except Exception:  # no such column, or no dataset of columns
            return f"row {index} of the dataset"


def _portable(error: Exception) -> Exception:
    """Return an error that survives its way from another process: one that does not would stop the loader."""
    return error if get_worker_info() is None or isinstance(error, DatasetError) else RuntimeError(reason(error))


def readable(dataset: Any) -> Any:
    """Return a dataset whose rows say so where they cannot be read; a stream stays as it is."""
    return dataset if isinstance(dataset, IterableDataset) else ReadRows(dataset)


def refuse_unread(rows: Sequence[Any]) -> None:
    """Raise RunFailure for the first row of a batch that could not be read."""
    for row in rows:
        if isinstance(row, UnreadRow):
            raise row.failure() from row.error


@contextmanager
def reading(kind: type[Exception] = Exception) -> Iterator[None]:
    """Turn what reading a stream raises in the block into a :class:`RunFailure`; by default every error is of that."""
    try:
        yield
    except RunFailure:
        raise
    except kind as error:
        raise UnreadRow("a row of the dataset", error).failure() from error


def reason(error: Exception) -> str:
    """The first line of what an error says, with its kind where that line alone says little."""
    told = first_line(error)
    bare = isinstance(error, (LookupError, AttributeError, AssertionError))
    return f"{type(error).__name__}: {told}" if bare else told


@contextmanager
def naming_rows(trainer: GRPOTrainer, rows: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Turn what goes wrong with a row while a generation batch is made into a :class:`RunFailure` that names the row.

    Errors of reward functions, tools and environments, and those that no row is to blame for, pass as they are.

    Args:
        trainer: Whose batch it is, after it was set up.
        rows: Of this process, in the order in which they are processed.
    """
    try:
        yield
    except RunFailure:
        raise
    except Exception as error:
        found = _blamed(trainer, rows, error)
        if found is None:
            raise
        index, told = found
        process = trainer.accelerator.process_index if trainer.accelerator.num_processes > 1 else None
        name = "" if index is None else f"{row_name(rows[index], index, process)}: "
        raise RunFailure(f"{name}{told}") from error


def _blamed(trainer: GRPOTrainer, rows: Sequence[Mapping[str, Any]], error: Exception) -> tuple[int | None, str] | None:
    """Return the row to blame, if it is one, and what is wrong; ``None`` where it is not the rows."""
    if isinstance(error, RowError):
        return error.index, first_line(error)
    stages = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    if stages & USERS or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return None
    if stages & CHECKS:
        return None, reason(error)
    if not stages & (TOKENS | PASSES) or trainer.environment_factories is not None:
        return None
    tokens = []
    for index, row in enumerate(rows):
        try:
            tokens.append(_tokens(trainer, row))
        except Exception as own:
            return index, reason(own)
    if not stages & PASSES:
        return None, f"rows of a generation batch cannot be processed together, though each can alone: {reason(error)}"
    for index, row in enumerate(rows):
        if written := _written_tokens(trainer, row):
            return index, f"its text has {written}, which stands for what an image shows: {reason(error)}"
    limit, length = context_length(trainer), trainer.max_completion_length
    beyond = isinstance(error, IndexError) or "device-side assert" in str(error)
    for index, ids in enumerate(tokens):
        if beyond and limit is not None and len(ids) + length > limit:
            told = f"its prompt has {len(ids)} tokens, which with max_completion_length={length} is more than the model"
            return index, f"{told} takes (max_position_embeddings={limit})"
    return None


def _tokens(trainer: GRPOTrainer, row: Mapping[str, Any]) -> list[int]:
    """Return the prompt of a row as the processor makes tokens of it."""
    prompt, images = row["prompt"], column_images(row)
    if has_video(row):
        prompt, _ = in_messages(row)
    elif images:
        prompt = prepare_multimodal_messages(prompt, images=images)
    with decoding(trainer.processing_class):
        found: list[int] = GRPOTrainer._tokenize_prompts(trainer, [prompt])[0][0]
    return found


def _written_tokens(trainer: GRPOTrainer, row: Mapping[str, Any]) -> str:
    """Return a token of the model's images that a row's text itself holds; nothing, where there is none."""
    tokenizer, prompt = _tokenizer(trainer), row["prompt"]
    messages = [{"content": prompt}] if isinstance(prompt, str) else prompt
    for message in messages:
        content = message.get("content") or ""
        texts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
        held = {token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]}
        for token in _visual_tokens(trainer):
            if token in held:
                return str(tokenizer.convert_ids_to_tokens(token))
    return ""


@contextmanager
def naming_placeholders(trainer: GRPOTrainer, responses: Tensor) -> Iterator[None]:
    """Say so where a pass fails because the policy itself sampled a token that stands for what an image shows.

    Args:
        trainer: Whose policy it is.
        responses: Token ids of the rows that pass, ``[B, T]``.

    Raises:
        RunFailure: That, in place of the model's complaint about features and tokens that do not match.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        said = [token for token in _visual_tokens(trainer) if (responses == token).any()]
        if "do not match" not in str(error) or not said:
            raise
        name = _tokenizer(trainer).convert_ids_to_tokens(said[0])
        kept = {"suppress_tokens": list(_visual_tokens(trainer))}  # in JSON, as a command line has it
        raise RunFailure(
            f"the policy said {name}, which stands for what an image or a video shows, so the response cannot be "
            f"passed: {reason(error)}; generation_kwargs={json.dumps(kept)} keeps it from that"
        ) from error


def _visual_tokens(trainer: GRPOTrainer) -> tuple[int, ...]:
    try:
        return find_visual_tokens(None, trainer.model, trainer.processing_class)
    except ValueError:
        return ()


def _tokenizer(trainer: GRPOTrainer) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def context_length(trainer: GRPOTrainer) -> int | None:
    """Return how many tokens the model has positions for, where each token takes one.

    Models that count positions by grids give an image fewer than it has tokens; of those ``None``.
    """
    config = trainer.model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 and "mrope_section" not in parameters else None


def check_lengths(trainer: GRPOTrainer, prompts: Sequence[Sequence[int]]) -> None:
    """Raise RowError for the first prompt that leaves the model no position for a response.

    Args:
        trainer: Whose model it is.
        prompts: Token ids of each row's prompt.
    """
    limit = context_length(trainer)
    for index, ids in enumerate(prompts):
        if limit is not None and len(ids) >= limit:
            raise RowError(
                index,
                f"its prompt has {len(ids)} tokens, with those of its images, and the model takes fewer than {limit} "
                "(max_position_embeddings): make the images smaller or the text shorter",
            )
