"""What each picture goes through, for peers that have no operators for it."""

import io

import imagehash
from PIL import Image

MIN_SIDE, MAX_ASPECT = 256, 3.0


def hash_of(data: bytes) -> str | None:
    """The perceptual hash of a picture; ``None`` if it is too small, too long or broken."""
    try:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
    except OSError:
        return None
    short, long = sorted(picture.size)
    small = short < MIN_SIDE or long > MAX_ASPECT * short
    return None if small else str(imagehash.phash(picture))
