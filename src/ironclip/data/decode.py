"""One decoder for the content hash and for the pixels, and the reasons for which it refuses a file."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000


class BadImageError(ValueError):
    """A file that is not usable as an image; the message is the reason."""


def decode(source: Path | bytes, strict: bool = True) -> Image.Image:
    """Decode to an RGB image of 8 bits a channel, or raise `BadImageError` with the reason.

    Strict, for folders of anyone's images: grey and bilevel images become RGB, the EXIF orientation is applied and
    a fully opaque alpha channel is dropped, since none of these changes what one sees. Refused: empty, corrupt or
    truncated files, files that are no image, palette, CMYK and 16-bit images, transparency, animations, and more
    than 64 megapixels: there a conversion would have to guess.
    Not strict, for the published sets, whose loaders all call Pillow's convert("RGB") on the first frame and ignore
    EXIF: the same, so that accuracies stay comparable; only unreadable and oversize files are refused.
    """
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as err:
        raise BadImageError(f"cannot be read ({err.strerror or err})") from None
    if not data:
        raise BadImageError("empty file (0 bytes)")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImageError(
                    f"oversize: {image.width} x {image.height} is more than {MAX_PIXELS // 10**6} megapixels"
                )
            if not strict:
                return image.convert("RGB")
            _refuse_by_header(image)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("not an image, or a corrupt header") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImageError(f"oversize: more than {MAX_PIXELS // 10**6} megapixels") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error) as err:
        raise BadImageError(f"corrupt or truncated ({err})") from None


def _refuse_by_header(image: Image.Image) -> None:
    if getattr(image, "n_frames", 1) > 1:
        raise BadImageError(f"animated or multi-page ({image.n_frames} frames)")  # type: ignore[attr-defined]
    if image.mode in ("P", "PA"):
        raise BadImageError("palette image")
    if image.mode == "CMYK":
        raise BadImageError("CMYK image")
    # Pillow opens 16-bit RGB files as mode RGB and drops the low byte; only the raw mode of the tiles tells.
    raw = str([tile[3] for tile in getattr(image, "tile", [])])
    if image.mode.startswith("I") or image.mode == "F" or ";16" in raw:
        raise BadImageError("more than 8 bits a channel")
    if image.mode not in ("1", "L", "LA", "RGB", "RGBA"):
        raise BadImageError(f"colour mode {image.mode}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("LA", "RGBA"):
        if image.getchannel("A").getextrema()[0] != 255:
            raise BadImageError("transparent pixels (alpha channel)")
    elif "transparency" in image.info:
        raise BadImageError("transparent pixels (transparent colour)")
    return image.convert("RGB")


def content_hash(image: Image.Image) -> str:
    """Hex SHA-256 of the RGB bytes of an image from `decode`."""
    return hashlib.sha256(image.tobytes()).hexdigest()
