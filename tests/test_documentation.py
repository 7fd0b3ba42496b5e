"""The documentation quotes sentences that the project prints."""

import ast
import re
from pathlib import Path

import pytest

from tests.helpers import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = [*(path for folder in ("delora_diffusers", "eval", "data") for path in (ROOT / folder).rglob("*.py"))]
SOURCES += list(ROOT.glob("train_*.py"))


def pieces_of(node: ast.AST) -> list[str] | None:
    """The literal parts of a string or f-string in the code, in order."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [part.value for part in node.values if isinstance(part, ast.Constant)]
    return None


def messages() -> list[list[str]]:
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            pieces = pieces_of(node)
            if pieces and sum(map(len, pieces)) > 12:
                found.append(pieces)
    return found


def is_printed_by(pieces: list[str], sentence: str) -> bool:
    """Whether a sentence consists of these pieces, in order, with values between them and, if it must be, around them.

    The pieces must be a good part of the sentence; the rest are values.
    """
    pattern = ".*?".join(map(re.escape, pieces))
    literal = sum(map(len, pieces))
    return literal > max(25, len(sentence) / 7) and re.search(pattern, sentence) is not None


def quoted(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    sentences = re.findall(r"(?<!`)`((?:[^`\n]|``)+?)`(?!`)", text)
    return [sentence.replace("``", "`") for sentence in sentences if sentence.endswith(".") and sentence.count(" ") > 3]


@pytest.fixture(scope="module")
def printed() -> list[list[str]]:
    return messages()


@pytest.mark.parametrize("sentence", quoted(PAGE), ids=lambda sentence: sentence[:50])
def test_every_quoted_message_is_printed_somewhere(printed, sentence):
    assert any(is_printed_by(pieces, sentence) for pieces in printed), f"no such message in the code: {sentence}"


def test_the_page_quotes_many_messages():
    assert len(quoted(PAGE)) > 30


def test_the_example_of_a_family_is_its_file():
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert code == (ROOT / "delora_diffusers" / "families" / "flux.py").read_text(encoding="utf-8")
