"""Pictures as data URIs: false colour as WebP, class maps as PNG with a palette."""

from __future__ import annotations

import base64
import io
from typing import Mapping

import numpy as np
from PIL import Image

LONGEST_SIDE = 512  # px of a picture
QUALITY = 75  # of WebP, 0-100: false colour of 512 x 512 px takes about 60 kB


def photo_uri(picture: np.ndarray) -> str:
    """Return a picture (H, W, 3) uint8 as a data URI."""
    return _uri(Image.fromarray(thin_out(picture)), "WEBP", quality=QUALITY)


def map_uri(codes: np.ndarray, colours: Mapping[int, str]) -> str:
    """Return a map (H, W) uint8 in the colours ("#rrggbb") of its codes as a data URI, every pixel exact."""
    palette = np.zeros((256, 3), np.uint8)
    for code, colour in colours.items():
        palette[code] = tuple(bytes.fromhex(colour[1:]))
    image = Image.fromarray(np.ascontiguousarray(thin_out(codes), dtype=np.uint8))
    image.putpalette(palette.tobytes())
    return _uri(image, "PNG", optimize=True)


def thin_out(picture: np.ndarray) -> np.ndarray:
    """Return every n-th pixel (H, W, ...), so that no side is longer than LONGEST_SIDE."""
    step = -(-max(picture.shape[:2]) // LONGEST_SIDE)
    return picture[::step, ::step]


def _uri(image: Image.Image, kind: str, **options: object) -> str:
    content = io.BytesIO()
    image.save(content, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
