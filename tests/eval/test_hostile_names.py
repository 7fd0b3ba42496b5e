"""Names and prompts from files, in HTML and in figures: shown as they are, never as markup or mathematics."""

import errno
import html
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from PIL import Image

from delora_diffusers.errors import InputError
from eval.benchmark.report_page import distributions
from eval.page import Page
from eval.study.figures import plot_images
from tests.helpers import write_photos

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=y>',
    "costs $5 or $x_{",
    r"$\undefined{",
    "100% \\textbf & co",
]


@pytest.fixture
def page(tmp_path):
    image = write_photos(tmp_path / "photos", 1) / "00.png"
    named = tmp_path / "<b>&'.png"
    Image.open(image).save(named)
    images = {prompt: [image] for prompt in HOSTILE}
    scores = {"scores": {"dino": 0.5, "clip_i": 0.5, "clip_t": 0.5}, "real": {"dino": 0.5, "clip_i": 0.5}}
    return Page([named], images, images, scores, scores, {})


def test_a_page_escapes_every_prompt_and_file_name(page):
    text = page.html()
    assert "<script>" not in text and "<img src=x" not in text and "<b>&" not in text
    assert all(prompt in html.unescape(text) for prompt in HOSTILE)


@pytest.mark.integration
def test_no_prompt_is_read_as_mathematics(page, tmp_path):
    assert page.png().startswith(b"\x89PNG")
    image = page.photos[0]
    rows = {prompt: {name: image for name in HOSTILE} for prompt in HOSTILE}
    plot_images(rows, HOSTILE, None, HOSTILE[3], tmp_path / "figure")
    assert (tmp_path / "figure.png").is_file()


def test_a_run_with_any_label_has_a_distribution():
    table = pd.DataFrame({"dino": [0.1, 0.2], "clip_i": [0.1, 0.2], "clip_t": [0.1, 0.2]})
    summary = {"protocols": {"p": {"real": {}}}}
    of = {"images": table, "summary": summary, "of": lambda images, _: images}
    runs = [SimpleNamespace(label=label, **of) for label in HOSTILE[2:4]]
    drawing = str(distributions(runs, "p"))  # pyright: ignore[reportArgumentType]
    assert "costs $5 or $x_{" in html.unescape(drawing) and r"$\undefined{" in html.unescape(drawing)


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    from delora_diffusers.atomic import atomic_write

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    message = r"page\.html could not be written .*No space left.*; free some space"
    with pytest.raises(InputError, match=message), atomic_write(tmp_path / "page.html") as temporary:
        temporary.write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_prompts_that_clip_cuts_are_said(tiny_scorers, caplog):
    from eval.metrics.encoders import ClipEncoder

    encoder = ClipEncoder(f"local-dir:{tiny_scorers / 'clip'}", None, "cpu")
    encoder.encode_texts(["a dog"])
    assert caplog.messages == []
    encoder.encode_texts(["a dog", "dog " * 300])
    assert caplog.messages[0].startswith("truncated: of 'dog dog")
