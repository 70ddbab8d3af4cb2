"""Picture bytes have one meaning each: documented pixels, or a clear refusal before anything is decoded."""

import io
import os
import resource

import numpy as np
import pytest
from PIL import Image as PILImage

from tests.data.corpus import DAMAGED, encoded, picture, png_header
from weft.errors import ImageError, PathError
from weft.images import MAX_BYTES, decode_image, encode_png, read_image


def pixels(data: bytes) -> np.ndarray:
    decoded = decode_image(data)
    assert decoded.mode == "RGB"
    return np.asarray(decoded)


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257, 8000, 65535]], dtype=np.uint16)
    found = pixels(encoded(PILImage.fromarray(values), "PNG"))
    assert found[0, :, 0].tolist() == [0, 1, 31, 255]
    assert (found == found[..., :1]).all()


def test_transparency_is_laid_over_white():
    rgba = PILImage.fromarray(np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 51]]], dtype=np.uint8))
    assert pixels(encoded(rgba)).tolist() == [[[255, 255, 255], [255, 0, 0], [204, 204, 204]]]
    grey = PILImage.fromarray(np.array([[[0, 0], [0, 255]]], dtype=np.uint8), "LA")
    assert pixels(encoded(grey)).tolist() == [[[255] * 3, [0] * 3]]


def test_a_transparent_palette_entry_is_white():
    palette = PILImage.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert pixels(encoded(palette, transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    assert pixels(encoded(palette)).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_cmyk_is_converted():
    cmyk = PILImage.new("CMYK", (8, 8), (255, 0, 0, 0))
    found = pixels(encoded(cmyk, "JPEG", quality=95)).astype(int)
    assert abs(found - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = picture(1, (6, 4))
    turned = {
        1: upright,
        2: upright.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(PILImage.Transpose.ROTATE_180),
        4: upright.transpose(PILImage.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(PILImage.Transpose.TRANSPOSE),
        6: upright.transpose(PILImage.Transpose.ROTATE_90),
        7: upright.transpose(PILImage.Transpose.TRANSVERSE),
        8: upright.transpose(PILImage.Transpose.ROTATE_270),
    }[orientation]
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(encoded(turned, "PNG", exif=exif)), np.asarray(upright))


def test_the_first_frame_of_an_animation_counts():
    first, second = PILImage.new("RGB", (4, 4), (255, 0, 0)), PILImage.new("RGB", (4, 4), (0, 0, 255))
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    assert (pixels(data) == [255, 0, 0]).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_lossless_formats_keep_every_pixel(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(pixels(encoded(picture(3), kind, **options)), np.asarray(picture(3)))


def test_one_bit_is_black_and_white():
    assert pixels(encoded(PILImage.fromarray(np.array([[True, False]])))).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_damaged_bytes_are_refused_by_name(name):
    with pytest.raises(ImageError) as error:
        decode_image(DAMAGED[name], where=f"album.jsonl, line 3 ({name})")
    assert error.value.where == f"album.jsonl, line 3 ({name})"


def test_a_bomb_is_refused_without_the_memory_it_asks_for():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for side in (60_000, 9435):
        with pytest.raises(ImageError, match=f"{side} x {side} pixels"):
            decode_image(png_header(side, side))
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    )  # KiB; 60,000 squared would be 10 GiB


def test_random_damage_never_raises_anything_else():
    rng = np.random.default_rng(0)
    originals = [
        encoded(picture(1, (32, 32)), kind, **options)
        for kind, options in (("PNG", {}), ("JPEG", {}), ("GIF", {}), ("WEBP", {}), ("BMP", {}), ("PNG", {"bits": 8}))
    ]
    originals.append(encoded(picture(2).convert("P"), "PNG", transparency=b"\x00\x80"))
    originals.append(encoded(PILImage.new("CMYK", (16, 16)), "JPEG"))
    refused = 0
    for _ in range(400):
        data = bytearray(originals[rng.integers(len(originals))])
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(256)
        try:
            decode_image(bytes(data[: rng.integers(len(data) // 2, len(data) + 1)]))
        except ImageError:
            refused += 1
    assert refused > 100


def test_encoding_is_a_function_of_the_pixels():
    data = encode_png(picture(5))
    exif = PILImage.Exif()
    exif[0x010E] = "who took it"
    again = decode_image(encoded(picture(5), exif=exif))
    assert encode_png(again) == data
    assert b"who took it" not in data
    assert PILImage.open(io.BytesIO(data)).info == {}


@pytest.mark.parametrize(
    "path",
    ["../x.png", "a/../../x.png", "/etc/hostname", "C:\\x.png", "C:x.png", "\\\\host\\x.png", "..\\x.png", "a\0.png",
     "link/x.png", "loop/x.png"],
)  # fmt: skip
def test_paths_that_leave_the_folder_are_refused(tmp_path, path):
    (tmp_path / "x.png").write_bytes(b"outside")
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "link").symlink_to("..")
    (root / "loop").symlink_to("loop")
    with pytest.raises((PathError, ImageError)) as error:
        read_image(root, path)
    assert isinstance(error.value, PathError) or path.startswith("loop")


@pytest.mark.parametrize("path", ["none.png", "a", "x" * 300, "x/" * 3000, "."])
def test_paths_to_nothing_are_refused(tmp_path, path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ImageError):
        read_image(tmp_path, path)


def test_a_pipe_is_no_picture_and_nobody_waits_for_its_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError) as error:
        read_image(tmp_path, "pipe.png")
    assert error.value.reason == "image_missing"


def test_what_has_too_many_bytes_is_not_read(tmp_path):
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ImageError) as error:
        read_image(tmp_path, "large.png")
    assert error.value.reason == "image_bytes"
    os.truncate(tmp_path / "large.png", MAX_BYTES)
    assert len(read_image(tmp_path, "large.png")) == MAX_BYTES


def test_a_picture_is_read_to_its_end_however_little_comes_at_once(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"some bytes")
    read = os.read
    monkeypatch.setattr("weft.images.os.read", lambda handle, size: read(handle, min(size, 3)))
    assert read_image(tmp_path, "a.png") == b"some bytes"


def test_folders_that_were_looked_at_open_no_way_out(tmp_path):
    (tmp_path / "x.png").write_bytes(b"outside")
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "x.png").write_bytes(b"inside")
    (root / "a" / "near.png").symlink_to("x.png")
    (root / "a" / "far.png").symlink_to("../../x.png")
    (root / "a" / "b").symlink_to("../..")
    looked_at: set[str] = set()
    assert read_image(root, "a/x.png", looked_at=looked_at) == b"inside"
    assert looked_at == {"a"}
    assert read_image(root, "a/near.png", looked_at=looked_at) == b"inside"
    for path in ("a/far.png", "a/b/x.png"):
        with pytest.raises(PathError):
            read_image(root, path, looked_at=looked_at)
    assert looked_at == {"a"}


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it skips
def test_a_damaged_exif_block_is_an_image_error_whatever_pillow_makes_of_it():
    exif = PILImage.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    good = encoded(picture(3, (16, 16)), "JPEG", exif=exif.tobytes())
    start, rng, refused = good.index(b"Exif"), np.random.default_rng(0), 0
    for _ in range(3000):
        bad = bytearray(good)
        for at in rng.integers(start + 6, start + 50, size=3):
            bad[at] = rng.integers(256)
        try:
            pixels(bytes(bad))
        except ImageError:
            refused += 1
    assert refused
