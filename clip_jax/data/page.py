"""HTML pages of data, each one file with its pictures inside.

A page loads nothing and runs no script, which a content security policy enforces: captions and file
names come from strangers.
"""

import base64
import html
import io
import os
import re
from pathlib import Path

from PIL import Image

_TEMPLATE = Path(__file__).with_name("page.html")


def render_page(*, title: str, summary: str, body: str, footer: str, links: str = "") -> str:
    """The whole page as text. title, summary, footer: text. body, links: HTML."""
    parts = {
        "title": escape(title),
        "summary": escape(summary),
        "links": links,
        "body": body,
        "footer": escape(footer),
    }
    template = _TEMPLATE.read_text(encoding="utf-8")
    # One pass, so that a placeholder inside a caption stays text.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def write_page(path: Path, page: str) -> None:
    """Write a page, whole or not at all. Raises OSError where the folder cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A lone surrogate in a caption has no UTF-8 form: "replace" writes "?".
        temporary.write_bytes(page.encode("utf-8", "replace"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def escape(value: object) -> str:
    """Text as HTML, also within quotes."""
    return html.escape(str(value), quote=True)


def thumbnail_url(picture: Image.Image, longest_side: int) -> str:
    """A small copy of a picture as the URL of an `img`."""
    picture = picture.copy()
    picture.thumbnail((longest_side, longest_side))
    return _url(picture, "webp", quality=85)


def pixels_url(picture: Image.Image) -> str:
    """A picture, every pixel as it is, as the URL of an `img`."""
    return _url(picture, "png")


def _url(picture: Image.Image, kind: str, **options: int) -> str:
    picture.save(buffer := io.BytesIO(), kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
