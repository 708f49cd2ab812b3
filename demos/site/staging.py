"""Staging: the site's sources put together in a folder, from the pages here and from what lies elsewhere already.

A page says what it shows in a fenced block, so that nothing is written twice:

    ```{readme} vision/layer_masking/README.md
    intro                               what stands before the second heading
    ## Try                              a section, as on the README
    ## Refused*                         the one that begins so, where the rest is a number that changes
    ## Measurements <- Does it help?    a section under another heading
    - Does it help?                     a section without its heading
    *                                   all of it
    ```

    ```{gallery} demos/quality/sheets/*.jpg     pictures, each with its name
    ```{scripts} demos/scripts                  every script of a folder, as code
    ```{api} skipguide.vision                   every public name, from its docstring
    ```{commands} skipguide                     every command, from its help
"""

from __future__ import annotations

import functools
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from demos.site import listings
from demos.site.readmes import INTRO, ROOT, Section, Use, relinked, sections

HERE = Path(__file__).parent
FILES = "_files"  # what pages show or give to download, under its path in the repository
TABLES = "measurements/tables"
# Where a link to a folder leads: a page that shows what is in it.
FOLDERS = {"demos/scripts": "scripts.md", "demos/quality/sheets": "gallery.md", "demos/notebooks": "notebooks/index.md"}
_REPO = re.compile(r"\]\(repo:([^)\s#]+)\)")  # a link of our own pages to a file of the repository
_BLOCK = re.compile(r"^```\{(readme|gallery|scripts|api|commands)\} (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class SiteError(Exception):
    """A page that names a section, a file or a folder that is not there."""


class Staging:
    """The sources of the site, written into a folder.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pages = {path.relative_to(HERE / "pages").as_posix(): path.read_text() for path in _markdown()}
        self.pages |= dict(_tables())
        self.uses = {page: [*_uses(page, text)] for page, text in self.pages.items()}
        self._places: dict[tuple[str, str], str] = {}
        for use in (use for uses in self.uses.values() for use in uses):
            for anchor, here in use.anchors():
                self._places.setdefault((use.file, anchor), f"/{use.page}{here and f'#{here}'}")
            if use.section.title == INTRO:
                self._places.setdefault((use.file, ""), f"/{use.page}")

    def write(self) -> None:
        """Write everything that Sphinx reads.

        Raises:
            SiteError: for a link that leads nowhere.
        """
        for page, text in self.pages.items():
            path = self.folder / page
            path.parent.mkdir(parents=True, exist_ok=True)
            text = _REPO.sub(lambda match: f"]({self.place(match[1], '')})", text)
            path.write_text(_BLOCK.sub(functools.partial(self._block, page), text), encoding="utf-8")
        for path in sorted((ROOT / "demos" / "notebooks").glob("*.ipynb")):
            self._copy(path, self.folder / "notebooks" / path.name)
        for path in (HERE / "inventories").glob("*.txt"):
            write_inventory(path, self.folder / "_inventories" / f"{path.stem}.inv")

    def place(self, path: str, anchor: str) -> str:
        """Where something of the repository is on the site; a file that no page shows is copied.

        Raises:
            SiteError: if there is no such thing.
        """
        found = self._places.get((path, anchor)) or self._places.get((f"{path}/README.md", ""))
        if found is None and not anchor:
            found = f"/{FOLDERS[path]}" if path in FOLDERS else _page_of(path)
        if found is not None:
            return found
        if anchor or not (ROOT / path).is_file():
            raise SiteError(
                f"{path}#{anchor} is on no page of the site: expected a section that a page shows, or a file"
            )
        self._copy(ROOT / path, self.folder / FILES / path)
        return f"/{FILES}/{path}"

    def _block(self, page: str, match: re.Match[str]) -> str:
        kind, what, lines = match.groups()
        if kind == "readme":
            return "\n\n".join(relinked(use.text(), what, self.place) for use in _wanted(page, what, lines))
        made = {"gallery": self._gallery, "scripts": self._scripts, "api": listings.api, "commands": listings.commands}
        return made[kind](what)

    def _gallery(self, pattern: str) -> str:
        found = sorted(ROOT.glob(pattern))
        if not found:
            raise SiteError(f"no pictures {pattern}")
        return listings.gallery({path.stem: self.place(path.relative_to(ROOT).as_posix(), "") for path in found})

    def _scripts(self, name: str) -> str:
        found = [path for path in sorted((ROOT / name).glob("*.py")) if path.stem not in ("__init__", "tiny")]
        return listings.scripts({path: self.place(path.relative_to(ROOT).as_posix(), "") for path in found})

    def _copy(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def write_inventory(text: Path, target: Path) -> None:
    """Compress an inventory that is kept as text, as Sphinx reads it."""
    lines = text.read_text(encoding="utf-8").splitlines()
    head, names = lines[:4], [line for line in lines[4:] if line]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes("\n".join([*head, ""]).encode() + zlib.compress("\n".join([*names, ""]).encode(), 9))


def _markdown() -> list[Path]:
    return sorted((HERE / "pages").rglob("*.md"))


def _page_of(path: str) -> str | None:
    """The page of a table or a notebook."""
    if path.startswith("demos/notebooks/"):
        return f"/notebooks/{Path(path).name}"
    if path.startswith("demos/") and path.endswith(".md"):
        return f"/{_table_page(path)}"
    return None


def _table_page(path: str) -> str:
    return f"{TABLES}/{'-'.join(Path(path).with_suffix('').parts[1:])}.md"


def _tables() -> Iterator[tuple[str, str]]:
    """A page for every table that a study wrote."""
    for path in sorted((ROOT / "demos").rglob("*.md")):
        name = path.relative_to(ROOT).as_posix()
        if path.name != "README.md" and not name.startswith("demos/site/"):
            title = "" if path.read_text().startswith("# ") else f"# {listings.table_title(name)}\n\n"
            yield _table_page(name), f"---\norphan: true\n---\n\n{title}```{{readme}} {name}\n*\n```\n"


def _uses(page: str, text: str) -> Iterator[Use]:
    for match in _BLOCK.finditer(text):
        if match[1] == "readme":
            yield from _wanted(page, match[2], match[3])


def _wanted(page: str, file: str, lines: str) -> Iterator[Use]:
    """What the lines of a `readme` block ask for.

    Raises:
        SiteError: for a section that the README does not have.
    """
    text = (ROOT / file).read_text(encoding="utf-8")
    found = sections(text)
    for line in filter(None, map(str.strip, lines.splitlines())):
        mark, _, rest = line.partition(" ")
        if line == "*":
            yield Use(page, file, Section(INTRO, 1, tuple(text.splitlines())), "", 1)
            continue
        title, _, original = (part.strip() for part in rest.partition("<-"))
        name = INTRO if line == INTRO else original or title
        if name.endswith("*"):
            name = next((each for each in found if each.startswith(name[:-1])), name)
            title = name if title.endswith("*") else title
        if name not in found:
            raise SiteError(f"{page}: {file} has no section {name!r}; it has {', '.join(found)}")
        yield Use(page, file, found[name], "" if mark in (INTRO, "-") else title, len(mark))
