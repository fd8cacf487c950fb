"""Videos of rows: a file's path, or frames, as the processors of transformers take them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vgpo_trainer.data.errors import Unusable, shown
from vgpo_trainer.data.images import decode, image_of, is_null, path_of

DECODERS = ("torchcodec", "av")  # of which one reads video files
EXPECTED = "expected a path, the bytes of a video file, {bytes, path}, a list of frames, or a list of these"
_ENDINGS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".gif", ".ogv", ".flv", ".wmv")


def videos_of(value: Any, name: str, folders: Sequence[str], *, several: bool) -> list[Any]:
    """Return what a row's video field holds: a list of paths, bytes and lists of frames.

    Args:
        value: The field's value.
        name: The field, for messages.
        folders: Where relative paths are looked for.
        several: Whether the field holds a list of videos, as ``videos`` does. Otherwise a list is the frames of one.

    Raises:
        Unusable: It is none of these; a URL and base64 are said to be that.
    """
    if is_null(value):
        return []
    if isinstance(value, (list, tuple)):
        whole = all(isinstance(item, (str, dict)) and _is_file(item) for item in value)
        if several or whole:
            return [video_of(item, name, folders) for item in value if not is_null(item)]
    return [video_of(value, name, folders)]


def video_of(value: Any, name: str, folders: Sequence[str]) -> Any:
    """Return one video's path, bytes, or list of frames (see :func:`vgpo_trainer.data.images.image_of`)."""
    if isinstance(value, dict):
        inside = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(inside, (bytes, bytearray, str)):
            return video_of(inside, name, folders)
    elif isinstance(value, (bytes, bytearray)) and value:
        return bytes(value)
    elif isinstance(value, str) and value:
        return path_of(value, name, "video", folders)
    elif isinstance(value, (list, tuple)) and value:
        return [image_of(frame, f"a frame of {name}", folders) for frame in value]
    raise Unusable(f"{name}: {EXPECTED}, got {shown(value)}")


def check_video(video: Any) -> None:
    """Refuse a video file that does not exist, and any where nothing is installed that reads it.

    Raises:
        Unusable: With what to install.
    """
    if isinstance(video, list):
        return
    name = f"video {video}" if isinstance(video, str) else "a video's bytes"
    if isinstance(video, str) and "://" not in video and not os.path.isfile(video):
        raise Unusable(f"{name} does not exist")
    if not any(find_spec(package) for package in DECODERS):
        raise Unusable(f"{name} cannot be decoded: install {' or '.join(DECODERS)}, or give its frames as images")


def read_video(video: Any) -> Any:
    """Return what a processor takes: a path, or a list of frames, images of Pillow in RGB.

    Bytes become a file in the cache of datasets, named by its content: a processor reads frames out of files.
    """
    if isinstance(video, list):
        return [decode(frame) for frame in video]
    if isinstance(video, str):
        return video
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / "vgpo-videos"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.blake2b(video, digest_size=16).hexdigest()}.mp4"
    if not path.is_file():
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(video)
        part.replace(path)
    return str(path)


def _is_file(item: Any) -> bool:
    """Whether an item of a list is a video of its own, and not a frame."""
    path = item.get("path") if isinstance(item, dict) else item
    return isinstance(path, str) and path.lower().endswith(_ENDINGS)
