"""Checkpoints and other large files of a run: which are whole, and one line that names the file where one is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vgpo_trainer.runs.writing import first_line, writing

STATE = "trainer_state.json"  # written last, so a checkpoint that has it was not cut short
WRITTEN_FOR_PEOPLE = ("training_args.bin",)  # a pickle that no run reads


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file."""


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
            raise CheckpointError(f"{path} is damaged, or not what its name says: {first_line(error)}") from error


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
