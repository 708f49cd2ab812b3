"""Letters that can be read: a font that has those of a text, or the text in letters that the font has.

Pillow's own font has the letters of English. For others a font of this machine is looked for: matplotlib's DejaVu, then
the system's. Where none has them the text is drawn in plain letters, and a warning says so.
"""

from __future__ import annotations

import logging
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

logger = logging.getLogger(__name__)

NOWHERE = "\U0010fffe"  # no font has a letter there: what is drawn for it is what a font draws for letters it lacks
# By what they cover: European letters first, then those of East Asia, then all.
NAMES = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc", "msyh.ttc"),
    *("DroidSansFallbackFull.ttf", "DroidSansFallback.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "YuGothM.ttc"),
    *("malgun.ttf", "AppleSDGothicNeo.ttc", "ARIALUNI.TTF", "Arial Unicode.ttf", "unifont.ttf", "FreeSans.ttf"),
)
PLACES = {
    "linux": ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": ("C:/Windows/Fonts", "~/AppData/Local/Microsoft/Windows/Fonts"),
}
# Letters that are no base letter with a mark.
PLAIN = str.maketrans({
    "ß": "ss", "ẞ": "SS", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "đ": "d", "Đ": "D", "ł": "l",
    "Ł": "L", "þ": "th", "Þ": "Th", "ð": "d", "ı": "i", "“": '"', "”": '"', "„": '"', "’": "'", "‘": "'", "–": "-",
    "—": "-", "…": "...", "×": "x", "−": "-", "·": "-", "→": "->", "€": "EUR", "°": " deg",
})  # fmt: skip


def legible(text: str, size: int) -> tuple[str, FreeTypeFont | ImageFont]:
    """A text as it can be drawn, and the font to draw it with.

    Args:
        text: in any letters.
        size: of the letters in pixels.

    Returns:
        The text and a font that has its letters; where there is none the text in plain letters, such as "grosser" for
        "größer", and `[8D64]` for a sign that has no plain form.

    Example:
        >>> legible("a red circle", 15)[0]
        'a red circle'
    """
    own = _open("", size)
    letters = "".join(sorted({letter for letter in text if not letter.isascii() and not letter.isspace()}))
    if not letters:
        return text, own
    place = _font_with(letters)
    if place == "":
        return text, own
    if place is not None:
        return text, _open(place, size)
    # Letters that some font has stay, if one has those of them together.
    missing = {letter for letter in letters if _font_with(letter) is None}
    plain = "".join(_plain(letter) if letter in missing else letter for letter in text)
    if missing and (place := _font_with("".join(sorted(set(letters) - missing)))) is not None:
        _say("".join(sorted(missing)))
        return plain, _open(place, size)
    _say(letters)
    return _plain(text), own


@cache
def _open(place: str, size: int) -> FreeTypeFont | ImageFont:
    """A font from its file; Pillow's own for ""."""
    from PIL import ImageFont

    return ImageFont.truetype(place, size) if place else ImageFont.load_default(size)


@cache
def _font_with(letters: str) -> str | None:
    """The file of a font that has all of some letters; "" for Pillow's own, None if there is none."""
    from PIL import ImageFont

    if _has(ImageFont.load_default(16), letters):
        return ""
    for place in _files():
        try:
            if _has(ImageFont.truetype(place, 16), letters):
                return place
        except (OSError, ValueError):  # damaged, or bitmaps of other sizes
            continue
    return None


def _has(font: FreeTypeFont | ImageFont, letters: str) -> bool:
    missing = bytes(font.getmask(NOWHERE)), font.getlength(NOWHERE)
    return all((bytes(font.getmask(letter)), font.getlength(letter)) != missing for letter in letters)


@cache
def _files() -> tuple[str, ...]:
    """The fonts of this machine that are worth a try, in the order of `NAMES`."""
    found: dict[str, str] = {}
    for folder in _folders():
        for path in folder.rglob("*"):
            if path.name in NAMES:
                found.setdefault(path.name, str(path))
    return tuple(found[name] for name in NAMES if name in found)


def _folders() -> Iterator[Path]:
    try:
        import matplotlib

        yield Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    except ImportError:
        pass
    for place in PLACES.get(sys.platform, PLACES["linux"]):
        folder = Path(place).expanduser()
        if folder.is_dir():
            yield folder


def _plain(text: str) -> str:
    """The text in ASCII: letters without their marks, other signs by their number."""
    spread = unicodedata.normalize("NFKD", text.translate(PLAIN))
    bare = "".join(letter for letter in spread if not unicodedata.combining(letter))
    return "".join(letter if letter.isascii() else f"[{ord(letter):04X}]" for letter in bare)


@cache
def _say(letters: str) -> None:
    plain = " ".join(map(_plain, letters))
    logger.warning("no font here has the letters %s: drawn as %s. Install DejaVu Sans or Noto Sans CJK", letters, plain)
