"""The page of ``vgpo inspect``: one HTML file that needs no other file and no network.

All text from a model, a prompt or a file name is escaped (see :mod:`vgpo_trainer.reports.pages`), or is data that the
script of the page writes only as text. The content security policy allows that script by its digest, and no other.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from vgpo_kernels.integrations.transformers import SEGMENT_NAMES
from vgpo_trainer.inspection import Inspection
from vgpo_trainer.reports.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Series, axis_around, line_chart
from vgpo_trainer.reports.pages import asset, render
from vgpo_trainer.runs.json import finite

LONGEST_SIDE = 1024  # pixels of the picture in the page
SMALL = 128  # pixels of a picture whose pixels are to be seen
LEVELS = 255  # of a map, relative to its brightest place


def write_page(inspection: Inspection, path: Path) -> Path:
    """Write the page of an inspection and return its path."""
    path.write_text(build_page(inspection), encoding="utf-8")
    return path


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
