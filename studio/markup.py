"""HTML that the page shows. Every function escapes its texts: names, captions, prompts and messages come from files."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from studio.workspace import Workspace


def file_url(workspace: Workspace, path: Path) -> str:
    """The address of a file of the workspace; it changes when the file does, so that browsers load it again."""
    relative = path.relative_to(workspace.root).as_posix()
    version = path.stat().st_mtime_ns if path.exists() else 0
    return f"/studio/file/{quote(relative)}?v={version}"


def photo_url(name: str, file: str, crop: Sequence[int], version: int) -> str:
    """The address of a photo as training sees it."""
    edges = ",".join(map(str, crop))
    return f"/studio/photo/{quote(name, safe='')}/{quote(file, safe='')}?crop={edges}&v={version}"


def figure(url: str, alternative: str, caption: str, notes: Sequence[str] = (), link: str | None = None) -> str:
    """An image with a caption, and notes that stand out below it."""
    image = f'<img src="{escape(url)}" alt="{escape(alternative)}" loading="lazy">'
    if link is not None:
        image = f'<a href="{escape(link)}" target="_blank" rel="noopener">{image}</a>'
    warnings = "".join(f'<span class="note">{escape(note)}</span>' for note in notes)
    return f"<figure>{image}<figcaption>{escape(caption)}{warnings}</figcaption></figure>"


def link(workspace: Workspace, file: Path, text: str) -> str:
    """A paragraph with a link that opens a file of the workspace."""
    return f'<p><a href="{escape(file_url(workspace, file))}" target="_blank" rel="noopener">{escape(text)}</a></p>'


def grid(figures: Iterable[str], label: str, side: int = 180) -> str:
    """Figures in as many columns as fit."""
    inner = "".join(figures)
    return f'<div class="grid" style="--side: {side}px" role="group" aria-label="{escape(label)}">{inner}</div>'


def notes(texts: Sequence[str]) -> str:
    """Warnings as a list; nothing without any."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="notes">{items}</ul>' if texts else ""


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{escape(kind)}">{escape(text)}</p>' if text else ""


def heading(text: str, level: int = 3) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table whose first column names the rows."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def command(text: str, label: str = "Command") -> str:
    """A command with a button that copies it; nothing without a command."""
    if not text:
        return ""
    return (
        f'<div class="command"><div class="bar"><span>{escape(label)}</span><button type="button" class="copy">Copy'
        f'</button></div><pre tabindex="0" aria-label="{escape(label)}"><code>{escape(text)}</code></pre></div>'
    )


def text_block(text: str, label: str, kind: str = "") -> str:
    """Text as it is, which scrolls with the keyboard too."""
    return f'<pre tabindex="0" role="region" aria-label="{escape(label)}" class="{escape(kind)}">{escape(text)}</pre>'


def progress(label: str, step: int, steps: int) -> str:
    return f'<progress value="{int(step)}" max="{max(int(steps), 1)}" aria-label="{escape(label)}"></progress>'


def size(count: int) -> str:
    """A number of bytes in MiB, or in KiB if it is small."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def duration(seconds: float) -> str:
    """A time in the largest units that matter."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
