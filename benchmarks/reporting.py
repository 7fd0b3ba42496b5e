"""Print the results of a benchmark and save them on request."""

from pathlib import Path


def print_and_save(text: str, file: Path | None) -> None:
    """Print a Markdown table, and write it to ``file`` if one is given."""
    print(text)
    if file is not None:
        file.write_text(text + "\n")
