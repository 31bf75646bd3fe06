"""From image files to pixels: every mode, orientation and depth, and files that are damaged."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nasdeploy.data import load_dataset
from nasdeploy.data.images import MAX_THREADS, EncodedImage, decode, in_threads, read_header
from nasdeploy.errors import DataError

RED, HALF = (200, 40, 10), 128


def encoded(image: Image.Image, kind: str = "PNG", **options) -> EncodedImage:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return EncodedImage("x", file.getvalue())


def first_pixel(image: EncodedImage) -> list[int]:
    """The upper left pixel, after a check that the header already tells whether it is grey."""
    pixels = decode(image, size=8, grey=False)
    assert (pixels.shape[2] == 1) == read_header(image).grey
    return pixels[0, 0].tolist()


def palette_image() -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *RED])
    return image


def png_16_bit(colour_type: int, channels: int) -> EncodedImage:
    """An 8x8 PNG of 16 bits a channel. [PNG specification, 5.2 and 11.2]"""
    rows = (b"\0" + b"\x12\x34" * 8 * channels) * 8

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 8, 8, 16, colour_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return EncodedImage("deep.png", b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (8, 8), HALF), "PNG", [HALF]),
        (Image.new("1", (8, 8), 1), "PNG", [255]),
        (Image.new("1", (8, 8), 0), "TIFF", [0]),
        (Image.new("RGB", (8, 8), RED), "PNG", [*RED]),
        (Image.new("RGBA", (8, 8), (*RED, 0)), "PNG", [*RED]),
        (Image.new("LA", (8, 8), (HALF, 0)), "PNG", [HALF] * 3),
        (palette_image(), "PNG", [*RED]),
        (palette_image(), "GIF", [*RED]),
        (palette_image(), "BMP", [*RED]),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF", [255, 0, 0]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_every_mode_becomes_grey_or_rgb(image, kind, expected):
    assert first_pixel(encoded(image, kind)) == expected


def test_cmyk_jpeg_becomes_rgb():
    image = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert first_pixel(image) == pytest.approx([255, 0, 0], abs=6)


@pytest.mark.parametrize("transparency", [1, b"\x80\x00"], ids=["one colour", "a value for each colour"])
def test_transparent_palette_keeps_its_colours_without_a_warning(transparency):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first_pixel(encoded(palette_image(), transparency=transparency)) == [*RED]


@pytest.mark.parametrize(
    ("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["grey", "RGB", "LA", "RGBA"]
)
def test_sixteen_bits_a_channel_are_refused_in_header_and_image(colour_type, channels):
    image = png_16_bit(colour_type, channels)
    for read in (read_header, lambda image: decode(image, size=8, grey=False)):
        with pytest.raises(
            DataError, match=r"deep\.png: mode .* has over 8 bits a channel; convert it to 8-bit"
        ):
            read(image)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_wide_tiff_is_refused(mode):
    with pytest.raises(DataError, match=f"x: mode {mode} has over 8 bits a channel"):
        read_header(encoded(Image.new(mode, (8, 8)), "TIFF"))


def test_five_bits_a_channel_are_read():
    """A 16-bit BMP has 5, 6 and 5 bits for its colours: less than 8, whatever its name says."""
    header = struct.pack("<2sIHHIIiiHHIIiiIIIII", b"BM", 194, 0, 0, 66, 40, 8, 8, 1, 16, 3, 128, 0, 0, 0, 0, 0xF800,
                         0x07E0, 0x001F)  # fmt: skip
    assert first_pixel(EncodedImage("x", header + struct.pack("<H", 0xF800) * 64)) == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, (0, 0)), (2, (0, 7)), (3, (7, 7)), (6, (0, 7)), (8, (7, 0))]
)
def test_exif_orientation_is_applied(kind, orientation, corner):
    image = Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (0, 0, 8, 8))  # the upper left quarter is white
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encoded(image, kind, exif=exif), size=8, grey=False)
    assert [tuple(c) for c in np.argwhere(pixels[::7, ::7, 0] > 200) * 7] == [corner]


def test_grey_and_rgb_images_together_are_rgb(tmp_path):
    for name, mode, value in (("a", "L", HALF), ("b", "RGB", RED)):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new(mode, (8, 8), value).save(tmp_path / name / f"{i}.png")
    dataset = load_dataset(str(tmp_path), seed=0)
    for images, labels in ((s.images, s.labels) for s in (dataset.train, dataset.valid, dataset.test)):
        for image, label in zip(images, labels, strict=True):
            assert image[:, 0, 0].tolist() == ([HALF] * 3, [*RED])[int(label)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_truncated_image_is_named_in_one_line(kind, share, rng):
    image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    content = encoded(image, kind).content
    cut = EncodedImage("holiday.jpg", content[: int(share * len(content))])
    with pytest.raises(
        DataError, match=r"^holiday\.jpg: not a readable image \(.+\); repair or remove it$"
    ) as caught:
        decode(cut, size=8, grey=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "PPM", "TGA", "DDS", "AVIF"])
@pytest.mark.filterwarnings("ignore")  # what Pillow says of damaged metadata
def test_damaged_image_is_read_or_refused_and_nothing_else(kind, rng):
    content = encoded(Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)), kind).content
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for position in rng.integers(0, min(len(content), 300), 3):
            damaged[position] = rng.integers(256)
        try:
            decode(EncodedImage("x", bytes(damaged)), size=8, grey=False)
        except DataError:
            refused += 1
    assert refused


def test_threads_keep_the_order_and_stop_when_the_caller_leaves():
    assert list(in_threads(lambda n: n * n, range(100))) == [n * n for n in range(100)]
    begun: list[int] = []
    release = threading.Event()

    def work(n: int) -> None:
        begun.append(n)
        if n:
            release.wait(timeout=10.0)

    results = in_threads(work, range(10_000))
    next(results)
    threading.Timer(0.2, release.set).start()
    results.close()
    assert len(begun) <= 1 + min(MAX_THREADS, os.cpu_count() or 1)  # what had begun by then, and no more


def test_error_in_a_thread_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda n: 1 // n, [3, 2, 1, 0, *range(1000)]))


def test_what_pillow_warns_of_is_not_shown(tmp_path):
    root = tmp_path / "set"
    write_classes(root, Image.new("L", (8, 8)))
    (root / "a" / "0.tif").write_bytes(encoded(Image.new("L", (8, 8)), "TIFF").content[:10])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(DataError, match=r"0\.tif: not a readable image"):
            load_dataset(str(root), seed=0)
    assert caught == []


def write_classes(root: Path, image: Image.Image) -> None:
    for name in "ab":
        (root / name).mkdir(parents=True)
        for i in range(4):
            image.save(root / name / f"{i}.png")


def test_rotated_photographs_are_cropped_upright(tmp_path, rng):
    """Width and height are exchanged by the orientation: the crop must be of the upright image."""
    upright = Image.fromarray(rng.integers(0, 256, (30, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    write_classes(tmp_path / "plain", upright)
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    for name in "ab":
        (tmp_path / "lying" / name).mkdir(parents=True)
        for i in range(4):
            lying.save(tmp_path / "lying" / name / f"{i}.png", exif=exif)
    one, two = (load_dataset(str(tmp_path / name), seed=0, image_size=16) for name in ("plain", "lying"))
    assert one.fingerprint() == two.fingerprint()
