"""The one door for picture bytes: bounded before decoding, one documented rule for every pixel format.

Accepted: PNG, JPEG, WebP, GIF, BMP (the first frame of an animation). EXIF rotation is applied, transparency is laid
over white, 16-bit and CMYK are converted; the result is 8-bit RGB and the same bytes always give the same pixels.

What is refused has one of these reasons, in the order in which they are looked for:

    image_unidentified   no bytes, or none of these formats
    image_bytes          more encoded bytes than `MAX_BYTES`
    image_truncated      the bytes end before the picture does
    image_pixels         more pixels than the limit, by the header; or more scans of them than anybody makes
    image_damaged        checksums, or the decoder, say that the bytes are not those that were written
"""

import base64
import errno
import functools
import io
import os
import stat
import threading
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from weft.errors import ImageError, PathError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image as PILImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 89_000_000
MAX_WORK = 2_000_000_000
"""Pixels of a JPEG times the scans that it is told in: each goes over all of them, and takes few bytes."""
_PNG = b"\x89PNG\r\n\x1a\n"
_READING = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
"""A pipe without a writer would be waited for."""
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""0 where a system cannot open a file only if it is no link."""
_OPENING = threading.Lock()


def decode_image(
    data: bytes, *, where: str | None = None, max_pixels: int = MAX_PIXELS, least: int | None = None
) -> "PILImage.Image":
    """Encoded bytes -> 8-bit RGB.

    Args:
        least: a JPEG may come smaller, both its sides divided by 2, 4 or 8, as long as neither falls below this: its
            decoder then does less. What is refused stays the same.

    Raises:
        ImageError: empty, too large, of another format, truncated or damaged; the message and `reason` say which.
    """
    from PIL import ImageOps, UnidentifiedImageError

    if not data:
        raise ImageError("image is empty (0 bytes)", where=where, reason="image_unidentified")
    if len(data) > MAX_BYTES:
        raise ImageError(
            f"image has {len(data):,} bytes, more than {MAX_BYTES:,}",
            where=where,
            fix="save it smaller",
            reason="image_bytes",
        )
    try:
        _check_ends(data)
        picture = _open(data)
        width, height = picture.size
        if width * height > max_pixels:
            raise ImageError(
                f"image is {width} x {height} pixels, more than {max_pixels:,} in all",
                fix="scale it down",
                reason="image_pixels",
            )
        if picture.format in ("JPEG", "MPO") and width * height * data.count(b"\xff\xda") > MAX_WORK:
            raise ImageError("image is a JPEG in too many scans", fix="save it again", reason="image_pixels")
        if least is not None:
            picture.draft("RGB", (least, least))
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        return _to_rgb(picture)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"bytes are not a picture in one of {', '.join(FORMATS)}", where=where, reason="image_unidentified"
        ) from error
    except ImageError as error:
        raise ImageError(error.what, where=where, fix=error.fix, reason=error.reason) from error.__cause__
    except Exception as error:  # decoders promise no kinds of errors: a broken EXIF block alone raises four
        raise ImageError(
            f"image is damaged or truncated: {error}",
            where=where,
            fix="export the picture again",
            reason="image_truncated" if "truncated" in str(error).lower() else "image_damaged",
        ) from error


def read_image(root: Path, relative: str, *, where: str | None = None, looked_at: set[str] | None = None) -> bytes:
    """Bytes of a picture named by a document, which must lie under `root`.

    Args:
        looked_at: folders under `root` that were found to be reached by no link, more are put in: pictures of one
            document mostly lie in one folder. Not to be kept for longer.

    Raises:
        PathError: the path is absolute, climbs out, or leads out through a link.
        ImageError: there is no such file (image_missing), it may not be read (image_unreadable) or has too many bytes
            (image_bytes).
    """
    at = where or root
    try:
        handle = _open_inside(root, relative, where, set() if looked_at is None else looked_at)
        try:
            # of what was opened: between two looks at a name, something else may get it
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"image {relative} does not exist", where=str(at), reason="image_missing")
            if status.st_size > MAX_BYTES:
                raise ImageError(
                    f"image {relative} has more than {MAX_BYTES:,} bytes", where=str(at), reason="image_bytes"
                )
            return _read(handle, status.st_size)
        finally:
            os.close(handle)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise ImageError(f"image {relative} does not exist", where=str(at), reason="image_missing") from error
    except OSError as error:
        is_no_name = error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO)
        raise ImageError(
            f"image {relative} cannot be read: {error.strerror}",
            where=str(at),
            reason="image_missing" if is_no_name else "image_unreadable",
        ) from error


def inside(root: Path, relative: str, *, where: str | None = None) -> Path:
    """`root / relative`, if that stays inside `root`; links are followed and checked."""
    return Path(_inside(root, relative, where))


def _open_inside(root: Path, relative: str, where: str | None, looked_at: set[str]) -> int:
    """A descriptor to read from: of a file, or of what is none, on which nothing waits."""
    # strings, and no step is looked at twice: this is done for every picture
    folder = relative.rpartition("/")[0]
    if _NO_LINK and _is_plain(relative) and (folder in looked_at or _has_no_link(root, folder)):
        looked_at.add(folder)
        try:
            return os.open(f"{root!s}/{relative}", _READING | _NO_LINK)
        except (OSError, ValueError):
            pass  # a link, which may stay inside, or nothing to be read: the slow way tells
    return os.open(_inside(root, relative, where), _READING)


def _read(handle: int, size: int) -> bytes:
    data = os.read(handle, size)
    while len(data) < size and (more := os.read(handle, size - len(data))):
        data += more
    return data


def _inside(root: Path, relative: str, where: str | None) -> str:
    is_plain = _is_plain(relative)
    if not is_plain and _leaves(relative):
        raise PathError(
            f"path {relative!r} leaves the folder of its document",
            where=where,
            fix="use a path relative to that folder",
        )
    if is_plain and _has_no_link(root, relative):
        return f"{root}/{relative}"
    file = os.fspath(Path(root) / relative)
    # not Path.resolve, which raises where links form a loop
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(root)):
        raise PathError(f"path {relative!r} leads out of its folder through a link", where=where)
    return file


def _is_plain(relative: str) -> bool:
    """Whether a path holds nothing that may lead out of a folder, on some system; most do not."""
    return not (relative.startswith("/") or ".." in relative or "\\" in relative or ":" in relative or "\0" in relative)


def _leaves(relative: str) -> bool:
    windows = PureWindowsPath(relative)
    climbs = ".." in windows.parts or ".." in PurePosixPath(relative).parts
    return "\0" in relative or climbs or bool(windows.drive) or windows.is_absolute() or os.path.isabs(relative)


def _has_no_link(root: Path, relative: str) -> bool:
    """Whether every step from `root` on is there and no link: then it lies inside, and most do."""
    at = str(root)
    try:
        for name in relative.split("/") if relative else ():
            at = f"{at}/{name}"
            if stat.S_ISLNK(os.lstat(at).st_mode):
                return False
    except (OSError, ValueError):
        return False
    return True


def encode_png(picture: "PILImage.Image") -> bytes:
    """PNG bytes without metadata; the same pixels always give the same bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=False, compress_level=6)
    return buffer.getvalue()


def media_type(data: bytes) -> str:
    """`image/png` and the like, from the header of bytes that `decode_image` accepts."""
    from PIL import Image as PILImage

    with PILImage.open(io.BytesIO(data), formats=FORMATS) as picture:
        # several JPEGs in one file: the first is what counts
        return PILImage.MIME["JPEG" if picture.format == "MPO" else str(picture.format)]


def data_uri(data: bytes) -> str:
    """Encoded bytes as a page can hold them."""
    return f"data:{media_type(data)};base64,{base64.b64encode(data).decode()}"


def _open(data: bytes) -> "PILImage.Image":
    """The header; nothing is decoded."""
    from PIL import Image as PILImage

    # Pillow's own bomb check would only warn below twice its limit; ours is an error at the stated size. The limit is
    # one for the whole process: two threads that took it away at once would not put it back
    with _OPENING:
        limit, PILImage.MAX_IMAGE_PIXELS = PILImage.MAX_IMAGE_PIXELS, None
        try:
            return PILImage.open(io.BytesIO(data), formats=FORMATS)
        finally:
            PILImage.MAX_IMAGE_PIXELS = limit


def _check_ends(data: bytes) -> None:
    """Raise `ImageError` where a container itself tells of bytes that are not there or have changed.

    Pillow reads neither the checksums of a PNG's pixels nor what follows them, and calls a cut WebP unreadable.
    """
    if data.startswith(_PNG):
        _check_png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise _truncated(len(data))


def _check_png(data: bytes) -> None:
    view, at, name = memoryview(data), len(_PNG), b""
    while name != b"IEND":
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        if end > len(data) or at + 12 > len(data):
            raise _truncated(len(data))
        name = bytes(view[at + 4 : at + 8])
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise ImageError(f"image is damaged: wrong checksum of {name!r} at byte {at}", fix="export it again")
        at = end


def _truncated(size: int) -> ImageError:
    return ImageError(f"image is truncated: it goes on behind its {size:,} bytes", reason="image_truncated")


def _to_rgb(picture: "PILImage.Image") -> "PILImage.Image":
    from PIL import Image as PILImage

    if picture.mode in ("I;16", "I;16B", "I"):
        import numpy as np

        # Pillow clips 16-bit values instead of scaling them
        picture = PILImage.fromarray(_eight_bits()[np.asarray(picture).clip(0, 65_535)])
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = PILImage.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = PILImage.alpha_composite(white, picture)
    return picture.convert("RGB")


@functools.cache
def _eight_bits() -> "np.ndarray":
    """The nearest 8-bit value of every 16-bit one: a table, for arithmetic would take eight bytes a pixel."""
    import numpy as np

    return ((np.arange(65_536) + 128) // 257).astype(np.uint8)
