"""``vgpo inspect``: what a vision-language model looks at while it answers, as one HTML page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from vgpo_trainer.options.arguments import indices, positive
from vgpo_trainer.runs.writing import first_line

DESCRIPTION = "Answer a prompt about an image, and write a page that shows what each token of the answer looks at."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``vgpo inspect`` to a parser."""
    parser.add_argument("--model", required=True, metavar="ID_OR_PATH", help="vision-language model: hub id or folder")
    parser.add_argument("--image", required=True, type=Path, metavar="FILE", help="the image")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to ask about it")
    parser.add_argument(
        "--out", type=Path, default=Path("inspect.html"), metavar="FILE", help="the page (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=256, metavar="N", help="tokens of the answer (default: %(default)s)"
    )
    parser.add_argument(
        "--layers",
        type=indices,
        metavar="I,J,...",
        help="decoder layers whose attention is averaged, negative ones from the last; default: all",
    )


def run(arguments: argparse.Namespace) -> int:
    """Inspect as ``arguments`` say: 0 when done, 2 for what cannot be inspected."""
    from PIL import Image, UnidentifiedImageError

    from vgpo_trainer.inspection import InspectError, inspect_answer

    try:
        if not arguments.out.parent.is_dir():
            raise InspectError(f"there is no folder {arguments.out.parent} to write {arguments.out.name} into")
        try:
            image = Image.open(arguments.image).convert("RGB")
        except UnidentifiedImageError as error:
            raise InspectError(f"{arguments.image} is no image that Pillow can read") from error
        model, processor = load_model(arguments.model)
        inspection = inspect_answer(
            model,
            processor,
            image,
            arguments.prompt,
            name=arguments.model,
            image_name=arguments.image.name,
            max_new_tokens=arguments.max_new_tokens,
            layers=arguments.layers,
        )
        print(inspection.save(arguments.out))
    except ModuleNotFoundError:
        raise  # told by the vgpo command, with the extra that brings it
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"vgpo inspect: {first_line(error)}", file=sys.stderr)
        return 2
    return 0


def load_model(path: str) -> tuple[Any, Any]:
    """Load a model and its processor: a folder, or an id of the hub."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vgpo_trainer.accelerators import best_device

    processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", trust_remote_code=False)
    return model.to(best_device()).eval(), processor
