"""Names, captions and messages come from files and browsers: none of them becomes HTML."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio import charts, markup

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "&lt;b&gt;",
    "\x00",
]
TEXTS = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=30))


class Reader(HTMLParser):
    """Collects the tags, attributes and text of what a browser would see."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.values: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.values += [value or "" for _, value in attrs]

    def handle_data(self, data):
        self.text += data


def pieces(text: str) -> list[str]:
    return [
        markup.figure(text, text, text, [text], text),
        markup.grid([], text),
        markup.notes([text]),
        markup.paragraph(text, text),
        markup.heading(text),
        markup.table([text], [[text, text]], text),
        markup.command(text, text),
        markup.text_block(text, text, text),
        markup.progress(text, 1, 2),
        charts.line_chart(text, {text: ([1, 2], [3, 4])}, text),
        charts.scatter_chart(text, {text: (1.0, 2.0)}, text, text),
    ]


KNOWN = {
    *("a", "figure", "img", "figcaption", "span", "div", "ul", "li", "p", "h3", "table", "caption", "thead", "tbody"),
    *("tr", "th", "td", "button", "pre", "code", "progress", "svg", "path", "polyline", "circle", "text"),
}


@given(TEXTS)
def test_texts_stay_texts(text):
    for html in pieces(text):
        reader = Reader(html)
        assert reader.tags <= KNOWN, html
        assert not any(name.startswith("on") for name in reader.attributes), html


def test_a_caption_is_shown_as_it_was_written():
    reader = Reader(markup.figure("u", "a", HOSTILE[0], [HOSTILE[1]]))
    assert HOSTILE[0] in reader.text and HOSTILE[1] in reader.text


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_an_address_names_one_photo_of_one_set(name, file):
    url = markup.photo_url(name, file, (0, 1, 2, 3), 4)
    path, _, query = url.partition("?")
    assert path.count("/") == 4 and "#" not in url and query == "crop=0,1,2,3&v=4"


def test_a_chart_follows_its_values():
    html = charts.line_chart("loss", {"loss": ([0, 10, 20], [1.0, float("nan"), 3.0])})
    points = html.partition('points="')[2].partition('"')[0].split()
    (x0, y0), *_, (x1, y1) = [tuple(map(float, point.split(","))) for point in points]
    assert x0 == charts.LEFT and x1 == charts.WIDTH - charts.RIGHT
    assert y0 > y1 and "loss: 3" in html  # up is more, and the missing value is left out


@pytest.mark.parametrize("values", [([], []), ([1], [float("inf")])])
def test_a_chart_without_values_says_so(values):
    assert "nothing yet" in charts.line_chart("loss", {"loss": values})


@pytest.mark.parametrize(("seconds", "text"), [(5.4, "5 s"), (65, "1 min 05 s"), (3 * 3600 + 61, "3 h 01 min")])
def test_durations(seconds, text):
    assert markup.duration(seconds) == text
