"""Images as people see them, whatever file they come in, and files that break off found before training."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from trainer.data_cases import encoded, noise
from vgpo_trainer.data.errors import Unusable
from vgpo_trainer.data.images import check, decode


def square(mode: str, back: Any, front: Any, size: int = 16) -> Image.Image:
    """A square of one colour in the middle of another."""
    image = Image.new(mode, (size, size), back)
    image.paste(front, (size // 4, size // 4, 3 * size // 4, 3 * size // 4))
    return image


def corners(image: Image.Image) -> tuple[Any, Any]:
    """Colour of a corner and of the middle."""
    return image.getpixel((0, 0)), image.getpixel((image.width // 2, image.height // 2))


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (4, 4, 12, 12))
    if transparent:
        image.info["transparency"] = 0
    return image


RAMP = np.linspace(0, 65535, 64 * 32).reshape(32, 64)
WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)
CLEAR = (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (square("RGB", WHITE, RED), "PNG", (WHITE, RED)),
        (square("RGBA", CLEAR, (0, 0, 0, 255)), "PNG", (WHITE, BLACK)),
        (square("RGBA", CLEAR, (255, 0, 0, 128)), "PNG", (WHITE, (255, 127, 127))),
        (square("RGBA", CLEAR, (255, 0, 0, 255)), "WEBP", (WHITE, RED)),
        (square("LA", (0, 0), (0, 255)), "PNG", (WHITE, BLACK)),
        (palette(transparent=True), "PNG", (WHITE, RED)),
        (palette(transparent=False), "PNG", (BLACK, RED)),
        (palette(transparent=True), "GIF", (WHITE, RED)),
        (square("1", 1, 0), "PNG", (WHITE, BLACK)),
        (square("L", 255, 10), "PNG", (WHITE, (10, 10, 10))),
        (square("I;16", 65535, 257 * 10), "PNG", (WHITE, (10, 10, 10))),
        (square("I;16", 65535, 257 * 10), "TIFF", (WHITE, (10, 10, 10))),
        (square("I", 65535, 257 * 10), "TIFF", (WHITE, (10, 10, 10))),
        (square("I", 255, 10), "TIFF", (WHITE, (10, 10, 10))),
        (square("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)), "TIFF", (WHITE, BLACK)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_files_are_seen_as_people_see_them(image: Image.Image, kind: str, expected: tuple[Any, Any]) -> None:
    content = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    seen = decode(content)
    assert seen.mode == "RGB" and corners(seen) == expected
    check(content)


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "HSV", "YCbCr", "LAB", "I;16B"])
def test_modes_that_few_files_have(mode: str) -> None:
    if mode in ("La", "RGBa", "PA"):
        source = square("RGBA" if mode != "La" else "LA", CLEAR if mode != "La" else (0, 0), 0)
        source.paste((0, 255) if mode == "La" else (0, 0, 0, 255), (4, 4, 12, 12))
        image = source.convert("P").convert("PA") if mode == "PA" else source.convert(mode)
        if mode == "PA":
            image.putalpha(source.getchannel("A"))
    elif mode == "LAB":
        from PIL import ImageCms

        lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image = ImageCms.applyTransform(square("RGB", WHITE, BLACK), lab)
    elif mode == "I;16B":
        image = Image.frombytes("I;16B", (16, 16), np.asarray(square("L", 255, 0)).astype(">u2").__mul__(257).tobytes())
    else:
        image = square("RGB", WHITE, BLACK).convert(mode)
    assert image.mode == mode
    back, front = corners(decode(image))
    assert np.abs(np.subtract(back, WHITE)).max() <= 3 and np.abs(np.subtract(front, BLACK)).max() <= 3


def test_transparent_16_bit_and_coloured_charts(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / "ramp.png")
    seen = np.asarray(decode(str(tmp_path / "ramp.png")))
    assert abs(seen.mean() - 127.5) < 1 and len(np.unique(seen)) == 256
    transparent = square("RGB", (1, 2, 3), RED)
    assert corners(decode(encoded(transparent, transparency=(1, 2, 3)))) == (WHITE, RED)
    transparent = square("I;16", 5, 65535)
    assert corners(decode(encoded(transparent, transparency=5)))[0] == WHITE


def test_photographs_stand_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), BLACK)
    image.paste(WHITE, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        seen = decode(encoded(image, kind, exif=exif))
        assert seen.size == (8, 16) and seen.getpixel((4, 2))[0] > 200 and seen.getpixel((4, 13))[0] < 50
    damaged = encoded(image, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x00garbage")
    assert decode(damaged).size == (16, 8)


def test_cmyk_photographs_are_not_negatives() -> None:
    seen = decode(encoded(square("CMYK", (0, 0, 0, 0), (0, 255, 255, 0)), "JPEG", quality=95))
    back, front = corners(seen)
    assert min(back) > 240 and front[0] > 200 and max(front[1:]) < 50


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_seen(kind: str) -> None:
    frames = [square("RGB", WHITE, color) for color in (RED, BLACK, WHITE)]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    back, front = corners(decode(content))
    assert min(back) > 240 and front[0] > 240 and max(front[1:]) < 15


@pytest.mark.parametrize(
    ("array", "middle"),
    [
        (np.full((4, 6), 7, np.uint8), (7, 7, 7)),
        (np.full((4, 6, 1), 7, np.int64), (7, 7, 7)),
        (np.full((4, 6, 3), (1, 2, 3), np.uint8), (1, 2, 3)),
        (np.full((4, 6, 4), (0, 0, 0, 0), np.uint8), WHITE),
        (np.full((4, 6), 257 * 7, np.uint16), (7, 7, 7)),
        (np.ones((4, 6), bool), WHITE),
        (np.full((4, 6, 3), 9, np.uint8).tolist(), (9, 9, 9)),
    ],
)
def test_arrays_are_images(array: Any, middle: tuple[int, ...]) -> None:
    seen = decode(array)
    assert seen.size == (6, 4) and corners(seen)[1] == middle


def cut(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = encoded(image, kind, **options)
    return content[: len(content) // 2]


def bomb() -> bytes:
    """A PNG of 200 megapixels in 24 kilobytes."""
    return encoded(Image.new("1", (20000, 10000)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (cut(noise(48), "JPEG"), "truncated"),
        (cut(noise(48), "JPEG", progressive=True), "truncated"),
        (cut(noise(48), "PNG"), "truncated|broken"),
        (cut(noise(48), "WEBP"), "cannot read image"),
        (cut(noise(48), "GIF"), "truncated|broken|cannot read"),
        (cut(noise(48), "TIFF"), "cannot read image"),
        (bomb(), "could be decompression bomb"),
        (b"", "; it is empty"),
        (b"<html>", r"no format that Pillow knows; it begins with b'<html>'"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point numbers, whose range is not known; expected 8 or 16"),
        (encoded(Image.new("I", (4, 4), 70000), "TIFF"), "integers from 70000 to 70000; expected 8 or 16 bits"),
        (np.zeros((4, 6, 2), np.uint8), r"an array of uint8 in the shape \[4, 6, 2\]; expected integers of 8 or 16"),
        (np.zeros((4, 6), np.float32), r"an array of float32 in the shape \[4, 6\]; expected integers"),
        ([[1, 2], [3]], "lists of numbers of different lengths"),
    ],
)
def test_what_cannot_be_seen_is_refused(content: Any, message: str) -> None:
    for function in (decode, check):
        with pytest.raises(Unusable, match=message) as caught:
            function(content)
        assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_a_check_leaves_an_open_photograph_at_its_size() -> None:
    image = Image.open(io.BytesIO(encoded(noise(640), "JPEG")))
    check(image)
    assert image.size == (640, 640)


def test_files_of_a_stream_are_opened_where_they_are() -> None:
    """As hf:// and zip://, which need a network or an archive."""
    fsspec = pytest.importorskip("fsspec")
    for name, content in (("a.png", encoded(square("RGB", WHITE, RED))), ("b.png", b"<html>")):
        with fsspec.open(f"memory://{name}", "wb") as file:
            file.write(content)
    assert corners(decode("memory://a.png")) == (WHITE, RED)
    with pytest.raises(Unusable, match=r"cannot read image memory://b\.png: broken, .* it begins with b'<html>'"):
        check("memory://b.png")
    with pytest.raises(Unusable, match=r"cannot read image memory://c\.png"):
        check("memory://c.png")
