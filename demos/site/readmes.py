"""READMEs: their sections by title, and the links in them turned to where those sections are on the site."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
INTRO = "intro"
_FENCE = re.compile(r"^( *)(`{3,}|~{3,})")
_HEADING = re.compile(r"^(#+) (.*)$")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"`+[^`]+`+")


@dataclass(frozen=True)
class Section:
    """A heading's text and all that is below it, the smaller headings too.

    Args:
        title: as it is written; `intro` for what stands before the second heading.
        level: the number of hashes.
        lines: what follows the heading.
    """

    title: str
    level: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Use:
    """That a page shows a section.

    Args:
        page: the page's path on the site.
        file: the README's path in the repository.
        section: what is shown.
        title: its heading on the page; empty for none.
        level: of that heading.
    """

    page: str
    file: str
    section: Section
    title: str
    level: int

    def text(self) -> str:
        """What the page shows: the heading, and the section with its smaller headings moved to fit under it."""
        moved = self.level - self.section.level if self.title else 0
        below = [_moved(line, moved) if heading else line for line, heading in _headings(self.section.lines)]
        return "\n".join([f"{'#' * self.level} {self.title}", *below] if self.title else below)

    def anchors(self) -> Iterator[tuple[str, str]]:
        """What links to the README call its headings, and what they are called on the page."""
        yield slug(self.section.title), slug(self.title) if self.title else ""
        for line, heading in _headings(self.section.lines):
            if heading:
                title = slug(line.lstrip("# "))
                yield title, title


def slug(title: str) -> str:
    """A heading as GitHub and MyST name its anchor."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def sections(text: str) -> dict[str, Section]:
    """Every section of a Markdown text by its title, the smaller ones too, and the one before all as `intro`."""
    marked = list(_headings(text.splitlines()))
    found: dict[str, Section] = {}
    starts = [number for number, (_, heading) in enumerate(marked) if heading]
    for place, start in enumerate(starts):
        head = _HEADING.match(marked[start][0])
        assert head is not None
        level, title = len(head[1]), head[2].strip()
        later = (at for at in starts[place + 1 :] if place == 0 or len(marked[at][0].split(" ", 1)[0]) <= level)
        lines = tuple(line for line, _ in marked[start + 1 : next(later, len(marked))])
        if place == 0:
            found[INTRO] = Section(INTRO, level, _without_contents(lines))
        else:
            found[title] = Section(title, level, lines)
    return found


def relinked(text: str, origin: str, place: Callable[[str, str], str]) -> str:
    """The text with its links, which are relative to `origin`, turned to what `place(path, anchor)` gives.

    Args:
        text: Markdown.
        origin: the file that it is from, in the repository.
        place: for a path in the repository and an anchor, where that is on the site; paths begin with `/`.
    """
    folder = PurePosixPath(origin).parent

    def turned(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        label = _LINK.sub(turned, label)  # a picture that is a link
        if re.match(r"[a-z]+:", target):
            return f"{mark}[{label}]({target})"
        path, _, anchor = target.partition("#")
        whole = os.path.normpath(folder / path) if path else origin
        return f"{mark}[{label}]({place(whole, anchor)})"

    out, inside = [], ""
    for line in _joined(text.splitlines()):
        inside, plain = _fence(line, inside)
        out.append(_outside_code(line, turned) if plain else line)
    return "\n".join(out)


def _outside_code(line: str, turned: Callable[[re.Match[str]], str]) -> str:
    """A line with its links turned; code that looks like a link (`a[0](b)`) is left alone."""
    kept: list[str] = []

    def hide(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"\0{len(kept) - 1}\0"

    hidden = _LINK.sub(turned, _CODE.sub(hide, line))
    return re.sub("\0(\\d+)\0", lambda match: kept[int(match[1])], hidden)


def _joined(lines: list[str]) -> list[str]:
    """Lines, with those joined between which a link is broken."""
    out: list[str] = []
    inside = ""
    for line in lines:
        before = inside
        inside, plain = _fence(line, inside)
        text = out[-1] if out else ""
        if out and not before and plain and re.search(r"\[[^\]\[]*$", _CODE.sub("", text)) and line.strip():
            out[-1] = f"{text} {line.strip()}"
        else:
            out.append(line)
    return out


def _fence(line: str, inside: str) -> tuple[str, bool]:
    """The fence that is open after this line, and whether the line is text."""
    match = _FENCE.match(line)
    if inside:
        return ("" if line.strip() == inside else inside), False
    return (match[2], False) if match else ("", True)


def _headings(lines: list[str] | tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Lines, each with whether it is a heading; a comment in a code block is none."""
    inside = ""
    for line in lines:
        inside, plain = _fence(line, inside)
        yield line, plain and _HEADING.match(line) is not None


def _moved(line: str, by: int) -> str:
    hashes, _, title = line.partition(" ")
    return f"{'#' * max(1, len(hashes) + by)} {title}"


def _without_contents(lines: tuple[str, ...]) -> tuple[str, ...]:
    """A README's own table of contents is left out: the site has one beside every page."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    return tuple("\n\n".join(each for each in paragraphs if not each.startswith("Contents:")).splitlines())
