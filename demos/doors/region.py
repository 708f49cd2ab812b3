"""README's first picture: what a classifier says of a ring whose half is left out of every layer, or painted over.

What is hidden is what `skipguide explain` finds by its defaults on the first of its scenes: nothing is picked by hand.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from demos.doors.panels import Panel, row
from skipguide.media.frames import open_picture
from skipguide.vision.layer_masking.classifiers import load_classifier
from skipguide.vision.layer_masking.explain import explain, without

SCENE = Path(__file__).parents[1] / "layer_masking" / "scenes" / "ring.png"
WAYS = {
    "neighbours": "left out everywhere",
    "black": "painted black",
    "grey": "painted grey",
    "mean": "the mean colour",
}


def draw() -> Image.Image:
    """The picture whole, and without its half in four ways; the bar is how sure the classifier is of the ring."""
    classifier = load_classifier("tiny-cnn")
    image = classifier.prepare(open_picture(SCENE))
    found = explain(classifier, image)
    target = found.numbers["target"]
    sure = target["probability"]
    panels = [Panel(classifier.picture(image), "the whole picture", sure, f"{target['label']} {sure:.0%}")]
    for fill, words in WAYS.items():
        answer = found.numbers["tests"][fill]["without_top"]
        said = f"{answer['label']} {answer['its_probability']:.0%}"
        panels.append(Panel(without(classifier, image, ~found.shown, fill), words, answer["probability"], said))
    return row(panels, "Half of a ring is hidden. What does the classifier see? The bar: how sure it is of a ring.")
