"""Pictures and records, good and bad, that several tests feed to the data pipeline."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image as PILImage


def picture(seed: int = 0, size: tuple[int, int] = (24, 16)) -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


def encoded(image: PILImage.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int = 0) -> bytes:
    return encoded(picture(seed))


def png_header(width: int, height: int) -> bytes:
    """A valid PNG header that claims a size, and next to nothing behind it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


DAMAGED = {
    "empty.png": b"",
    "one_byte.png": b"\x89",
    "text.png": b"this is no picture",
    "page.jpg": b"<!doctype html><html></html>",
    "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "cut.png": png()[:200],
    "cut.jpg": encoded(picture(1, (64, 64)), "JPEG")[:600],
    "bomb.png": png_header(60_000, 60_000),
    "flat.png": png_header(0, 10),
    "tiff.png": encoded(picture(2), "TIFF"),
}
"""Name -> bytes that no door lets in."""
REASONS = {
    **dict.fromkeys(DAMAGED, "image_unidentified"),
    **dict.fromkeys(("cut.png", "cut.jpg"), "image_truncated"),
    "bomb.png": "image_pixels",
}
"""Why."""


def chat(identity: str | None, *images: str, text: str = "look") -> dict:
    content = [{"type": "text", "text": text}, *({"type": "image", "image": image} for image in images)]
    record = {"messages": [{"role": "user", "content": "show"}, {"role": "assistant", "content": content}]}
    return record if identity is None else {"id": identity, **record}


def line(record: object) -> bytes:
    return json.dumps(record).encode() + b"\n"


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


GOOD = 3
"""Records of `MIXED` that are kept; the first two lines and the last."""
MIXED = (
    (b"\xef\xbb\xbf" + line(chat("first", "a.png")), None),
    (line(chat(None, "b.png", "a.png")).replace(b"\n", b"\r\n"), None),
    (b"\r\n", None),
    (b'{"messages": [\n', "broken_json"),
    (b'{"id": "x", "id": "y", "messages": []}\n', "duplicate_key"),
    (b'{"id": "x", "score": NaN}\n', "bad_number"),
    (b'{"id": "\\ud800"}\n', "lone_surrogate"),
    (b'{"id": "\xff"}\n', "not_utf8"),
    (b"[" * 100_000 + b"\n", "too_deep"),
    (b"null\n", "bad_record"),
    (line({"messages": "none"}), "bad_record"),
    (line({"messages": [{"role": "robot", "content": "hi"}]}), "bad_record"),
    (line({"messages": [{"role": "assistant", "content": [{"type": "sound"}]}]}), "bad_record"),
    (line({"id": 7, **chat(None)}), "bad_record"),
    (line(chat("gone", "gone.png")), "image_missing"),
    (line(chat("up", "../outside.png")), "image_path"),
    (line(chat("root", "/etc/hostname")), "image_path"),
    (line(chat("drive", "C:\\secret.png")), "image_path"),
    (line(chat("link", "link.png")), "image_path"),
    (line(chat("folder", "folder")), "image_missing"),
    (line(chat("long", "x" * 5000 + ".png")), "image_missing"),
    *((line(chat(name, f"bad/{name}")), REASONS[name]) for name in sorted(DAMAGED)),
    (line({"id": "asked", "messages": [{"role": "user", "content": "only asked"}]}), "no_answer"),
    (line({"id": "blank", "messages": [{"role": "assistant", "content": " \n"}]}), "no_answer"),
    (line(chat("first", "b.png")), "duplicate_id"),
    (line({"id": "last", "source": "elsewhere", **chat(None, "b.png", text="nul \0 <b>&</b>")}), None),
)
"""Lines of a JSONL file with the reason each is dropped for; None: kept, or no record."""


def write_mixed(folder: Path, lines: tuple[tuple[bytes, str | None], ...] = MIXED) -> Path:
    """The JSONL file of `lines`, with the pictures they name beside it and one to be kept from them outside."""
    write(folder, {"a.png": png(1), "b.png": encoded(picture(2), "JPEG"), "folder/x.txt": b"", "../outside.png": png()})
    write(folder / "bad", DAMAGED)
    if not (folder / "link.png").is_symlink():
        (folder / "link.png").symlink_to("../outside.png")
    file = folder / "mixed.jsonl"
    file.write_bytes(b"".join(data for data, _ in lines))
    return file
