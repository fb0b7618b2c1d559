"""Folders of images, against Pillow's own conversions; every refusal names its files."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from ddpm_edge.data import image_folder, load, reading
from ddpm_edge.errors import DataError


def noise(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def save(image: Image.Image, path: Path, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)  # type: ignore[arg-type]


def png(path: Path, colour: int, bits: int, pixels: bytes, *late: tuple[bytes, bytes]) -> None:
    """A PNG of 2x3 pixels as Pillow does not write them; `late` chunks stand after the pixels."""
    head = struct.pack(">IIBBBBB", 3, 2, bits, colour, 0, 0, 0)
    lines = b"".join(b"\0" + pixels[i * len(pixels) // 2 :][: len(pixels) // 2] for i in (0, 1))
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(lines)), *late, (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        content += struct.pack(">I", len(data)) + name + data
        content += struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)


def as_nhwc(folder: Path, **options: object) -> np.ndarray:
    return load(folder, **options).images.transpose(0, 2, 3, 1)  # type: ignore[arg-type]


def test_a_flat_folder(tmp_path: Path) -> None:
    names = ["a.png", "B.PNG", "c.bmp", "d.gif", "e.Tiff", "f.tif", "g.webp", "h.jpg", "i.JPEG"]
    for i, name in enumerate(names):
        options = {"lossless": True} if name == "g.webp" else {}
        save(noise(4, 6, "L" if name == "d.gif" else "RGB", seed=i), tmp_path / name, **options)
    for other in (".hidden.png", "._a.png", "notes.txt", "a.png.part", "png"):
        (tmp_path / other).write_bytes(b"no image")
    save(noise(9, 9), tmp_path / ".cache" / "x.png")
    loaded = load(tmp_path)
    assert loaded.name == tmp_path.name
    assert loaded.files == tuple(sorted(names))
    assert loaded.files[0] == "B.PNG"  # as text: capitals first, on every machine
    assert loaded.sample_shape == (3, 4, 6)
    assert (loaded.labels, loaded.class_names) == (None, ())
    for name, image in zip(loaded.files, loaded.images, strict=True):
        with Image.open(tmp_path / name) as opened:
            assert (image.transpose(1, 2, 0) == np.asarray(opened.convert("RGB"))).all(), name


def test_the_order_is_not_the_file_system_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/2.png", "b/10.png", "a-x/1.png", "a/1.png", "a/sub/3.png", "B/1.png"):
        save(noise(2, 2, seed=len(name)), tmp_path / name)
    expected = ("B/1.png", "a-x/1.png", "a/1.png", "a/sub/3.png", "b/10.png", "b/2.png")
    scandir, digests = os.scandir, set()
    for key in (lambda e: e.name, lambda e: e.name[::-1]):
        for reverse in (False, True):
            monkeypatch.setattr(
                os, "scandir", lambda f, k=key, r=reverse: sorted(scandir(f), key=k, reverse=r)
            )
            loaded = load(tmp_path)
            assert loaded.files == expected
            digests.add(loaded.sha256())
    assert len(digests) == 1
    assert loaded.class_names == ("B", "a", "a-x", "b")
    assert loaded.labels is not None
    assert loaded.labels.tolist() == [0, 2, 1, 1, 3, 3]
    assert loaded.labels.dtype == np.int64


@pytest.mark.parametrize("mode", ["1", "L"])
def test_all_gray_is_gray(tmp_path: Path, mode: str) -> None:
    image = noise(5, 4, "L").convert(mode)
    save(image, tmp_path / "a.png")
    save(noise(5, 4, "L"), tmp_path / "b.jpg")
    loaded = load(tmp_path)
    assert loaded.sample_shape == (1, 5, 4)
    assert (loaded.images[0, 0] == np.asarray(image.convert("L"))).all()
    save(noise(5, 4, "RGB"), tmp_path / "c.png")
    mixed = load(tmp_path)
    assert mixed.sample_shape == (3, 5, 4)
    assert (mixed.images[:2] == loaded.images).all()  # the gray thrice


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    """Against (1 - alpha) * 255 + alpha * colour; alpha_composite rounds, so by 1 at most."""
    image = noise(6, 5, "RGBA")
    save(image, tmp_path / "a.png")
    save(noise(6, 5, "LA"), tmp_path / "b.png")
    rgba = [np.asarray(image, float), np.asarray(noise(6, 5, "LA").convert("RGBA"), float)]
    for got, pixels in zip(as_nhwc(tmp_path), rgba, strict=True):
        alpha = pixels[..., 3:] / 255
        assert np.abs(got - (255 * (1 - alpha) + alpha * pixels[..., :3])).max() <= 1


def test_palettes_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    save(image, tmp_path / "a.png", transparency=1)
    save(image, tmp_path / "b.gif", transparency=2)
    save(image, tmp_path / "c.png", transparency=bytes([255, 255, 0]))  # one alpha an entry
    save(image, tmp_path / "d.png")
    one, two, three = [10, 20, 30], [40, 50, 60], [70, 80, 90]
    white = [255] * 3
    expected = [[one, white, three], [one, two, white], [one, two, white], [one, two, three]]
    assert as_nhwc(tmp_path)[:, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["1", "L"])
def test_a_transparent_gray_stays_gray(tmp_path: Path, mode: str) -> None:
    image = Image.new("L", (2, 1))
    image.putdata([0, 255])
    save(image.convert(mode), tmp_path / "a.png", transparency=0)
    assert load(tmp_path).images.tolist() == [[[[255, 255]]]]


def test_cmyk_and_ycbcr(tmp_path: Path) -> None:
    save(noise(4, 4, "CMYK"), tmp_path / "a.tif")
    save(noise(4, 4, "CMYK"), tmp_path / "b.jpg")
    save(noise(4, 4).convert("YCbCr"), tmp_path / "c.tif")
    for name, got in zip(("a.tif", "b.jpg", "c.tif"), as_nhwc(tmp_path), strict=True):
        with Image.open(tmp_path / name) as image:
            assert image.mode == ("YCbCr" if name == "c.tif" else "CMYK")
            assert (got == np.asarray(image.convert("RGB"))).all()


def test_the_first_picture_of_an_animation(tmp_path: Path) -> None:
    first, second = Image.new("L", (3, 3), 50), Image.new("L", (3, 3), 200)
    save(first, tmp_path / "a.gif", save_all=True, append_images=[second])
    save(first, tmp_path / "b.tif", save_all=True, append_images=[second])
    assert (load(tmp_path).images == 50).all()


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [None, (5, 4)])
def test_exif_orientation(
    tmp_path: Path, orientation: int, ending: str, size: tuple[int, int] | None
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    save(noise(4, 6), tmp_path / f"a.{ending}", exif=exif)
    # Not a TIFF itself: older versions of Pillow turn it twice here.
    oracle = tmp_path / "oracle" / ("a.png" if ending == "tif" else f"a.{ending}")
    save(noise(4, 6), oracle, exif=exif)
    with Image.open(oracle) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    oracle.unlink()
    assert upright.size == ((4, 6) if orientation >= 5 else (6, 4))
    if size is not None:
        upright = upright.resize(size[::-1], reading.LANCZOS)
    assert (as_nhwc(tmp_path, size=size, fit="resize")[0] == np.asarray(upright)).all()


def test_exif_that_comes_late(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    png(tmp_path / "a.png", 0, 8, bytes(range(6)), (b"eXIf", exif.tobytes()[6:]))
    assert load(tmp_path, size=(3, 2)).images[0, 0].tolist() == [[3, 0], [4, 1], [5, 2]]
    with pytest.raises(DataError, match="a.png: 3x2 when decoded, .* 2x3; give --size"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_broken_exif_is_no_reason_to_refuse(tmp_path: Path) -> None:
    for orientation in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        save(noise(4, 6), tmp_path / "a.jpg", exif=orientation)
        assert load(tmp_path).sample_shape == (3, 4, 6)


@pytest.mark.parametrize("fit", reading.FITS)
def test_a_size(tmp_path: Path, fit: str) -> None:
    sizes = [(20, 30), (30, 20), (16, 16), (7, 9), (40, 16)]
    for i, (height, width) in enumerate(sizes):
        save(noise(height, width, seed=i), tmp_path / f"{i}.png")
    loaded = load(tmp_path, size=16, fit=fit)
    assert loaded.sample_shape == (3, 16, 16)
    for i, got in enumerate(loaded.images):
        with Image.open(tmp_path / f"{i}.png") as image:
            expected = np.asarray(reading.fitted(image.convert("RGB"), (16, 16), fit))
        assert (got.transpose(1, 2, 0) == expected).all()


def test_a_palette_is_scaled_as_colours(tmp_path: Path) -> None:
    """Half black, half white: the middle is gray, though the palette has no gray."""
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 255, 255, 255, 0, 0])
    image.putdata([0, 1])
    save(image, tmp_path / "a.png")
    assert 120 <= as_nhwc(tmp_path, size=1, fit="resize").min() <= 135


def test_large_jpegs_are_decoded_small(tmp_path: Path) -> None:
    """At 1/8, here; within 4 of 255 of the full decoding, the coefficients' own rounding."""
    y, x = np.mgrid[:800, :1200] / 1200
    waves = [127.5 + 120 * np.sin(a * x + b * y) for a, b in ((9, 4), (-5, 11), (7, -8))]
    image = Image.fromarray(np.stack(waves, axis=-1).round().astype(np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    save(image, tmp_path / "a.jpg", quality=95, exif=exif)
    with Image.open(tmp_path / "a.jpg") as opened:
        upright = ImageOps.exif_transpose(opened)
    expected = np.asarray(ImageOps.fit(upright, (24, 20), reading.LANCZOS), int)
    assert np.abs(as_nhwc(tmp_path, size=(20, 24))[0] - expected).max() <= 4


def test_progress(tmp_path: Path) -> None:
    for i in range(3):
        save(noise(2, 2, seed=i), tmp_path / f"{i}.png")
    said: list[tuple[float, str]] = []
    load(tmp_path, progress=lambda fraction, note: said.append((round(fraction, 3), note)))
    assert said == [
        (0.033, "opened 1 of 3"), (0.067, "opened 2 of 3"), (0.1, "opened 3 of 3"),
        (0.4, "image 1 of 3"), (0.7, "image 2 of 3"), (1.0, "image 3 of 3"),
    ]  # fmt: skip


def test_a_stop_does_not_decode_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(200):
        save(noise(1, 1, "L", seed=i), tmp_path / f"{i}.png")
    decoded = []
    decode = image_folder._decode

    def slow(*arguments: object) -> Image.Image:
        decoded.append(arguments)
        return decode(*arguments)  # type: ignore[arg-type]

    def stop(fraction: float, note: str) -> None:
        if note.startswith("image"):
            raise KeyboardInterrupt

    monkeypatch.setattr(image_folder, "THREADS", 1)
    monkeypatch.setattr(image_folder, "_decode", slow)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, progress=stop)
    assert len(decoded) < 200


# Labels


def test_labels_asked_for(tmp_path: Path) -> None:
    for name in ("cat/0.png", "dog/1.png", "dog/more/2.png"):
        save(noise(2, 2), tmp_path / name)
    for wanted in ("auto", "folders"):
        loaded = load(tmp_path, labels=wanted)
        assert loaded.labels is not None
        assert (loaded.labels.tolist(), loaded.class_names) == ([0, 1, 1], ("cat", "dog"))
    loaded = load(tmp_path, labels="none")
    assert (loaded.labels, loaded.class_names, len(loaded.files)) == (None, (), 3)


def test_images_without_a_class(tmp_path: Path) -> None:
    for name in ("cat/0.png", "dog/1.png", "s1.png", "s0.png"):
        save(noise(2, 2), tmp_path / name)
    for wanted in ("auto", "folders"):
        with pytest.raises(
            DataError, match=r"2 images without a class: s0.png, s1.png; .* --labels none"
        ):
            load(tmp_path, labels=wanted)
    assert load(tmp_path, labels="none").files == ("cat/0.png", "dog/1.png", "s0.png", "s1.png")


def test_class_folders_that_are_not_there(tmp_path: Path) -> None:
    save(noise(2, 2), tmp_path / "a.png")
    with pytest.raises(DataError, match="has no class folders, which --labels folders asks for"):
        load(tmp_path, labels="folders")


def test_one_class(tmp_path: Path) -> None:
    save(noise(2, 2), tmp_path / "cat" / "a.png")
    (tmp_path / "dog").mkdir()  # without images
    message = "one class, 'cat'; a label would say nothing: give --labels none, or add classes"
    with pytest.raises(DataError, match=message):
        load(tmp_path)
    assert load(tmp_path, labels="none").files == ("cat/a.png",)


# Refusals


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    endings = ".bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp"
    with pytest.raises(DataError, match=f"holds no images: .* ends in {endings}, and no IDX file"):
        load(tmp_path)
    with pytest.raises(DataError, match="no data at .*gone.*; nothing is there"):
        load(tmp_path / "gone")


def test_mixed_sizes(tmp_path: Path) -> None:
    sizes = [(4, 6)] * 5 + [(6, 4)] * 3 + [(4, 4)] * 2
    for i, (height, width) in enumerate(sizes):
        save(noise(height, width), tmp_path / f"{i}.png")
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert str(caught.value) == (
        f"the images in {tmp_path} must be of one size; they have 3 (height x width): 5 of 4x6, "
        "3 of 6x4, 2 of 4x4; give --size 64 --fit crop|pad|resize"
    )
    for i in range(10, 20):
        save(noise(i, 1), tmp_path / f"{i}.png")
    message = r"they have 13 .*: 5 of 4x6, .* of 10x1, 1 of 11x1, and 8 more sizes; give --size"
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_sizes_are_compared_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    for name in ("a.jpg", "b.png", "c.tif", "d.webp"):
        save(noise(4, 6), tmp_path / name, exif=exif)
    save(noise(6, 4), tmp_path / "e.jpg")
    assert load(tmp_path).sample_shape == (3, 6, 4)


@pytest.mark.parametrize("size", [None, 4])
def test_every_damaged_file_is_named(tmp_path: Path, size: int | None) -> None:
    for name in ("bad/cut.jpg", "bad/cut.png", "bad/flipped.png", "good/a.png", "good/b.jpg"):
        save(noise(64, 64), tmp_path / name)
    for name in ("bad/cut.jpg", "bad/cut.png"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    content = bytearray((tmp_path / "bad/flipped.png").read_bytes())
    content[1000] ^= 255
    (tmp_path / "bad/flipped.png").write_bytes(content)
    (tmp_path / "bad/empty.png").touch()
    (tmp_path / "bad/text.gif").write_text("not an image")
    (tmp_path / "bad/link.png").symlink_to("nowhere.png")
    save(noise(64, 64), tmp_path / "bad" / "eps.eps")
    (tmp_path / "bad/eps.eps").rename(tmp_path / "bad/eps.png")  # what Pillow must not run
    with pytest.raises(DataError) as caught:
        load(tmp_path, size=size)
    head, *lines = str(caught.value).split("\n")
    assert head == f"7 of 9 images in {tmp_path} cannot be used; replace or remove them:"
    reasons = dict(line.strip().split(": ", 1) for line in lines)
    assert list(reasons) == sorted(reasons)
    assert "truncated" in reasons.pop("bad/cut.jpg")
    assert "truncated" in reasons.pop("bad/cut.png")
    assert reasons.pop("bad/flipped.png").startswith("damaged: ")
    unread = "not an image that Pillow reads (BMP, GIF, JPEG, PNG, TIFF, WEBP)"
    assert reasons == {
        "bad/empty.png": unread,
        "bad/eps.png": unread,
        "bad/link.png": "a link to nothing, or just removed",
        "bad/text.gif": unread,
    }


def test_nothing_but_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match="1 of 1 images in .* cannot be used"):
        load(tmp_path)


@pytest.mark.parametrize("size", [None, 2])
def test_more_than_eight_bits_are_refused(tmp_path: Path, size: int | None) -> None:
    deep = np.arange(6, dtype=np.uint16).reshape(2, 3)
    save(Image.fromarray(deep), tmp_path / "gray16.png")
    save(Image.fromarray(deep), tmp_path / "gray16.tif")
    save(Image.fromarray(deep.astype(np.int32)), tmp_path / "gray32.tif")
    save(Image.fromarray(deep.astype(np.float32)), tmp_path / "float.tif")
    png(tmp_path / "rgb16.png", 2, 16, bytes(range(36)))  # Pillow calls these RGB and RGBA
    png(tmp_path / "rgba16.png", 6, 16, bytes(range(48)))
    png(tmp_path / "la16.png", 4, 16, bytes(range(24)))
    save(noise(2, 3), tmp_path / "fine.png")
    with pytest.raises(DataError) as caught:
        load(tmp_path, size=size)
    head, *lines = str(caught.value).split("\n")
    assert head.startswith("7 of 8 images")
    assert all(line.endswith("convert it to 8") for line in lines)
    assert "  rgb16.png: 16 or more bits a channel (mode RGB); convert it to 8" in lines


def test_16_bits_a_pixel_are_no_16_bits_a_channel(tmp_path: Path) -> None:
    """A BMP of 5 bits a channel, which Pillow widens to 8."""
    head = struct.pack("<2sIHHI", b"BM", 62, 0, 0, 54)
    head += struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 0, 4, 0, 0, 0, 0)
    (tmp_path / "a.bmp").write_bytes(head + struct.pack("<HH", 31, 31 << 10) + bytes(4))
    assert as_nhwc(tmp_path).tolist() == [[[[0, 0, 255], [255, 0, 0]]]]


def test_a_mode_that_is_not_read(tmp_path: Path) -> None:
    save(noise(2, 2).convert("LAB"), tmp_path / "a.tif")
    with pytest.raises(DataError, match="a.tif: its mode is LAB; convert it to RGB"):
        load(tmp_path)


@pytest.mark.parametrize("limit", [16, 8])  # Pillow warns over the limit, raises over its double
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    save(noise(4, 4), tmp_path / "fine.png")
    save(noise(4, 5), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=f"bomb.png: more than the {limit} pixels that Pillow"):
        load(tmp_path, size=4)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(noise(2, 2), tmp_path / "a.png")
    save(noise(2, 2), tmp_path / "b.png")
    opened = Image.open

    def refuse(path: Path, **options: object) -> Image.Image:
        if path.name == "b.png":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(DataError, match="1 of 2 .*\n  b.png: no permission to read it"):
        load(tmp_path)


def test_more_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(noise(20, 20), tmp_path / "a.png")
    monkeypatch.setattr(reading, "memory", lambda: 1000)
    with pytest.raises(DataError, match="1 images of 20x20 need .* give a smaller --size, or"):
        load(tmp_path)


def test_linked_folders_and_circles(tmp_path: Path) -> None:
    save(noise(2, 2), tmp_path / "data" / "cat" / "a.png")
    save(noise(2, 2), tmp_path / "elsewhere" / "b.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path / "data")
    loaded = load(tmp_path / "data")
    assert loaded.files == ("cat/a.png", "dog/b.png")
    assert loaded.class_names == ("cat", "dog")
    (tmp_path / "data" / "self").symlink_to("self")
    with pytest.raises(DataError, match="data cannot be read: .*self"):
        load(tmp_path / "data")
