"""The HTML pages: jinja2 templates with their styles and scripts, and images as data URIs, so each page is one file."""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

FOLDER = Path(__file__).parent


def render_template(name: str, **context: Any) -> str:
    """Render a template of this folder. All values are HTML-escaped, except those marked as markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name).render(**context)


def template_file(name: str) -> str:
    """The text of a stylesheet or script of this folder."""
    return (FOLDER / name).read_text(encoding="utf-8")


def data_uri(image: Image.Image, image_format: str = "WEBP") -> str:
    """An image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **({"quality": 80} if image_format == "WEBP" else {}))
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
