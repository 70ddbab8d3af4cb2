"""Pictures, paths and archives that are damaged, or made to do harm, and odd ones that are neither."""

import gzip
import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from tests.data.corpus import encoded, picture, png_header

SIDE = 48


def _photo(seed: int = 1) -> PILImage.Image:
    return picture(seed, (SIDE, SIDE))


def _cut(data: bytes, part: float) -> bytes:
    return data[: int(len(data) * part)]


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _with_chunk(name: bytes, data: bytes) -> bytes:
    """A good PNG with one more chunk behind its header."""
    good = encoded(_photo())
    return good[:33] + _chunk(name, data) + good[33:]


def _changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _flat(side: int) -> bytes:
    """A valid PNG of one colour, one bit a pixel, that is small in spite of its size."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    pixels = b"".join(packer.compress(row * 1000) for _ in range(side // 1000)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _jpeg_of(width: int, height: int) -> bytes:
    """A JPEG whose header claims a size."""
    data = bytearray(encoded(_photo(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _scans(number: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encoded(_photo(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * number + data[-2:]


def _frames(number: int) -> bytes:
    data = encoded(PILImage.new("P", (SIDE, SIDE)), "GIF")
    body = data[13 + 3 * 2 ** ((data[10] & 7) + 1) : -1]
    return data[:-1] + body * (number - 1) + data[-1:]


def _animated(kind: str) -> bytes:
    return encoded(_photo(1), kind, save_all=True, append_images=[_photo(2)])


def _exif(count: int) -> bytes:
    """A JPEG with a block of metadata whose entries claim more values than there are bytes in the world."""
    entries = b"".join(struct.pack(">HHII", 0x0112 + i, 5, count, 8) for i in range(200))
    tiff = b"MM\0*" + struct.pack(">I", 8) + struct.pack(">H", 200) + entries + b"\0\0\0\0"
    return encoded(_photo(), "JPEG", exif=b"Exif\0\0" + tiff)


def _adobe(data: bytes) -> bytes:
    assert b"Adobe" in data
    return data


def _zip(data: bytes) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("a.txt", b"hello")
    return data + buffer.getvalue()


def _bomb_of_text() -> bytes:
    return _with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(30_000_000), 9))


def _noted() -> bytes:
    note = PngInfo()
    note.add_itxt("a", "b" * 1000)
    return encoded(_photo(), pnginfo=note)


_PNG, _JPEG, _WEBP, _GIF, _BMP = (encoded(_photo(), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"))

PICTURES: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "empty.png": (lambda: b"", "image_unidentified"),
    "one_byte.png": (lambda: b"\x89", "image_unidentified"),
    "text.png": (lambda: b"this is no picture", "image_unidentified"),
    "page.jpg": (lambda: b"<!doctype html><html><body>404</body></html>", "image_unidentified"),
    "drawing.png": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><rect/></svg>", "image_unidentified"),
    "icon.ico": (lambda: encoded(_photo(), "ICO"), "image_unidentified"),
    "scan.tiff": (lambda: encoded(_photo(), "TIFF"), "image_unidentified"),
    "stars.fits": (lambda: b"SIMPLE  =                    T".ljust(2880), "image_unidentified"),
    "layers.psd": (lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3), "image_unidentified"),
    "page.pdf": (lambda: encoded(_photo(), "PDF"), "image_unidentified"),
    "script.eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", "image_unidentified"),
    "mark_before.png": (lambda: b"\xef\xbb\xbf" + _PNG, "image_unidentified"),
    "cut_10.png": (lambda: _cut(_PNG, 0.1), "image_truncated"),
    "cut_50.png": (lambda: _cut(_PNG, 0.5), "image_truncated"),
    "cut_99.png": (lambda: _cut(_PNG, 0.99), "image_truncated"),
    "without_end.png": (lambda: _PNG[:-12], "image_truncated"),
    "cut_10.jpg": (lambda: _cut(_JPEG, 0.1), "image_truncated"),
    "cut_50.jpg": (lambda: _cut(_JPEG, 0.5), "image_truncated"),
    "cut_99.jpg": (lambda: _cut(_JPEG, 0.99), "image_truncated"),
    "cut.webp": (lambda: _cut(_WEBP, 0.6), "image_truncated"),
    "cut.gif": (lambda: _cut(_GIF, 0.6), "image_truncated"),
    "cut.bmp": (lambda: _cut(_BMP, 0.6), "image_truncated"),
    "header_checksum.png": (lambda: _changed(_PNG, 30), "image_damaged"),
    "pixels_checksum.png": (lambda: _changed(_PNG, _PNG.index(b"IEND") - 6), "image_damaged"),
    "a_changed_byte.png": (lambda: _changed(_PNG, len(_PNG) // 2), "image_damaged"),
    "bomb_of_text.png": (_bomb_of_text, "image_damaged"),
    "zero_width.png": (lambda: png_header(0, 10), "image_unidentified"),
    "no_pixels.png": (lambda: png_header(8, 8), "image_truncated"),
    "bomb.png": (lambda: png_header(60_000, 60_000), "image_pixels"),
    "flat_30000.png": (lambda: _flat(30_000), "image_pixels"),
    "bomb.jpg": (lambda: _jpeg_of(65_500, 65_500), "image_pixels"),
    "a_text_of_60_MiB.png": (lambda: _with_chunk(b"iTXt", b"a\0\0\0\0\0" + bytes(60 * 2**20)), "image_bytes"),
    "10000_frames.gif": (lambda: _frames(10_000), None),
    "animated.webp": (lambda: _animated("WEBP"), None),
    "animated.png": (lambda: _animated("PNG"), None),
    "animated.gif": (lambda: _animated("GIF"), None),
    "several.mpo": (lambda: _animated("MPO"), None),
    "cmyk.jpg": (lambda: _adobe(encoded(_photo().convert("CMYK"), "JPEG")), None),
    "sixteen_grey.png": (lambda: encoded(PILImage.new("I;16", (SIDE, SIDE), 8000)), None),
    "one_bit.png": (lambda: encoded(_photo().convert("1")), None),
    "palette.png": (lambda: encoded(_photo().convert("P"), transparency=0), None),
    "grey_alpha.png": (lambda: encoded(_photo().convert("LA")), None),
    "turned.jpg": (lambda: encoded(_photo(), "JPEG", exif=_turned(6)), None),
    "exif_of_ages.jpg": (lambda: _exif(0xFFFFFFF), None),
    "profile_of_nothing.png": (lambda: encoded(_photo(), icc_profile=b"no profile at all"), None),
    "profile_of_nothing.jpg": (lambda: encoded(_photo(), "JPEG", icc_profile=b"no profile at all"), None),
    "with_a_text.png": (_noted, None),
    "one_pixel.png": (lambda: encoded(picture(1, (1, 1))), None),
    "tall.png": (lambda: encoded(picture(1, (1, 20_000))), None),
    "and_a_zip.png": (lambda: _zip(_PNG), None),
    "500_scans.jpg": (lambda: _scans(500), None),
    "CAPITALS.JPG": (lambda: _JPEG, None),
    "no_ending": (lambda: _WEBP, None),
    "new\nline ü.png": (lambda: _PNG, None),
}  # fmt: skip
"""Name -> bytes, and why they are refused; None: they are a picture."""


def _turned(orientation: int) -> PILImage.Exif:
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    return exif


PATHS: dict[str, str | None] = {
    "../outside.png": "image_path",
    "a/../../outside.png": "image_path",
    "a/../good.png": "image_path",
    "..": "image_path",
    "/etc/hostname": "image_path",
    "//etc/hostname": "image_path",
    "/dev/zero": "image_path",
    "/dev/stdin": "image_path",
    "/proc/self/environ": "image_path",
    "C:\\good.png": "image_path",
    "C:good.png": "image_path",
    "c:/good.png": "image_path",
    "\\\\host\\share\\good.png": "image_path",
    "//host/share/good.png": "image_path",
    "\\\\?\\C:\\good.png": "image_path",
    "\\\\.\\pipe\\good": "image_path",
    "..\\outside.png": "image_path",
    "a\\..\\..\\outside.png": "image_path",
    "good.png\0": "image_path",
    "good.png\0.jpg": "image_path",
    "link_to_file.png": "image_path",
    "link_to_folder/outside.png": "image_path",
    "link_to_neighbour/outside.png": "image_path",
    "link_to_device": "image_path",
    "link_to_nothing": "image_missing",
    "loop": "image_missing",
    "loop/good.png": "image_missing",
    "fifo": "image_missing",
    "a": "image_missing",
    ".": "image_missing",
    "none.png": "image_missing",
    "good.png/": None,
    "good.png/good.png": "image_missing",
    "x" * 300: "image_missing",
    "x/" * 3000: "image_missing",
    "~/good.png": "image_missing",
    "$PWD/good.png": "image_missing",
    "file:///etc/hostname": "image_missing",
    "https://example.org/good.png": "image_missing",
    "%2e%2e/outside.png": "image_missing",
    "\uff0e\uff0e/outside.png": "image_missing",
    "\u2024\u2024/outside.png": "image_missing",
    "pipe:cat good.png": "image_missing",
    "|cat good.png": "image_missing",
    "*.png": "image_missing",
    "a/good.png": None,
    "./good.png": None,
    "link_inside.png": None,
}
"""What a document calls its picture -> why it is refused; None: it is a picture inside."""


def write_paths(folder: Path) -> None:
    """What `PATHS` lead to: a folder `in`, and beside it what must not be reached."""
    inside, neighbour = folder / "in", folder / "in-other"
    for each in (inside / "a", neighbour):
        each.mkdir(parents=True)
    for file in (inside / "good.png", inside / "a" / "good.png", folder / "outside.png", neighbour / "outside.png"):
        file.write_bytes(_PNG)
    links = {
        "link_to_file.png": "../outside.png",
        "link_to_folder": "..",
        "link_to_neighbour": "../in-other",
        "link_to_device": "/dev/zero",
        "link_to_nothing": "nothing.png",
        "link_inside.png": "a/good.png",
        "loop": "loop",
    }
    for name, target in links.items():
        (inside / name).symlink_to(target)
    os.mkfifo(inside / "fifo")


Member = tuple[tarfile.TarInfo, bytes]


def _member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def _pair(key: str) -> list[Member]:
    return [_member(f"{key}.png", _PNG), _member(f"{key}.txt", f"a picture called {key}".encode())]


def _tar(members: Iterable[Member], mode: str = "w") -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode=mode) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _special(kind: bytes, link: str = "") -> bytes:
    return _tar([*_pair("a"), _member("b.png", kind=kind, link=link), *_pair("c")])


def _claims(size: int) -> bytes:
    """A member whose header claims a size; there is nothing behind it."""
    info = tarfile.TarInfo("b.png")
    info.size = size
    before = b"".join(known.tobuf() + data.ljust(-len(data) % 512 + len(data), b"\0") for known, data in _pair("a"))
    return before + info.tobuf()


_TWO = _tar([*_pair("a"), *_pair("b")])

TARS: dict[str, tuple[bytes, list[str], int]] = {
    "link.tar": (_special(tarfile.SYMTYPE, "/etc/hostname"), ["archive_link"], 2),
    "hard_link.tar": (_special(tarfile.LNKTYPE, "a.png"), ["archive_link"], 2),
    "device.tar": (_special(tarfile.CHRTYPE), ["archive_link"], 2),
    "block.tar": (_special(tarfile.BLKTYPE), ["archive_link"], 2),
    "fifo.tar": (_special(tarfile.FIFOTYPE), ["archive_link"], 2),
    "names_that_climb.tar": (_tar([*_pair("../../a"), *_pair("/etc/b"), *_pair("C:\\c")]), [], 3),
    "twice.tar": (_tar([*_pair("a"), _member("a.png", _PNG)]), ["duplicate_key"], 0),
    "crowd.tar": (_tar([*_pair("a"), *(_member(f"b.{i}.png", _PNG) for i in range(70))]), ["too_large"], 1),
    "huge_member.tar": (_tar([*_pair("a"), _member("b.png", bytes(21 * 2**20)), *_pair("c")]), ["too_large"], 2),
    "cut.tar": (_TWO[: _TWO.index(b"b.png") + 700], ["damaged_file"], 1),
    "claims_a_terabyte.tar": (_claims(2**40), ["damaged_file"], 1),
    "no_archive.tar": (b"this is no archive at all", ["damaged_file"], 0),
    "bomb.tar.gz": (
        _tar([_member(f"{i}.bin", bytes(10_000_000)) for i in range(4)], "w:gz"), ["missing_key", "damaged_file"], 0
    ),
    "cut.tar.gz": (gzip.compress(_TWO, mtime=0)[:-200], ["damaged_file"], 0),
    "empty.tar": (b"", ["damaged_file"], 0),
}  # fmt: skip
"""Bytes of an archive of pairs, the reasons of what is lost, and how many pairs are kept."""


def _zip_of(members: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _locked(data: bytes) -> bytes:
    """The same archive, which says that it is encrypted."""
    locked = bytearray(data)
    locked[6] |= 1
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    return bytes(locked)


_LINES = b'{"image": "good.png", "caption": "a picture"}\n'
_VARIED = b"".join(_LINES.replace(b"a picture", os.urandom(60).hex().encode()) for _ in range(100))
_EMPTY = (b" " * 2**20 + b"\n") * 40

PACKED: dict[str, tuple[bytes, list[str], int]] = {
    "two.jsonl.zip": (_zip_of({"a.jsonl": _LINES, "b.jsonl": _LINES}), ["archive_members"], 0),
    "none.jsonl.zip": (_zip_of({}), ["archive_members"], 0),
    "climbs.jsonl.zip": (_zip_of({"../../../a.jsonl": _LINES}), [], 1),
    "locked.jsonl.zip": (_locked(_zip_of({"a.jsonl": _LINES})), ["archive_encrypted"], 0),
    "bomb.jsonl.zip": (_zip_of({"a.jsonl": _EMPTY}), ["archive_ratio"], 0),
    "cut.jsonl.zip": (_zip_of({"a.jsonl": _LINES})[:-30], ["damaged_file"], 0),
    "no_archive.jsonl.zip": (b"this is no archive", ["damaged_file"], 0),
    "bomb.jsonl.gz": (gzip.compress(_LINES + _EMPTY, mtime=0), ["archive_ratio"], 1),
    "cut.jsonl.gz": (gzip.compress(_LINES, mtime=0)[:-6], ["damaged_file"], 1),
    "checksum.jsonl.gz": (_changed(gzip.compress(_LINES, mtime=0), -8), ["damaged_file"], 1),
    "no_archive.jsonl.gz": (_LINES, ["damaged_file"], 0),
    "behind_the_end.jsonl.gz": (gzip.compress(_LINES, mtime=0) + b"more", ["damaged_file"], 1),
}  # fmt: skip
"""As `TARS`, of lines."""
