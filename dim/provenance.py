"""What a painted image says of itself: by which model it was painted, and how.

In a PNG it is a text chunk ``dim``, in JPEG and WebP the description of the picture in EXIF; both
hold one JSON object of texts. Programs that show such things show it.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Mapping
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from dim import __version__

KEY = "dim"
SOFTWARE = f"Draw-In-Mind {__version__}"
FORMATS = ("PNG", "JPEG", "WEBP")
_MOST = 1 << 16  # characters; a server writes a few hundred


def words(
    *,
    model: str,
    seed: int,
    steps: int,
    guidance_scale: float,
    blueprint: str | None = None,
    **more: str | None,
) -> dict[str, str]:
    """What an image says of itself; of its blueprint the SHA-256, for the text may be private.

    ``more``: what else there is to say, such as ``release`` and ``model_hash``; ``None`` is not.
    """
    said = {
        "model": model,
        "version": __version__,
        "seed": str(seed),
        "steps": str(steps),
        "guidance_scale": str(guidance_scale),
    }
    if blueprint is not None:
        said["blueprint_sha256"] = hashlib.sha256(blueprint.encode()).hexdigest()
    return said | {name: value for name, value in more.items() if value}


def save_options(format: str, values: Mapping[str, str]) -> dict[str, Any]:
    """What to tell Pillow's ``save`` so that the file says ``values``; nothing if there are none.

    ``format``: png, jpeg or webp.
    """
    if not values:
        return {}
    said = json.dumps(dict(values), sort_keys=True)  # in ASCII, as EXIF wants it
    if format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("Software", SOFTWARE)
        chunks.add_text(KEY, said)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = SOFTWARE
    exif[ExifTags.Base.ImageDescription] = said
    return {"exif": exif}


def read(data: bytes) -> dict[str, str] | None:
    """What an encoded image says of itself; ``None`` if it says nothing that is ours.

    It says so without proof: whoever changes the pixels can leave it as it is, or write it as he
    likes. Nothing of it is to be followed or shown as it stands.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.format == "PNG":  # whose EXIF may stand behind the pixels
                said = image.info.get(KEY)
            else:
                said = image.getexif().get(ExifTags.Base.ImageDescription)
        values = json.loads(said) if isinstance(said, str) and len(said) <= _MOST else None
    except Exception:  # Pillow raises nearly anything on damaged files
        return None
    if not isinstance(values, dict) or not all(isinstance(item, str) for item in values.values()):
        return None
    return values if "model" in values else None
