"""Attributions of whatever models and callers give: one output, probabilities, batches of one, NumPy, Hugging Face."""

import contextlib
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn

from skipguide.errors import SkipError
from skipguide.vision import LayerMask, masked_forward
from skipguide.vision.layer_masking import (
    SENTINEL,
    grid_segments,
    lime,
    lime_classifier,
    many_masks,
    occlusion,
    rise,
    slic_segments,
    spread,
)
from skipguide.vision.layer_masking.classifiers import Classifier
from skipguide.vision.layer_masking.explain import explain

PARTS = grid_segments(16, 16, 4)
IMAGE = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))


class Head(nn.Module):
    """A convolution, pooled, and its logits in the form that is asked for."""

    def __init__(self, classes, last=None, form=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.last, self.form = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, classes), last, form
        self.conv.weight.data *= 4
        self.fc.weight.data *= 4

    def forward(self, images):
        out = self.fc(self.conv(images).relu().mean((2, 3)))
        out = out if self.last is None else self.last(out)
        return out if self.form is None else self.form(out)


def net(classes=3, **more):
    return Head(classes, **more).eval()


def test_answers_of_masks_hold_no_graph():
    model = net()
    forward = masked_forward(model)
    shown = torch.eye(16, dtype=torch.bool)
    found = many_masks(forward, IMAGE, shown, PARTS)
    assert not found.requires_grad and found.numpy().shape == (16, 3)
    for weights in (
        lime(forward, IMAGE, PARTS, 0, samples=20),
        occlusion(forward, IMAGE, PARTS, 0),
        rise(forward, IMAGE, 0, samples=20),
    ):
        assert weights.numpy().size and not weights.requires_grad
    keep = torch.ones(1, 16, 16, dtype=torch.bool)
    keep[:, :4] = False
    assert forward(keep, IMAGE[None]).requires_grad, "who wants gradients calls the forward itself"


def test_rise_keeps_bits_of_its_masks():
    """1000 masks of 96 x 96 pixels are 9 MB of bits, and as floats 37 MB before they are enlarged."""

    class Sum:
        masker = SimpleNamespace(largest=0)

        def __call__(self, keep, images):
            return torch.stack([keep.float().mean((1, 2, 3)), keep[:, 0, 48, 48].float() * 9], 1)

    image = torch.zeros(3, 96, 96)
    sizes = []
    original = torch.stack

    def watched(tensors, *args, **kwargs):
        out = original(tensors, *args, **kwargs)
        sizes.append(out.numel() * out.element_size())
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "stack", watched)
        heat = rise(Sum(), image, 1, samples=1000)
    assert max(sizes) < 1000 * 96 * 96
    assert heat[48, 48] == heat.max() > 0 and heat.shape == (96, 96)


def test_one_output_is_explained_by_its_sigmoid():
    """The softmax of one number is 1, whatever is hidden."""
    model, forward = net(1), masked_forward(net(1))
    drops = occlusion(forward, IMAGE, PARTS, 0)
    keep = (PARTS != 5)[None]
    with torch.no_grad():
        expected = model(IMAGE[None]).sigmoid() - forward(keep, IMAGE[None]).sigmoid()
    torch.testing.assert_close(drops[5], expected[0, 0])
    assert lime(forward, IMAGE, PARTS, 0, samples=40).abs().max() > 1e-4
    assert rise(forward, IMAGE, 0, samples=40).abs().max() > 1e-4
    classifier = Classifier("one", model, lambda x: x, ((0.5,) * 3, (0.5,) * 3), ("yes",))
    found = explain(classifier, IMAGE, segments="grid:4", samples=40)
    assert 0 < found.numbers["target"]["probability"] < 1 and found.weights.abs().max() > 1e-4
    with pytest.raises(SkipError, match="0 to 0"):
        occlusion(forward, IMAGE, PARTS, 1)


@pytest.mark.parametrize(("classes", "last"), [(3, nn.Softmax(1)), (1, nn.Sigmoid())])
def test_probabilities_are_not_made_probabilities_again(classes, last):
    with pytest.warns(UserWarning, match="answers with probabilities"):
        found = occlusion(masked_forward(net(classes, last=last)), IMAGE, PARTS, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = occlusion(masked_forward(net(classes)), IMAGE, PARTS, 0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", [lambda out: SimpleNamespace(logits=out), lambda out: {"logits": out, "loss": None}])
def test_outputs_of_hugging_face_are_answers(form):
    plain, forward = masked_forward(net()), masked_forward(net(form=form))
    for ask in (
        lambda f: occlusion(f, IMAGE, PARTS, 1),
        lambda f: lime(f, IMAGE, PARTS, 1, samples=20),
        lambda f: many_masks(f, IMAGE, torch.eye(16), PARTS),
    ):
        torch.testing.assert_close(ask(forward), ask(plain))
    with pytest.raises(SkipError, match="output with `logits`; got list"):
        many_masks(masked_forward(net(form=lambda out: [out])), IMAGE, torch.eye(16), PARTS)


def test_a_batch_of_one_is_an_image_and_numpy_has_segments():
    forward = masked_forward(net())
    for ask in (
        lambda image, parts: occlusion(forward, image, parts, 1),
        lambda image, parts: lime(forward, image, parts, 1, samples=20),
        lambda image, parts: rise(forward, image, 1, samples=20),
        lambda image, parts: many_masks(forward, image, torch.eye(16), parts),
        lambda image, parts: slic_segments(image, 4),
        lambda image, parts: spread(torch.arange(16.0), parts),
    ):
        torch.testing.assert_close(ask(IMAGE[None], PARTS.numpy()), ask(IMAGE, PARTS))
    for image in (torch.zeros(2, 3, 16, 16), torch.zeros(16, 16), "cat.png"):
        with pytest.raises(SkipError, match=r"one image \[C, H, W\]"):
            occlusion(forward, image, PARTS, 1)
    for parts, message in (([[0]], "got list"), (PARTS[0], "shape"), (PARTS.float().numpy(), "whole numbers")):
        with pytest.raises(SkipError, match=message):
            lime(forward, IMAGE, parts, 1, samples=4)


def test_superpixels_are_as_many_as_asked_for():
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    image = torch.stack([y, x, (9 * y).sin() * (7 * x).cos()])
    for count in (12, 40):
        assert abs(int(slic_segments(image, count).max()) + 1 - count) <= 4
    with pytest.raises(SkipError, match="at least one superpixel"):
        slic_segments(image, 0)


def test_one_segment_has_nothing_to_compare():
    classifier = Classifier("net", net(), lambda x: x, ((0.5,) * 3, (0.5,) * 3))
    for segments in ("grid:1", "slic:1"):
        with pytest.raises(SkipError, match=f"{segments} makes one segment"):
            explain(classifier, IMAGE, segments=segments, samples=4)


@pytest.mark.filterwarnings("ignore")
def test_limes_defaults_do_not_explain_nothing():
    explainer = pytest.importorskip("lime.lime_image").LimeImageExplainer(random_state=0)
    classify = lime_classifier(masked_forward(net(1)), IMAGE[None])
    picture = np.random.default_rng(0).random((16, 16, 3))
    more = {"labels": (1,), "top_labels": None, "num_samples": 30, "segmentation_fn": lambda _: PARTS.numpy()}
    with pytest.raises(SkipError, match="hide_color=SENTINEL"):
        explainer.explain_instance(picture, classify, **more)
    with pytest.raises(SkipError, match="picture as floats"):
        explainer.explain_instance((picture * 255).astype(np.uint8), classify, hide_color=SENTINEL, **more)
    found = explainer.explain_instance(picture, classify, hide_color=SENTINEL, **more)
    assert max(abs(weight) for _, weight in found.local_exp[1]) > 1e-3, "no and yes, of one output"


def test_a_hybrid_transformer_is_refused():
    model = timm.create_model("vit_tiny_r_s16_p8_224", num_classes=3).eval()
    keep = torch.ones(1, 224, 224, dtype=torch.bool)
    with pytest.raises(SkipError, match="hybrid"), contextlib.ExitStack() as stack:
        stack.enter_context(LayerMask(keep).apply(model))
