"""The studio in headless Chromium: a click makes a clip, the picture is on the page, no request leaves the machine."""

import io
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason='the studio needs `pip install -e ".[studio]"`')
pytest.importorskip("playwright", reason='the browser test needs `pip install -e ".[studio-test]"`')

from playwright import sync_api

from skipguide.cli.studio import app

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHOTS = os.environ.get("SKIPGUIDE_SCREENSHOTS")  # a folder to keep the screenshots of the docs in
LONG = 600_000  # milliseconds: a busy machine

pytestmark = [
    pytest.mark.filterwarnings("default"),  # of gradio about pandas: as errors they would end its server
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def address():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with app.served() as found:
        yield found
    torch.set_num_threads(before)


@pytest.fixture
def page(address):
    """A page, and under `asked` the addresses that it asked for off this machine."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1300, "height": 900})
        opened.asked = []
        opened.on("request", lambda request: opened.asked.append(request.url) if away(request.url) else None)
        opened.set_default_timeout(LONG)
        opened.goto(address)
        yield opened
        assert opened.asked == []
        browser.close()


def away(url):
    return not url.startswith(("http://127.0.0.1:", "data:", "blob:", "about:"))


def shot(page, name):
    """The page as a picture for the docs, of few colours: their files stay small."""
    if SHOTS:
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        picture.resize((900, 900 * picture.height // picture.width), Image.Resampling.LANCZOS).quantize(
            64, dither=Image.Dither.NONE
        ).save(Path(SHOTS, f"{name}.png"), optimize=True)


def natural_width(page, where):
    return page.eval_on_selector(f"{where} img", "image => image.naturalWidth")


def test_a_click_makes_a_clip(page):
    page.wait_for_selector("#model-words :text('8 blocks')")
    page.get_by_label("number input for steps").first.fill("4")
    page.get_by_label("number input for steps").first.press("Tab")
    page.click("#compare")
    page.wait_for_selector("#said :text('done')")
    page.wait_for_selector("#guided img")
    page.wait_for_selector("#moving img")
    assert natural_width(page, "#plain") == natural_width(page, "#guided") == 256
    assert "(1.00 x plain)" in page.inner_text("#plain-cost")
    assert "x plain" in page.inner_text("#guided-cost")
    first = page.get_attribute("#guided img", "src")
    page.fill("#frame input[type=number]", "15")
    page.press("#frame input[type=number]", "Tab")
    page.wait_for_function("before => document.querySelector('#guided img').src !== before", arg=first)
    page.click("#keep")
    page.wait_for_selector("#favourites img")
    page.click("#export")
    page.wait_for_selector("#python :text('SpatiotemporalSkipGuidance')")
    assert '"seed"' in page.inner_text("#json")
    shot(page, "studio-guidance")


def test_an_error_is_shown_as_its_sentence(page):
    page.wait_for_selector("#model-words :text('8 blocks')")
    page.fill("#prompt textarea", " ")
    page.click("#compare")
    page.wait_for_selector(":text('expected a prompt in words; got an empty one')")
    assert page.get_by_text("Traceback").count() == 0


def test_a_run_is_stopped(page):
    page.wait_for_selector("#model-words :text('8 blocks')")
    page.get_by_label("number input for steps").first.fill("200")
    page.get_by_label("number input for steps").first.press("Tab")
    page.click("#compare")
    page.wait_for_selector("#said :text('step')")
    page.click("#stop")
    page.wait_for_selector("#said :text('stopped')")


def test_a_region_is_painted_and_left_out(page):
    page.get_by_role("tab", name="Region").click()
    page.click("#example")
    canvas = page.locator("#canvas canvas").first
    canvas.wait_for()
    page.wait_for_timeout(8000)  # the editor draws the picture in steps of its own
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.35, box["y"] + box["height"] * 0.4)
    page.mouse.down()
    for part in (0.4, 0.5, 0.6, 0.65):
        page.mouse.move(box["x"] + box["width"] * part, box["y"] + box["height"] * 0.45, steps=5)
    page.mouse.up()
    page.click("#leave-out")
    page.wait_for_selector("#answers :text('absent in every layer')", state="attached")
    assert "is painted" in page.inner_text("#region-said")
    page.click("#explain")
    page.wait_for_selector("#sheet img")
    shot(page, "studio-region")


def test_sublayers_are_ranked(page):
    page.get_by_role("tab", name="Language model").click()
    page.click("#rank")
    page.wait_for_selector("#ranking :text('left out')", state="attached")
    page.wait_for_function("() => document.querySelector('#other-text textarea').value.length > 20")
    shot(page, "studio-language")
