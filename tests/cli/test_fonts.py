"""Text on pictures: in the letters it was given in, or in plain ones with a word about it."""

import pytest
from PIL import ImageFont

from skipguide.media import fonts
from skipguide.media.sheets import banner, contact_sheet, wrap


@pytest.fixture
def bare(monkeypatch):
    """A machine with Pillow's own font alone."""
    remembered = (fonts._files, fonts._font_with, fonts._say)
    for cached in remembered:
        cached.cache_clear()
    monkeypatch.setattr(fonts, "_folders", lambda: iter(()))
    yield
    for cached in remembered:
        cached.cache_clear()


def test_english_is_drawn_as_it_was():
    text, font = fonts.legible("a red circle", 15)
    assert text == "a red circle" and font.getname() == ImageFont.load_default(15).getname()


def test_a_font_of_the_machine_draws_other_letters():
    pytest.importorskip("matplotlib")
    text, font = fonts.legible("größer", 15)
    assert text == "größer" and fonts._has(font, "öß")
    assert bytes(font.getmask("ö")) != bytes(font.getmask("o")) != bytes(font.getmask(fonts.NOWHERE))


@pytest.mark.parametrize(
    ("text", "plain"),
    [("größer", "grosser"), ("Łódź", "Lodz"), ("赤い circle", "[8D64][3044] circle")],
)
def test_without_one_it_is_plain_and_said(bare, caplog, text, plain):
    found, font = fonts.legible(text, 15)
    assert found == plain and font.getname() == ImageFont.load_default(15).getname()
    assert "no font here has the letters" in caplog.text and "drawn as" in caplog.text
    caplog.clear()
    fonts.legible(text, 15)
    assert not caplog.text, "once"


def test_of_a_mixture_what_can_be_drawn_is_kept(bare, monkeypatch, caplog):
    monkeypatch.setattr(fonts, "_font_with", lambda letters: None if "赤" in letters else "")
    assert fonts.legible("größer 赤", 15)[0] == "größer [8D64]"
    assert "letters 赤: drawn as [8D64]" in caplog.text


def test_sheets_use_it_everywhere(bare):
    assert wrap("größer", 300) == ["grosser"]
    assert banner("größer", 200).tobytes() == banner("grosser", 200).tobytes()
    tile = banner("x", 100)
    sheets = [
        contact_sheet([[tile]], title=word, row_labels=[word], column_labels=[word], captions=[[word]])
        for word in ("größer", "grosser")
    ]
    assert sheets[0].tobytes() == sheets[1].tobytes()
