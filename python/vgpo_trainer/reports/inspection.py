"""What ``vgpo inspect`` finds, and its page: one HTML file that needs no other file and no network.

All text from a model, a prompt or a file name is escaped (see :mod:`vgpo_trainer.reports.pages`), or is data that the
script of the page writes only as text. The content security policy allows that script by its digest, and no other.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup
from PIL import Image

from vgpo_kernels.integrations.transformers import SEGMENT_NAMES
from vgpo_trainer.reports.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Series, axis_around, line_chart
from vgpo_trainer.reports.pages import asset, cut, percent, render
from vgpo_trainer.runs.json import finite

LONGEST_SIDE = 1024  # pixels of the picture in the page
SMALL = 128  # pixels of a picture whose pixels are to be seen
LEVELS = 255  # of a map, relative to its brightest place
# Where a notebook shows the page; the sandbox keeps its script away from the notebook.
FRAME = Markup(
    '<iframe srcdoc="{}" sandbox="allow-scripts" title="What the model looks at" '
    'style="width:100%;height:860px;border:0;resize:vertical"></iframe>'
)


@dataclass(frozen=True, repr=False)
class Inspection:
    """An answer and what it looked at; per-token lists have an entry for each token of the answer.

    A notebook shows it as the page of ``vgpo inspect``.

    Attributes:
        model: The model, as it was asked for.
        prompt: The prompt.
        image_name: What to call the image; may be empty.
        picture: The image as the model saw it (cropped, say), or as it was given where that cannot be told.
        tokens: Text of each token, special ones included.
        shares: Share of a token's attention on the image, the question and the tokens generated before it and itself.
        cos: Cosine of a token's last hidden state to the mean of the image's.
        psi: Intra-trajectory weights.
        factors: What an advantage would be multiplied by, with the paper's settings and no other answer to compare.
        maps: Attention on each image token, row by row, ``grid`` of them; empty without a grid.
        grid: Rows and columns of image tokens, or ``None`` where they form no single grid.
        layers: Layers that attention is averaged over, all their heads alike.

    """

    model: str
    prompt: str
    image_name: str
    picture: Image.Image
    tokens: list[str]
    shares: list[tuple[float, float, float]]
    cos: list[float]
    psi: list[float]
    factors: list[float]
    maps: list[list[float]]
    grid: tuple[int, int] | None
    layers: list[int]

    def save(self, path: str | Path) -> Path:
        """Write the page of ``vgpo inspect``, which needs no other file and no network, and return its path."""
        path = Path(path)
        path.write_text(build_page(self), encoding="utf-8")
        return path

    def to_dict(self) -> dict[str, Any]:
        """Return all but the picture for JSON, ``None`` in place of numbers that are not finite.

        The keys are the attributes' names, with ``shares`` as a dictionary from ``"image"``, ``"question"`` and
        ``"generated"`` to a share for each token, and ``size`` (width and height in pixels) for ``picture``.
        """
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "picture"}
        shares = {name: [share[place] for share in self.shares] for place, name in enumerate(SEGMENT_NAMES)}
        return dict(finite(data | {"shares": shares, "size": self.picture.size}))

    def __repr__(self) -> str:
        """One line: the answer, and how much of the attention is on the image."""
        answer = cut("".join(self.tokens), 60)
        attention = percent(mean([share[0] for share in self.shares]))
        return (
            f"<Inspection: {cut(self.prompt, 60)!r} -> {answer!r}, {len(self.tokens)} tokens, {attention} on the image>"
        )

    def _repr_html_(self) -> str:
        # A page of its own: its script finds its elements by their names, and two cells may show two inspections.
        return str(FRAME.format(build_page(self)))


def build_page(inspection: Inspection) -> str:
    """Return the page of an inspection."""
    script = asset("inspect.js")
    on_image = [share[0] for share in inspection.shares]
    across = Axis("token of the answer", 1, max(len(inspection.tokens), 2))
    shares = [
        Series(name, [(index + 1, share[place]) for index, share in enumerate(inspection.shares)])
        for place, name in enumerate(SEGMENT_NAMES)
    ]
    focus = Series("cosine to the image", [(index + 1, cos) for index, cos in enumerate(inspection.cos)])
    return render(
        "inspection.html.j2",
        title=f"What it looks at: {inspection.prompt}",
        inspection=inspection,
        names=SEGMENT_NAMES,
        layers=_layers(inspection.layers),
        attention=mean(on_image),
        attention_ratio=_late_over_early(on_image),
        focus_ratio=_late_over_early([(1 + cos) / 2 for cos in inspection.cos]),
        image=image_data(inspection.picture),
        small=max(inspection.picture.size) <= SMALL,
        shares=line_chart(shares, across, Axis("share of attention", 0, 1, percent=True), "attention share by token"),
        focus=line_chart([focus], across, axis_around("cosine", inspection.cos), "visual focus by token"),
        data=_data(inspection),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _layers(layers: list[int]) -> str:
    """Layers in words: a range where they are consecutive, else a list."""
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layer{'' if len(layers) == 1 else 's'} {', '.join(map(str, layers))}"


def _data(inspection: Inspection) -> Any:
    """Return the numbers behind the page, for its script; None for those that JSON cannot hold."""
    peaks = [max(row, default=0.0) for row in inspection.maps]
    levels = bytes(
        min(round(LEVELS * value / peak), LEVELS) if peak > 0 and math.isfinite(value) else 0
        for row, peak in zip(inspection.maps, peaks, strict=True)
        for value in row
    )
    data = {
        "tokens": inspection.tokens,
        "shares": inspection.shares,
        "cos": inspection.cos,
        "psi": inspection.psi,
        "factors": inspection.factors,
        "peaks": peaks,
        "columns": 0 if inspection.grid is None else inspection.grid[1],
        "levels": base64.b64encode(levels).decode(),
        "chart": {
            "left": LEFT,
            "width": WIDTH - LEFT - RIGHT,
            "top": TOP,
            "bottom": HEIGHT - BOTTOM,
            "last": max(len(inspection.tokens), 2),
        },
    }
    return finite(data, digits=6)


def image_data(picture: Image.Image) -> str:
    """Return a picture as a data URL: as it is while it is small, else scaled down."""
    picture = picture.convert("RGB")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    kind = "png" if max(picture.size) <= LONGEST_SIDE // 4 else "jpeg"
    picture.save(buffer, kind, **({"quality": 88} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def mean(values: list[float]) -> float:
    """The mean; NaN if there are no values."""
    return fmean(values) if values else math.nan


def _late_over_early(values: list[float]) -> float:
    """Mean of the second half divided by that of the first, the longer one; NaN if the latter is not positive."""
    middle = (len(values) + 1) // 2
    early, late = mean(values[:middle]), mean(values[middle:])
    return late / early if early > 0 else math.nan
