"""The one door for picture bytes: bounded before decoding, one documented rule for every pixel format.

Accepted: PNG, JPEG, WebP, GIF, BMP (the first frame of an animation). EXIF rotation is applied, transparency is laid
over white, 16-bit and CMYK are converted; the result is 8-bit RGB and the same bytes always give the same pixels.
"""

import base64
import io
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from weft.errors import ImageError, PathError

if TYPE_CHECKING:
    from PIL import Image as PILImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 89_000_000


def decode_image(data: bytes, *, where: str | None = None, max_pixels: int = MAX_PIXELS) -> "PILImage.Image":
    """Encoded bytes -> 8-bit RGB.

    Raises:
        ImageError: empty, too large, of another format, truncated or damaged; the message says which.
    """
    from PIL import Image as PILImage
    from PIL import ImageOps, UnidentifiedImageError

    if not data:
        raise ImageError("image is empty (0 bytes)", where=where)
    if len(data) > MAX_BYTES:
        raise ImageError(f"image has {len(data):,} bytes, more than {MAX_BYTES:,}", where=where, fix="save it smaller")
    try:
        # Pillow's own bomb check would only warn below twice its limit; ours is an error at the stated size
        limit, PILImage.MAX_IMAGE_PIXELS = PILImage.MAX_IMAGE_PIXELS, None
        try:
            picture: PILImage.Image = PILImage.open(io.BytesIO(data), formats=FORMATS)
        finally:
            PILImage.MAX_IMAGE_PIXELS = limit
        width, height = picture.size
        if width * height > max_pixels:
            raise ImageError(
                f"image is {width} x {height} pixels, more than {max_pixels:,} in all", where=where, fix="scale it down"
            )
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        return _to_rgb(picture)
    except UnidentifiedImageError as error:
        raise ImageError(f"bytes are not a picture in one of {', '.join(FORMATS)}", where=where) from error
    except ImageError:
        raise
    except Exception as error:  # decoders promise no kinds of errors: a broken EXIF block alone raises four
        raise ImageError(
            f"image is damaged or truncated: {error}", where=where, fix="export the picture again"
        ) from error


def read_image(root: Path, relative: str, *, where: str | None = None) -> bytes:
    """Bytes of a picture named by a document, which must lie under `root`.

    Raises:
        PathError: the path is absolute, climbs out, or leads out through a link.
        ImageError: there is no such file.
    """
    file = inside(root, relative, where=where)
    try:
        if not file.is_file():
            raise ImageError(f"image {relative} does not exist", where=where or str(root))
        if file.stat().st_size > MAX_BYTES:
            raise ImageError(f"image {relative} has more than {MAX_BYTES:,} bytes", where=where or str(root))
        return file.read_bytes()
    except OSError as error:
        raise ImageError(f"image {relative} cannot be read: {error.strerror}", where=where or str(root)) from error


def inside(root: Path, relative: str, *, where: str | None = None) -> Path:
    """`root / relative`, if that stays inside `root`; links are followed and checked."""
    windows = PureWindowsPath(relative)
    climbs = ".." in windows.parts or ".." in PurePosixPath(relative).parts
    if "\0" in relative or climbs or windows.drive or windows.is_absolute() or os.path.isabs(relative):
        raise PathError(
            f"path {relative!r} leaves the folder of its document",
            where=where,
            fix="use a path relative to that folder",
        )
    file = Path(root) / relative
    # not Path.resolve, which raises where links form a loop
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(root)):
        raise PathError(f"path {relative!r} leads out of its folder through a link", where=where)
    return file


def encode_png(picture: "PILImage.Image") -> bytes:
    """PNG bytes without metadata; the same pixels always give the same bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=False, compress_level=6)
    return buffer.getvalue()


def media_type(data: bytes) -> str:
    """`image/png` and the like, from the header of bytes that `decode_image` accepts."""
    from PIL import Image as PILImage

    with PILImage.open(io.BytesIO(data), formats=FORMATS) as picture:
        return PILImage.MIME[str(picture.format)]


def data_uri(data: bytes) -> str:
    """Encoded bytes as a page can hold them."""
    return f"data:{media_type(data)};base64,{base64.b64encode(data).decode()}"


def _to_rgb(picture: "PILImage.Image") -> "PILImage.Image":
    from PIL import Image as PILImage

    if picture.mode in ("I;16", "I;16B", "I"):
        import numpy as np

        # Pillow clips 16-bit values instead of scaling them
        values = np.asarray(picture).astype(np.float64)
        picture = PILImage.fromarray((values / 257).clip(0, 255).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = PILImage.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = PILImage.alpha_composite(white, picture)
    return picture.convert("RGB")
