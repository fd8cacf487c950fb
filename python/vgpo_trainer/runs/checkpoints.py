"""Checkpoints and other large files of a run: which are whole, and one line that names the file where one is not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STATE = "trainer_state.json"  # written last, so a checkpoint that has it was not cut short
WRITTEN_FOR_PEOPLE = ("training_args.bin",)  # a pickle that no run reads


class RunFailure(RuntimeError):
    """A run that broke off; the message says why, and names the file that is to blame or that holds the evidence."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong while a file or folder is written into a :class:`RunFailure` that names it.

    A full disk shows in as many ways as there are libraries that write: an OSError without a name, safetensors' own
    error, and from PyTorch's archives a RuntimeError about a position.
    """
    try:
        yield
    except OSError as error:
        raise RunFailure(f"cannot write {error.filename or path}: {error.strerror or error}") from error
    except Exception as error:
        reason = _first_line(error)
        if type(error).__name__ == "SafetensorError":  # by its name, so that writing text waits for no library
            raise RunFailure(f"cannot write {path}: {reason}") from error
        if "inline_container" not in reason and "PytorchStreamWriter" not in reason:
            raise
        raise RunFailure(f"cannot write {path}, is the disk full? {reason}") from error


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints in a run folder, by step; one that was cut short while it was written is left out."""
    steps = {}
    for folder in out.glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdigit() and _is_json(folder / STATE):
            steps[int(number)] = folder
    return [steps[step] for step in sorted(steps)]


def check_checkpoint(folder: Path) -> None:
    """Read the frame of every file of a checkpoint, and the whole of those that are small.

    Nothing that a file could bring along is run: weights are safetensors, states are loaded as weights only.

    Raises:
        CheckpointError: A file is cut short, is something else than its name says, or must not be read.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers.trainer_pt_utils import safe_globals

    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix in (".pt", ".pth", ".bin") and path.name not in WRITTEN_FOR_PEOPLE:
                with safe_globals():
                    torch.load(path, map_location="cpu", weights_only=True, mmap=path.suffix != ".pth")
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        except Exception as error:  # a truncated archive is a RuntimeError, a pickle anything that it runs into
            raise CheckpointError(f"{path} is damaged, or not what its name says: {_first_line(error)}") from error


def store_batch(path: Path, batch: Mapping[str, Any], reason: str) -> None:
    """Write the tensors of a training batch as safetensors, with the reason as metadata; what is no tensor is left out.

    Raises:
        RunFailure: It cannot be written.
    """
    import torch
    from safetensors.torch import save_file

    # Clones, because safetensors refuses tensors that share memory.
    tensors = {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"reason": reason})


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
