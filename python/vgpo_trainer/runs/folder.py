"""What a run leaves behind: the files of its folder, and how they are written and read.

======================  ================================================================================
``config.json``         every setting of the run, and the versions it ran with
``metrics.jsonl``       a record a step, written by the trainer (see :mod:`vgpo_trainer.trainer`)
``evaluation.json``     held-out accuracy before and after, and every held-out response
``rollouts.jsonl``      sampled responses with their visual signal, one a line
``images/``             the images of the rollouts and of the held-out examples, PNG
``model/``              the trained model and its processor, as Hugging Face saves them
``inspect/``            pages of what the trained model looks at, of some held-out examples
``probe/``              which signals find the tokens that need the image, before and after training
``report.html``         everything above to look at
======================  ================================================================================
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from vgpo_trainer.runs.json import finite
from vgpo_trainer.runs.writing import write_atomically, writing

if TYPE_CHECKING:
    from PIL import Image

SMALL = 256  # pixels of a picture that a page shows without loss


def version_of(package: str) -> str:
    """Version of a package: torch's with its CUDA and ours of the code that runs, which metadata may not know."""
    module = {"torch": "torch", "vgpo-kernels": "vgpo_kernels"}.get(package)
    return version(package) if module is None else str(import_module(module).__version__)


def versions_of_a_run() -> dict[str, str]:
    """Versions that what a run computes depends on; rewards may depend on math-verify, where it is installed."""
    optional = ["math-verify"] if find_spec("math_verify") else []
    return {package: version_of(package) for package in ("torch", "transformers", "trl", *optional)}


@dataclass(frozen=True)
class StoredRollout:
    """A response as it is stored: :class:`~vgpo_trainer.rollouts.RolloutSample` with its image in a file.

    Attributes:
        image: File name in the run folder's ``images``, or None for a prompt without image.
        cos: Visual signal of each token, whichever it is; NaN where no image was seen yet or a token was not scored.
        factors: What each token's advantage was multiplied by; with VGPO off, what it would have been.
        correct: None where no reward function says so.
        more_images: File names of a prompt's further images, in order.
    """

    step: int
    prompt: str
    image: str | None
    answer: str | None
    tokens: list[str]
    cos: list[float]
    psi: list[float]
    factors: list[float]
    phi: float
    reward: float
    advantage: float
    late_early_ratio: float
    correct: bool | None
    more_images: list[str] = field(default_factory=list)

    @property
    def group(self) -> tuple[int, str, str | None, tuple[str, ...], str | None]:
        """What the responses to one problem of one step have in common."""
        return self.step, self.prompt, self.image, tuple(self.more_images), self.answer


class RunFolderError(ValueError):
    """A folder that cannot be used as asked; the message says which file and why."""


class RunFolder:
    """The folder of one run. What writes to it raises :class:`~vgpo_trainer.runs.writing.RunFailure` where it cannot.

    Args:
        path: It need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluation = self.path / "evaluation.json"
        self.rollouts = self.path / "rollouts.jsonl"
        self.images = self.path / "images"
        self.model = self.path / "model"
        self.inspections = self.path / "inspect"
        self.probes = self.path / "probe"
        self.report = self.path / "report.html"

    def create(self) -> None:
        """Make the folder.

        Raises:
            RunFolderError: There is something in it already, or it cannot be made.
        """
        if self.path.is_dir() and any(self.path.iterdir()):
            raise RunFolderError(f"{self.path} is not empty; choose another --out")
        try:
            self.images.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"cannot make the run folder {self.path}: {error.strerror}") from error

    def write_config(self, content: dict[str, Any]) -> None:
        """Write ``config.json``."""
        write_atomically(self.config, json.dumps(content, indent=2, default=str) + "\n")

    def read_config(self) -> dict[str, Any]:
        """Read ``config.json``.

        Raises:
            RunFolderError: It is missing or not JSON.
        """
        return self._read_object(self.config)

    def store_image(self, image: Image.Image) -> str:
        """Write an image once and return its file name."""
        name = f"{hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest()}.png"
        if not (self.images / name).exists():
            with writing(self.images / name):
                self.images.mkdir(parents=True, exist_ok=True)
                image.convert("RGB").save(self.images / name)
        return name

    def append_rollouts(self, rollouts: Iterable[StoredRollout]) -> None:
        """Append to ``rollouts.jsonl``; numbers that are not finite become null."""
        with writing(self.rollouts), self.rollouts.open("a", encoding="utf-8") as file:
            file.writelines(map(_line, rollouts))

    def keep_rollouts(self, before: int) -> None:
        """Drop the rollouts of this step and later ones from ``rollouts.jsonl``, as a run does that starts there.

        Raises:
            RunFolderError: A line is not a rollout.
            RunFailure: The file cannot be written.
        """
        if before <= 0:
            with writing(self.rollouts):
                self.rollouts.unlink(missing_ok=True)
        elif self.rollouts.is_file():
            kept = [rollout for rollout in self.read_rollouts() if rollout.step < before]
            write_atomically(self.rollouts, "".join(map(_line, kept)))

    def read_rollouts(self) -> list[StoredRollout]:
        """Read ``rollouts.jsonl``; none if there is no such file. A last line cut short by a crash is left out.

        Raises:
            RunFolderError: A line is not a rollout.
        """
        if not self.rollouts.is_file():
            return []
        names = {field.name for field in fields(StoredRollout)}
        rollouts = []
        lines = self.rollouts.read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            if number == len(lines) and not line.endswith("\n"):
                break
            try:
                record = json.loads(line)
                rollouts.append(StoredRollout(**{name: _number(name, record[name]) for name in names}))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise RunFolderError(f"{self.rollouts}, line {number}, is not a rollout: {error}") from error
        return rollouts

    def write_evaluation(self, content: dict[str, Any]) -> None:
        """Write ``evaluation.json``."""
        write_atomically(self.evaluation, json.dumps(content, indent=2) + "\n")

    def read_evaluation(self) -> dict[str, Any] | None:
        """Read ``evaluation.json``; None if there is no such file.

        Raises:
            RunFolderError: It is not JSON.
        """
        return self._read_object(self.evaluation) if self.evaluation.is_file() else None

    def image_data(self, name: str | None) -> str | None:
        """An image of the folder as a ``data:`` address; None without a name or a readable image.

        The pixels are decoded and encoded again, so that nothing but a picture reaches the page.
        """
        from PIL import Image

        if not name or Path(name).name != name:
            return None
        try:
            with Image.open(self.images / name) as image:
                buffer = io.BytesIO()
                kind = "png" if max(image.size) <= SMALL else "jpeg"
                image.convert("RGB").save(buffer, kind)
        except (OSError, ValueError):
            return None
        return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def inspection(self, image: str) -> Path:
        """The page of what the model looks at in an image of this folder, whether it exists or not."""
        return self.inspections / f"{Path(image).stem}.html"

    def inspection_address(self, image: str) -> str | None:
        """Where the report finds the page of an image; None without one."""
        if Path(image).name != image or not self.inspection(image).is_file():
            return None
        return quote(f"{self.inspections.name}/{self.inspection(image).name}")

    def probe(self, when: str) -> Path:
        """The page of the probe ``"before"`` or ``"after"`` training, whether it exists or not."""
        return self.probes / f"{when}.html"

    def probe_address(self, when: str) -> str | None:
        """Where the report finds the page of a probe; None without one."""
        return quote(f"{self.probes.name}/{when}.html") if self.probe(when).is_file() else None

    def _read_object(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RunFolderError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise RunFolderError(f"{path} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise RunFolderError(f"{path} does not hold a JSON object")
        return content


def _line(rollout: StoredRollout) -> str:
    return f"{json.dumps(finite(asdict(rollout), digits=6))}\n"


_MAY_BE_NULL = ("reward", "advantage", "phi", "late_early_ratio")


def _number(name: str, value: Any) -> Any:
    """Undo :func:`finite` for the numbers of a rollout."""
    if name in _MAY_BE_NULL:
        return math.nan if value is None else float(value)
    if name in ("cos", "psi", "factors"):
        return [math.nan if item is None else float(item) for item in value]
    if name == "tokens":
        return [str(item) for item in value]
    return value
