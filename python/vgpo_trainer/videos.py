"""Videos in rows: put into messages for generation, and handed with their rows to every pass of the policy.

TRL generates from videos in messages, and leaves them out of its training passes. Here the processor's inputs for
videos are kept by rows when the prompts become tokens. A list of them, an entry for each row, travels through TRL's
shuffling and cutting of the generation batch, and :class:`WithVideos` gives each pass those of its rows. A process that
has a row with a video does the same for the inputs of its images, which TRL would make by a call that knows no videos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import is_av_available
from transformers.utils.import_utils import is_torchcodec_usable
from transformers.video_utils import load_video
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.utils import split_pixel_values_by_grid

from vgpo_trainer.generation_batch import RowError, TRLRow
from vgpo_trainer.rollouts import column_images, column_videos, has_video
from vgpo_trainer.trl_surface import FORWARD_INPUTS

INPUTS = "video_inputs"  # what a batch keeps of its rows' videos: a dict of tensors for each row
PIXELS, GRIDS = "pixel_values_videos", "video_grid_thw"
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # a number for each token
PAYLOADS = ("video", "url", "path")  # fields of a message's part that hold a video


class Frames(np.ndarray):
    """Frames of a video ``[T, H, W, C]`` in a message.

    TRL copies the messages of every response, and gathers those of all processes for its log. A copy is the same frames
    here, and what another process gets is a text.
    """

    def __deepcopy__(self, memo: Any) -> Frames:
        """Return the same frames."""
        return self

    def __reduce__(self) -> Any:
        """Return what makes the text."""
        return str, (f"<video of {len(self)} frames>",)


class WithVideos:
    """Stands in for a model in TRL's pass: each call is of the next rows, and is given their videos.

    Args:
        model: The model, or what stands in for it.
        rows: The inputs of each row's videos, by the names of the model's arguments; empty for a row without.
    """

    def __init__(self, model: Any, rows: Sequence[Mapping[str, Tensor]]) -> None:
        self._model = model
        self._rows = rows
        self._passed = 0  # rows so far

    def __call__(self, labels: Tensor, **inputs: Any) -> Any:
        """Run the model."""
        rows = self._rows[self._passed : self._passed + labels.shape[0]]
        self._passed += labels.shape[0]
        names = dict.fromkeys(name for row in rows for name in row)
        videos = {name: torch.cat([row[name] for row in rows if name in row]) for name in names}
        return self._model(labels=labels, **inputs, **videos)


class GenerationVideos:
    """What the processor makes of a generation batch in which a row has a video.

    Args:
        rows: Of this process, as TRL takes them: with images and videos in their messages.
        move: Moves what the processor made to where the model is.

    Attributes:
        rows: The same.
        inputs: The inputs of each row's videos, once they are made.
    """

    def __init__(self, rows: list[dict[str, Any]], move: Callable[[Any], Any]) -> None:
        self.rows = rows
        self.inputs: list[dict[str, Tensor]] = []
        self._move = move
        self._images: dict[str, Any] = {}
        self._types: dict[str, list[list[int]]] = {}

    def take(self, prompts: Sequence[Any], fields: Mapping[str, Any]) -> None:
        """Keep what the processor made of the prompts beside their tokens.

        Args:
            prompts: Messages, with images and videos in their parts.
            fields: By the names of the model's arguments.

        Raises:
            RowError: They are in a layout that cannot be cut into rows.
        """
        try:
            self._take(prompts, fields)
        except ValueError as error:
            first = next(index for index, prompt in enumerate(prompts) if _count(prompt, "video"))
            raise RowError(first, f"its video cannot be trained on: {error}") from error

    def _take(self, prompts: Sequence[Any], fields: Mapping[str, Any]) -> None:
        images, videos = ([_count(prompt, kind) for prompt in prompts] for kind in ("image", "video"))
        self.inputs = [{} for _ in prompts]
        found: dict[str, Any] = {"num_images": images}
        if sum(videos) and PIXELS not in fields:
            raise ValueError(f"the processor gives no {PIXELS}, but videos in a layout that is not known")
        for name, value in fields.items():
            if name in TOKEN_TYPES:
                self._types[name] = [list(row) for row in value]
            elif "video" in name or name == "second_per_grid_ts":
                tensor = self._move(_tensor(value))
                for row, part in zip(self.inputs, _by_rows(name, tensor, fields, videos), strict=True):
                    if len(part):
                        row[name] = part
            elif name in FORWARD_INPUTS:
                found[name] = self._move(_tensor(value))
            else:
                raise ValueError(f"the processor gives {name}, which is in no layout that is known beside videos")
        if sum(images):
            tiled = {"spatial_shapes", "num_tiles"} & found.keys()
            if tiled or not isinstance(split_pixel_values_by_grid(found).get("pixel_values"), list):
                raise ValueError("the processor gives images of the batch in tiles, or padded to rows")
            self._images = found

    def others(self, shape: tuple[int, int], length: int) -> dict[str, Any]:
        """Return the batch's inputs that TRL knows, and has not made: those of images, and the types of tokens.

        Args:
            shape: Of the sequences, ``(B, S)``.
            length: Of the responses, the last of the S tokens.
        """
        types = {}
        for name, rows in self._types.items():
            padded = torch.zeros(shape, dtype=torch.long)
            for place, row in enumerate(rows):
                end = shape[1] - length
                padded[place, end - len(row) : end] = torch.tensor(row)
            types[name] = self._move(padded)
        return {**self._images, **types}


def generation_videos(trainer: GRPOTrainer, rows: Sequence[Mapping[str, Any]]) -> GenerationVideos | None:
    """Return the videos of a generation batch, ``None`` for one without.

    Args:
        trainer: Whose batch it is, after it was set up.
        rows: Of this process.

    Raises:
        RowError: A row's video cannot be trained on with this processor or these settings, has no place in the row's
            messages, or is none.
    """
    first = next((index for index, row in enumerate(rows) if has_video(row)), None)
    if first is None:
        return None
    if why := why_no_videos(trainer):
        raise RowError(first, f"it has a video, and {why}")
    placed, kinds = [], set()
    read: dict[int, Any] = {}
    for index, row in enumerate(rows):
        try:
            prompt, files = in_messages(row, read)
        except (ValueError, TypeError, OSError) as error:
            raise RowError(index, str(error)) from error
        kinds |= files
        if len(kinds) > 1:
            raise RowError(index, "its video is a file where others of the batch are frames, or the other way round")
        placed.append(PlacedRow({**row, "prompt": prompt}))
    return GenerationVideos(placed, trainer._prepare_input)


def why_no_videos(trainer: GRPOTrainer) -> str | None:
    """Return why rows of a run cannot have videos; ``None`` where they can."""
    processor = trainer.processing_class
    if getattr(processor, "video_processor", None) is None:
        return f"{type(processor).__name__} takes none: it has no video processor"
    if trainer.use_vllm:
        return "use_vllm=True generates without: GRPOTrainer hands vLLM images alone"
    if trainer.use_transformers_continuous_batching:
        return "use_transformers_continuous_batching=True generates from text alone"
    if trainer.tools or trainer.environment_factories is not None or trainer.rollout_func is not None:
        return "tools, environments and a rollout_func are not supported beside videos"
    if trainer.args.passes_views():
        coefficient = trainer.args.view_coef
        asked = f"view_coef={coefficient}" if coefficient else f"signal={trainer.args.signal!r}"
        return f"{asked} spoils images alone"
    return None


class PlacedRow(TRLRow):
    """A row whose images are in its messages already, so that TRL finds no column of them."""

    def __contains__(self, name: object) -> bool:
        """Whether TRL finds a column; none of images."""
        return name not in ("image", "images") and dict.__contains__(self, name)


@contextmanager
def decoding(processor: Any) -> Iterator[None]:
    """Let a processor read the files of videos by PyAV in the block, where torchcodec, by which it does, is missing."""
    reads = getattr(processor, "video_processor", None)
    if reads is None or is_torchcodec_usable(decode="video") or not is_av_available():
        yield
        return

    def fetch(files: Any, sample_indices_fn: Any = None) -> Any:
        if isinstance(files, list):
            return list(zip(*(fetch(file, sample_indices_fn) for file in files), strict=True))
        return load_video(files, backend="pyav", sample_indices_fn=sample_indices_fn)

    reads.fetch_videos = fetch
    try:
        yield
    finally:
        del reads.fetch_videos


def in_messages(row: Mapping[str, Any], read: dict[int, Any] | None = None) -> tuple[list[dict[str, Any]], set[bool]]:
    """Return a row's messages with its images and videos in their parts, and whether its videos are files.

    Those of the row's columns fill the parts that have none, in order; without such parts they come before the text of
    the first message of the user that is text alone, images first.

    Args:
        row: Of the dataset.
        read: Frames of videos by ``id``, while the rows that hold these are alive: one that rows share is read once.

    Raises:
        ValueError: There are more or fewer of them than places.
        TypeError: A video is none.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        raise ValueError("a video needs a prompt of chat messages, got text")
    images, videos = column_images(row), column_videos(row)
    media = [*({"type": "image"} for _ in images), *({"type": "video"} for _ in videos)]
    messages = []
    for message in prompt:
        content = message.get("content")
        if isinstance(content, str):
            media, shown = ([], media) if message["role"] == "user" else (media, [])
            content = [*shown, {"type": "text", "text": content}]
        # Tables give every part all fields, empty ones too.
        parts = [{name: value for name, value in part.items() if value is not None} for part in content or []]
        messages.append({**message, "content": parts})
    films = [part for message in messages for part in message["content"] if part.get("type") == "video"]
    places = [part for part in films if not _payload(part)]
    if len(places) != len(videos):
        raise ValueError(f"it has {len(videos)} videos, and its messages have places for {len(places)}")
    for part, video in zip(places, videos, strict=True):
        part["video"] = video
    files, known = set(), {} if read is None else read
    for part in films:
        name = _payload(part)
        video = part[name]
        if id(video) not in known:
            known[id(video)] = frames(video)
        part[name] = known[id(video)]
        files.add(isinstance(part[name], str))
    return prepare_multimodal_messages(messages, images=images), files


def frames(video: Any) -> Any:
    """Return a video as processors take it: a file's name, or :class:`Frames`.

    Args:
        video: A path or address; an array or tensor ``[T, H, W, C]`` or ``[T, C, H, W]``, or the same in lists, as
            tables keep arrays; or a list of images of one size: of PIL, their paths, or dicts of ``path`` and
            ``bytes``, as tables keep images.

    Raises:
        TypeError: It is none of these.
        ValueError: There is no such file, or frames have several sizes.
    """
    if isinstance(video, (str, Path)):
        if "://" not in str(video) and not Path(video).is_file():
            raise ValueError(f"video {video} does not exist")
        return str(video)
    if isinstance(video, (list, tuple)) and video and isinstance(video[0], (str, Path, Mapping)):
        video = [_opened(frame) for frame in video]
    if isinstance(video, (list, tuple)) and video and all(isinstance(frame, Image.Image) for frame in video):
        sizes = {frame.size for frame in video}
        if len(sizes) > 1:
            raise ValueError(f"the frames of a video must have one size, got {sorted(sizes)}")
        video = np.stack([np.asarray(frame.convert("RGB")) for frame in video])
    elif isinstance(video, Tensor):
        video = video.detach().cpu().numpy()
    elif isinstance(video, (list, tuple)) and np.ndim(video) == 4:
        video = np.asarray(video, dtype=np.uint8)
    if not isinstance(video, np.ndarray) or video.ndim != 4 or 0 in video.shape:
        shape = f" of shape {video.shape}" if isinstance(video, np.ndarray) else ""
        raise TypeError(
            "a video must be a path, frames as an array [T, H, W, C], or a list of PIL images, got a "
            f"{type(video).__name__}{shape}"
        )
    channels_first = video.shape[1] in (1, 3) and video.shape[-1] not in (1, 3)
    return np.ascontiguousarray(np.moveaxis(video, 1, -1) if channels_first else video).view(Frames)


def _opened(frame: Any) -> Image.Image:
    if isinstance(frame, Mapping):
        frame = frame.get("path") if frame.get("bytes") is None else BytesIO(frame["bytes"])
    with Image.open(frame) as image:
        return image.convert("RGB")


def _payload(part: Mapping[str, Any]) -> str:
    """Return the name of the field that holds a part's video; nothing, where none does."""
    return next((name for name in PAYLOADS if name in part), "")


def _count(prompt: Any, kind: str) -> int:
    parts = (part for message in prompt for part in message["content"])
    return sum(part["type"] == kind for part in parts)


def _tensor(value: Any) -> Tensor:
    """Return what a processor made as a tensor; without a word of the caller's, some leave lists or arrays."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return torch.stack(list(value))
    return torch.as_tensor(np.asarray(value))


def _by_rows(name: str, value: Tensor, fields: Mapping[str, Any], videos: Sequence[int]) -> list[Tensor]:
    """Cut an input of videos into rows with so many videos each."""
    entries = [1] * sum(videos)
    if name == PIXELS and GRIDS in fields:  # patches of all videos, one after another
        entries = _tensor(fields[GRIDS]).prod(-1).tolist()
    if len(value) != sum(entries) or len(entries) != sum(videos):
        raise ValueError(f"the processor gives {name} of {len(value)} entries for {sum(videos)} videos")
    ends = np.cumsum([0, *entries])[np.cumsum([0, *videos])]
    return list(torch.split(value, np.diff(ends).tolist()))
