"""Region: the tab that leaves a painted region out of a classifier, and that explains its answer."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import gradio

from skipguide.cli.studio.shelf import Shelf
from skipguide.cli.studio.told import told
from skipguide.errors import SkipError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from skipguide.vision.layer_masking.classifiers import Classifier

SAFE = ["download", "fullscreen"]  # not "share", which is to another server
SMALLEST, LARGEST = 512, 1024  # pixels: the longer side of a picture on the page
Answers = list[list[str]]


def load(name: str) -> Classifier:
    """A classifier by what a visitor calls it."""
    from skipguide.vision.layer_masking.classifiers import load_classifier

    return load_classifier(name)


def example(side: int = 64) -> Image:
    """A ring on green, which the bundled classifier knows."""
    from PIL import Image, ImageDraw, ImageFilter

    rng = random.Random(3)
    ground = Image.new("RGB", (side, side))
    ground.putdata(
        [(rng.randrange(40, 90), rng.randrange(90, 170), rng.randrange(70, 120)) for _ in range(side * side)]
    )
    picture = ground.filter(ImageFilter.GaussianBlur(1.5))
    ImageDraw.Draw(picture).ellipse((20, 22, 44, 46), outline=(245, 245, 245), width=5)
    return picture


class RegionTab:
    """The handlers of the tab.

    Args:
        shelf: of classifiers.
    """

    def __init__(self, shelf: Shelf[Classifier]) -> None:
        self.shelf = shelf

    @told
    def upload(self, path: str) -> dict[str, Any]:
        """A picture was given: it is checked as every picture is, and reduced to what fits the page."""
        from skipguide.media.frames import open_picture

        picture = open_picture(path)
        picture.thumbnail((LARGEST, LARGEST))
        return editor(picture)

    @told
    def example(self) -> dict[str, Any]:
        """The picture that the bundled classifier knows."""
        return editor(example())

    @told
    def leave_out(self, model: str, painted: dict[str, Any] | None) -> tuple[str, Answers]:
        """What the classifier says without the painted region, and on it alone, for every way to hide it."""
        import torch

        from skipguide.vision import masked_forward
        from skipguide.vision.layer_masking.answers import logits_of, probabilities
        from skipguide.vision.layer_masking.explain import COMPARED

        picture, brush = parts_of(painted)
        with self.shelf.using(model.strip()) as classifier, torch.no_grad():
            image = classifier.prepare(picture)
            inside = region(classifier, brush, image)
            net = classifier.model
            plain = probabilities(logits_of(net(image[None])), net)[0]
            target = int(plain.argmax())
            keep = torch.stack([~inside, inside])[:, None]
            rows: Answers = []
            for fill in COMPARED:
                found = probabilities(
                    logits_of(masked_forward(net, fill, scale=classifier.scale)(keep, image.expand(2, -1, -1, -1))), net
                )
                name = "absent in every layer" if fill == "neighbours" else f"painted {fill}"
                rows.append([name, *(_words(classifier, each, target) for each in found)])
            said = f"the whole picture: **{_words(classifier, plain, target)}**"
        return f"{said}; {float(inside.float().mean()):.0%} of what the model sees is painted", rows

    @told
    def explain(self, model: str, painted: dict[str, Any] | None, method: str, segments: str) -> Image:
        """The sheet of `skipguide explain`."""
        from skipguide.vision.layer_masking.explain import draw, explain

        picture, _ = parts_of(painted)
        with self.shelf.using(model.strip()) as classifier:
            found = explain(classifier, classifier.prepare(picture), method=method, segments=segments)
            return draw(found, classifier)


def editor(picture: Image) -> dict[str, Any]:
    """The value of the page's editor: a picture with nothing painted on it, large enough to paint on."""
    from PIL.Image import Resampling

    zoom = -(-SMALLEST // max(picture.size))
    if zoom > 1:
        picture = picture.resize((picture.width * zoom, picture.height * zoom), Resampling.NEAREST)
    return {"background": picture, "layers": [], "composite": picture}


def parts_of(painted: dict[str, Any] | None) -> tuple[Image, Image]:
    """The picture, and how much paint there is on it, as RGB and as grey.

    Raises:
        SkipError: without a picture.
    """
    from PIL import Image, ImageChops

    if not painted or painted.get("background") is None:
        raise SkipError("give a picture first: upload one, or take the example")
    picture = painted["background"].convert("RGB")
    brush = Image.new("L", picture.size)
    for layer in painted.get("layers") or []:
        brush = ImageChops.lighter(brush, layer.convert("RGBA").getchannel("A").resize(picture.size))
    return picture, brush


def region(classifier: Classifier, brush: Image, image: Tensor) -> Tensor:
    """What of the picture that the model sees is painted, bool `[H, W]`: the paint goes through the same preparation.

    Raises:
        SkipError: if nothing is painted there.
    """
    import torch

    paint = classifier.prepare(brush.convert("RGB"))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in classifier.scale)
    inside = (paint * std + mean).mean(0) > 0.5
    if not bool(inside.any()):
        raise SkipError("paint over the region first: nothing that the model sees is painted")
    return inside.to(image.device)


def _words(classifier: Classifier, shares: Tensor, target: int) -> str:
    best = int(shares.argmax())
    if not math.isfinite(float(shares[best])):
        raise SkipError("the model answers NaN: check the picture and the weights")
    words = f"{classifier.label(target)} {float(shares[target]):.2f}"
    return words if best == target else f"{words} ({classifier.label(best)} {float(shares[best]):.2f})"


def build(tab: RegionTab) -> None:
    """Lay out the tab, inside the page."""
    with gradio.Row():
        with gradio.Column(scale=1):
            model = gradio.Textbox(
                "tiny-cnn", label="model: tiny-cnn, or a name of timm or torchvision", elem_id="classifier"
            )
            given = gradio.UploadButton("Upload a picture", file_types=["image"], type="filepath", elem_id="upload")
            scene = gradio.Button("Take the example", elem_id="example")
            gradio.Markdown("Paint the region with the brush:")
            canvas = gradio.ImageEditor(
                type="pil",
                sources=(),
                transforms=(),
                layers=False,
                brush=gradio.Brush(default_size=60, colors=["#e11d48"], color_mode="fixed"),
                show_label=False,
                elem_id="canvas",
                height=420,
                buttons=SAFE,
            )
            with gradio.Row():
                out = gradio.Button("Leave it out", variant="primary", elem_id="leave-out")
                why = gradio.Button("Explain it", elem_id="explain")
            with gradio.Row():
                method = gradio.Dropdown(["lime", "occlusion", "rise"], value="lime", label="method")
                segments = gradio.Textbox("grid:8", label="segments: grid:N or slic:N")
        with gradio.Column(scale=2):
            said = gradio.Markdown("", elem_id="region-said")
            table = gradio.Dataframe(
                headers=["hidden how", "without the region", "the region alone"],
                interactive=False,
                label="answers",
                elem_id="answers",
            )
    # as wide as the page: it has eighteen small pictures with words under them
    sheet = gradio.Image(show_label=False, interactive=False, elem_id="sheet", format="png", buttons=SAFE)
    scene.click(tab.example, None, canvas, api_name="example")
    given.upload(tab.upload, given, canvas, api_name="upload")
    out.click(tab.leave_out, [model, canvas], [said, table], api_name="leave_out")
    why.click(tab.explain, [model, canvas, method, segments], sheet, api_name="explain")
