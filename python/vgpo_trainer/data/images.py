"""Images of rows: what a value holds, and its pixels as people see them."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageOps, UnidentifiedImageError

from vgpo_trainer.data.errors import Unusable, reason, shown

# How base64 of PNG, JPEG, GIF, WebP, BMP and TIFF files begins.
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkqA", "TU0AK")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{200,}={0,2}\s*")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
EXPECTED = (
    "expected a path, the bytes of an image file, {bytes, path}, an image of Pillow, an array, or a list of these"
)


def images_of(value: Any, name: str, folders: Sequence[str]) -> list[Any]:
    """Return what a row's image field holds: a list of paths, bytes, images of Pillow and arrays.

    Args:
        value: The field's value, one image or a list of them.
        name: The field, for messages.
        folders: Where relative paths are looked for, in this order.

    Raises:
        Unusable: It is none of these; a URL and base64 are said to be that.
    """
    several = isinstance(value, (list, tuple)) and not _is_array(value)
    return [image_of(item, name, folders) for item in (value if several else [value]) if not is_null(item)]


def image_of(value: Any, name: str, folders: Sequence[str]) -> Any:
    """Return one image's path, bytes, image of Pillow or array; see :func:`images_of`."""
    if isinstance(value, dict):
        inside = {key: item for key, item in value.items() if item is not None}
        if "bytes" in inside:
            return image_of(inside["bytes"], name, folders)
        if "path" in inside:
            return image_of(inside["path"], name, folders)
        raise Unusable(f"{name}: {EXPECTED}, got {shown(value)}")
    if isinstance(value, (bytes, bytearray, memoryview)):
        if not value:
            raise Unusable(f"{name}: expected the bytes of an image file, got none")
        return bytes(value)
    if isinstance(value, str) and value:
        return path_of(value, name, "image", folders)
    if isinstance(value, os.PathLike):
        return path_of(os.fspath(value), name, "image", folders)
    if isinstance(value, Image.Image) or _is_array(value):
        return value
    raise Unusable(f"{name}: {EXPECTED}, got {shown(value)}")


def is_null(value: Any) -> bool:
    """Whether a value is none: of a table, also ``{bytes: None, path: None}``."""
    return value is None or (isinstance(value, dict) and bool(value) and all(item is None for item in value.values()))


def path_of(text: str, name: str, kind: str, folders: Sequence[str]) -> str:
    """Return the path that a text of a row means, found in the first of the folders, and here at last, that has it.

    Raises:
        Unusable: The text is a URL, or the media itself in base64.
    """
    if text.startswith("data:"):
        raise Unusable(
            f"{name} holds a data: URI, {kind} data in base64 ({shown(text[:40])}): decode it to bytes or a file"
        )
    if is_base64(text):
        raise Unusable(f"{name} holds {kind} data in base64 ({shown(text[:40])}): decode it to bytes or a file")
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    # Streams of datasets name files as hf://... and zip://...::..., which datasets opens.
    if text.startswith(("http://", "https://", "ftp://", "s3://", "gs://")):
        raise Unusable(f"{name} holds a URL ({shown(text)}): download it first, and give the {kind}'s path")
    if _SCHEME.match(text):
        return text
    # datasets itself stores and opens paths relative to the working directory.
    places = [*(text if folder == "." else os.path.join(folder, text) for folder in folders), text]
    return next((place for place in places if os.path.isfile(place)), places[0])


def is_base64(text: str) -> bool:
    """Whether a text is the content of a file in base64, and not its path."""
    if len(text) < 40:
        return False
    return bool(_BASE64.fullmatch(text)) or (text.startswith(_BASE64_STARTS) and "." not in text)


def decode(image: Any, max_pixels: int | None = None) -> Image.Image:
    """Return an image in RGB as people see it: upright, its first frame, what is transparent on white.

    Args:
        image: A path, bytes, an image of Pillow or an array (see :func:`images_of`).
        max_pixels: An image with more is made smaller, its sides in proportion.

    Raises:
        Unusable: It cannot be read, or has pixels without a known range.
    """
    with opened(image) as found:
        found.load()
        seen = as_seen(_upright(found))
    if max_pixels is None or seen.width * seen.height <= max_pixels:
        return seen
    ratio = math.sqrt(max_pixels / (seen.width * seen.height))
    return seen.resize([max(int(side * ratio), 1) for side in seen.size], Image.Resampling.LANCZOS)


def check(image: Any) -> None:
    """Decode an image far enough to find out whether :func:`decode` can: a JPEG at an eighth of its size."""
    with opened(image) as found:
        if found is not image:
            found.draft(None, (max(found.width // 8, 1), max(found.height // 8, 1)))
        found.load()
        _refuse_unknown_range(found)


@contextmanager
def opened(image: Any) -> Iterator[Image.Image]:
    """Open what :func:`images_of` returns; whatever goes wrong inside is :class:`Unusable` and names the file."""
    name = f" {image}" if isinstance(image, str) else ""
    if isinstance(image, str) and not _SCHEME.match(image) and not os.path.isfile(image):
        raise Unusable(f"image{name} does not exist")
    try:
        if isinstance(image, Image.Image):
            yield image
        elif not isinstance(image, (str, bytes)):
            yield _from_array(image)
        else:
            with Image.open(_file(image)) as found:
                yield found
    except Unusable as error:
        raise Unusable(f"cannot use image{name}: {error}" if name else f"cannot use image: {error}") from error
    except UnidentifiedImageError as error:
        raise Unusable(
            f"cannot read image{name}: broken, or of no format that Pillow knows; it {_begin(image)}"
        ) from error
    except Exception as error:  # Pillow's decoders raise anything for a broken file: SyntaxError, struct.error, ...
        raise Unusable(f"cannot read image{name}: {reason(error)}") from error


def _file(image: str | bytes) -> Any:
    """What Pillow opens; a path as it is, so that Pillow closes the file."""
    if isinstance(image, bytes):
        if is_base64(image[:4000].decode("latin-1")):
            raise Unusable("its bytes are base64 text: decode them")
        return io.BytesIO(image)
    if not _SCHEME.match(image):
        return image
    import fsspec

    with fsspec.open(image, "rb") as file:
        return io.BytesIO(file.read())


def _begin(image: str | bytes) -> str:
    file = _file(image)
    with open(file, "rb") if isinstance(file, str) else file as opened:
        begin = opened.read(8)
    return f"begins with {begin!r}" if begin else "is empty"


def as_seen(image: Image.Image) -> Image.Image:
    """Return a loaded image in RGB: alpha on white, 16 bits a channel scaled to 8."""
    if image.mode.startswith("I"):
        return _scaled(image).convert("RGB")
    _refuse_unknown_range(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    # The premultiplied modes know one way only.
    plain = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
    image = (image if plain is None else image.convert(plain)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata, which viewers pass over; the pixels were read before
        return image


def _refuse_unknown_range(image: Image.Image) -> None:
    if image.mode.startswith("F"):
        raise Unusable("its pixels are floating-point numbers, whose range is not known; expected 8 or 16 bits")
    if image.mode == "I":
        _largest(image)


def _largest(image: Image.Image) -> int:
    """What white is in an image of 32-bit integers: 16 bits, or 8 where no pixel has more."""
    low, high = image.getextrema()
    assert isinstance(low, (int, float)) and isinstance(high, (int, float))
    if low < 0 or high > 65535:
        raise Unusable(f"its pixels are integers from {low} to {high}; expected 8 or 16 bits")
    # Pillow reads 16 bits of a PNG or PGM into such an image; elsewhere small numbers are 8 bits.
    return 65535 if high > 255 or image.format in ("PNG", "PPM") else 255


def _scaled(image: Image.Image) -> Image.Image:
    import numpy as np

    white = _largest(image) if image.mode == "I" else 65535
    pixels = np.asarray(image).astype(np.uint32)
    scaled = ((pixels * 255 + white // 2) // white).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled[pixels == transparent] = 255
    return Image.fromarray(scaled)


def _is_array(value: Any) -> bool:
    """Whether a value is pixels: an array of numpy, or the nested lists that Arrow makes of one."""
    if type(value).__module__ == "numpy":
        return True
    depth = 0
    while isinstance(value, (list, tuple)) and value:
        value, depth = value[0], depth + 1
    return depth in (2, 3) and isinstance(value, (int, float))


def _from_array(array: Any) -> Image.Image:
    import numpy as np

    try:
        pixels = np.asarray(array)
    except ValueError as error:  # lists of different lengths
        raise Unusable(f"it is lists of numbers of different lengths: {error}") from error
    expected = "expected integers of 8 or 16 bits in the shape [height, width] or [height, width, 1, 3 or 4]"
    found = f"an array of {pixels.dtype} in the shape {list(pixels.shape)}"
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))) or not pixels.size:
        raise Unusable(f"it is {found}; {expected}")
    if pixels.dtype == np.bool_:
        return Image.fromarray(pixels.astype(np.uint8) * 255)
    if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 65535:
        raise Unusable(f"it is {found}; {expected}")
    if pixels.dtype == np.uint16 or pixels.max() > 255:
        pixels = ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8)))
