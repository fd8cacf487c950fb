"""The page of ``vgpo inspect``: one HTML file that needs nothing beside it and nothing from the network.

Everything that a model, a prompt or a file name said passes through :func:`html.escape`, or is data that the page's
script writes as text only. The content security policy names that script by its digest, so no other can run.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgpo_trainer.reports.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Series, axis_around, line_chart

if TYPE_CHECKING:
    from PIL import Image

    from vgpo_trainer.inspection import Inspection

ASSETS = Path(__file__).parent / "assets"
LONGEST_SIDE = 1024  # pixels of the picture in the page
SMALL = 128  # pixels of a picture whose pixels are to be seen
LEVELS = 255  # of a map, relative to its brightest place
NAMES = ("image", "question", "generated")
RHO, PSI = "\N{GREEK SMALL LETTER RHO}", "\N{GREEK SMALL LETTER PSI}"
NOTHING = "\N{EN DASH}"  # in place of a number that is not finite


def write_page(inspection: Inspection, path: Path) -> Path:
    """Write the page of an inspection and return its path."""
    path.write_text(build_page(inspection), encoding="utf-8")
    return path


def build_page(inspection: Inspection) -> str:
    """Return the page of an inspection."""
    style = "".join((ASSETS / name).read_text(encoding="utf-8") for name in ("report.css", "inspect.css"))
    script = (ASSETS / "inspect.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = f"What it looks at: {inspection.prompt}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        f"{_headline(inspection)}\n{_gaze(inspection)}\n{_curves(inspection)}\n"
        f'<script type="application/json" id="data">{_data(inspection)}</script>\n'
        f"<script>{script}</script>\n</main>\n</body>\n</html>\n"
    )


def _headline(inspection: Inspection) -> str:
    early, late = halves([share[0] for share in inspection.shares])
    focus_early, focus_late = halves([(1 + cos) / 2 for cos in inspection.cos])
    number = len(inspection.tokens)
    tiles = [
        _tile(f"{100 * mean([share[0] for share in inspection.shares]):.1f}%", "of attention on the image, on average"),
        _tile(_ratio(late, early), "attention on the image, second half of the answer over the first"),
        _tile(_ratio(focus_late, focus_early), f"visual focus {RHO}, second half over the first"),
        _tile(f"{number}", "token" if number == 1 else "tokens of the answer"),
    ]
    layers = ", ".join(map(str, inspection.layers))
    if len(inspection.layers) > 2 and inspection.layers == list(range(inspection.layers[0], inspection.layers[-1] + 1)):
        layers = f"{inspection.layers[0]} to {inspection.layers[-1]}"
    plural = "layer" if len(inspection.layers) == 1 else "layers"
    about = [inspection.model, inspection.image_name, f"attention averaged over all heads of {plural} {layers}"]
    return (
        f'<header><p class="eyebrow">What the model looks at</p><h1>{escape(inspection.prompt)}</h1>'
        f'<p class="soft about">{" · ".join(escape(part) for part in about if part)}</p>'
        f'<div class="tiles">{"".join(tiles)}</div></header>'
    )


def _gaze(inspection: Inspection) -> str:
    ratio = inspection.picture.width / inspection.picture.height
    small = ' class="small"' if max(inspection.picture.size) <= SMALL else ""
    picture = (
        f'<img{small} src="{image_data(inspection.picture)}" alt="the image asked about" '
        f'width="{inspection.picture.width}" height="{inspection.picture.height}">'
    )
    if inspection.grid is None:
        overlay = ""
        legend = '<p class="soft note">The image\'s tokens form no single grid, so there is no map to lay over it.</p>'
    else:
        rows, columns = inspection.grid
        cells = "".join(
            f'<rect x="{index % columns}" y="{index // columns}" width="1" height="1"/>'
            for index in range(rows * columns)
        )
        overlay = (
            f'<svg id="map" viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" aria-hidden="true">{cells}</svg>'
        )
        legend = (
            '<div class="scale"><label><input type="checkbox" id="overlay" checked/> attention</label>'
            '<span>0</span><span class="ramp heat"></span><span id="peak"></span></div>'
        )
    tokens = "".join(
        _token(index, *token) for index, token in enumerate(zip(inspection.tokens, inspection.factors, strict=True))
    )
    # With a script the panel says what is pointed at; without one the page still shows answer and curves.
    return (
        '<section><h2>Where each token looks</h2><p class="soft">Point at a token, or step through them with the '
        "arrow keys; click to hold one. What is shown is the query at the token, the one that predicts the next. A "
        "token's colour is the factor its advantage would be multiplied by: orange "
        'strengthens, blue weakens.</p><div class="gaze"><div class="card view">'
        f'<div class="picture" id="picture" style="max-width:calc(72vh * {ratio:.4f})">{picture}{overlay}</div>'
        f"{legend}</div>"
        f'<div class="card"><div class="tokens answer" id="tokens">{tokens}</div>'
        '<div class="scale"><span>factor 0</span><span class="ramp"></span><span>2 and more</span></div>'
        '<dl class="readout" id="readout" aria-live="polite">'
        '<div class="what"><dt>token</dt><dd id="what">the whole answer</dd></div>'
        '<div class="what"><dt>attention</dt><dd class="shares" id="shares">'
        + "".join(f'<i class="swatch series-{index}"></i>' for index in range(len(NAMES)))
        + "</dd></div>"
        + "".join(
            f'<div><dt><i class="swatch series-{index}"></i>{name}</dt><dd id="{name}"></dd></div>'
            for index, name in enumerate(NAMES)
        )
        + f'<div><dt>cosine to the image</dt><dd id="cos"></dd></div><div><dt>token weight {PSI}</dt><dd id="psi"></dd>'
        '</div><div><dt>factor</dt><dd id="factor"></dd></div></dl></div></div></section>'
    )


def _token(index: int, text: str, factor: float) -> str:
    strength = min(abs(factor - 1.0), 1.0) if math.isfinite(factor) else 0.0
    direction = "up" if factor > 1.0 else "down"
    special = " special" if text.startswith("<") and text.endswith(">") else ""
    # A token may end in the middle of a character, or be nothing but a line break: each must stay visible.
    shown = text.replace("\n", "↵\n") or "∅"
    return (
        f'<span class="token{special}" tabindex="{-1 if index else 0}" '
        f'style="background:rgba(var(--{direction}),{0.85 * strength:.2f})">'
        f"{escape(shown)}</span>"
    )


def _curves(inspection: Inspection) -> str:
    last = max(len(inspection.tokens), 2)
    across = Axis("token of the answer", 1, last)
    shares = [
        Series(name, [(index + 1, share[place]) for index, share in enumerate(inspection.shares)])
        for place, name in enumerate(NAMES)
    ]
    focus = Series("cosine to the image", [(index + 1, cos) for index, cos in enumerate(inspection.cos)])
    figures = [
        (
            "Attention along decoding",
            line_chart(shares, across, Axis("share of attention", 0, 1, percent=True), "attention share by token"),
            "How each token's attention is shared between the image, the rest of the prompt, and what was generated "
            "up to and including itself.",
        ),
        (
            "Visual focus along decoding",
            line_chart([focus], across, axis_around("cosine", inspection.cos), "visual focus by token"),
            "Cosine between a token's last hidden state and the mean of the image's tokens.",
        ),
    ]
    cards = "".join(
        f'<figure class="card curve"><h3>{title}</h3>{chart}<figcaption>{caption}</figcaption></figure>'
        for title, chart, caption in figures
    )
    return f'<section><h2>Along the answer</h2><div class="pair">{cards}</div></section>'


def _data(inspection: Inspection) -> str:
    """Return the numbers behind the page as JSON that is safe inside a script element."""
    peaks = [max(row, default=0.0) for row in inspection.maps]
    levels = bytes(
        min(round(LEVELS * value / peak), LEVELS) if peak > 0 and math.isfinite(value) else 0
        for row, peak in zip(inspection.maps, peaks, strict=True)
        for value in row
    )
    data: dict[str, Any] = {
        "tokens": inspection.tokens,
        "shares": [[_finite(share) for share in row] for row in inspection.shares],
        "cos": [_finite(cos) for cos in inspection.cos],
        "psi": [_finite(psi) for psi in inspection.psi],
        "factors": [_finite(factor) for factor in inspection.factors],
        "peaks": [_finite(peak) for peak in peaks],
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
    text = json.dumps(data, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def image_data(picture: Image.Image) -> str:
    """Return a picture as a data URL: as it is while it is small, else scaled down."""
    picture = picture.convert("RGB")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    kind = "png" if max(picture.size) <= LONGEST_SIDE // 4 else "jpeg"
    picture.save(buffer, kind, **({"quality": 88} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def halves(values: list[float]) -> tuple[float, float]:
    """Means of the first and second half, the first the longer; NaN of nothing."""
    middle = (len(values) + 1) // 2
    return mean(values[:middle]), mean(values[middle:])


def mean(values: list[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def _ratio(late: float, early: float) -> str:
    return f"{late / early:.2f}" if early > 0 and math.isfinite(late) else NOTHING


def _tile(number: str, meaning: str) -> str:
    return f'<div class="card tile"><b>{escape(number)}</b><span>{escape(meaning)}</span></div>'


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
