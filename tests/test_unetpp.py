"""UNet++ against the reference outputs, its laws on twelve backbones, losses and measures against arithmetic."""

import doctest
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import skipguide.vision.segmentation as segmentation
import skipguide.vision.unetpp as unetpp
from skipguide.errors import SkipError
from skipguide.vision import UNetPlusPlus
from skipguide.vision.segmentation import (
    ClassMeter,
    MaskMeter,
    bce_dice_loss,
    deep_supervision_loss,
    inside_of,
    overlay,
    predict_tiled,
)

GOLDEN = Path(__file__).parent / "golden" / "unetpp"
TINY = {"widths": (4, 8, 12, 16)}
# Families, shrunk where their smallest member is large.
FAMILIES = {
    "resnet10t": {},
    "mobilenetv3_small_050": {},
    "efficientnet_lite0": {},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "regnetx_002": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},  # NHWC
    "pvt_v2_b0": {},
    "hrnet_w18_small": {},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64},
    "fastvit_t8": {},
    "edgenext_xx_small": {},
}


@pytest.fixture(scope="module")
def golden():
    tensors = load_file(GOLDEN / "unetpp_nested.safetensors")
    document = json.loads((GOLDEN / "unetpp_nested.json").read_text())
    model = UNetPlusPlus(classes=document["n_classes"], widths=document["channels"]).eval()
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    result = model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in result.missing_keys)
    return model, tensors, document


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def same(left, right):
    return torch.equal(left, right)


# --- the reference


@torch.no_grad()
def test_heads_and_nodes_equal_the_reference(golden):
    model, tensors, _ = golden
    walk = unetpp.Walk(model, tensors["input"])
    for i, j in model.nodes():
        torch.testing.assert_close(walk(i, j), tensors[f"act_eval/node{i}.{j}"], atol=5e-5, rtol=1e-5)
    for level, logits in enumerate(model(tensors["input"]), start=1):
        torch.testing.assert_close(logits, tensors[f"output_eval/head{level}"], atol=5e-5, rtol=1e-5)


def test_loss_and_gradients_equal_the_reference(golden):
    model, tensors, document = golden
    with torch.no_grad():
        heads = model(tensors["input"])
    for logits, expected in zip(heads, document["bce_dice_per_head_eval"], strict=True):
        assert bce_dice_loss(logits, tensors["target"]).item() == pytest.approx(expected, abs=1e-6)
    double = UNetPlusPlus(classes=2, widths=document["channels"]).eval().double()
    double.load_state_dict(model.state_dict())
    loss = deep_supervision_loss(double(tensors["input"].double()), tensors["target"].double())
    assert loss.item() == pytest.approx(document["loss_float64_eval"], abs=1e-10)
    loss.backward()
    for name, norm in document["grad_l2_float64_eval"].items():
        assert double.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-8), name
    for key, expected in tensors.items():
        if key.startswith("grad_float64_eval/"):
            found = double.get_parameter(key.removeprefix("grad_float64_eval/")).grad
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


@torch.no_grad()
def test_measures_equal_the_reference(golden):
    model, tensors, document = golden
    expected = [*document["iou_per_head_eval"], document["ensemble_mean_of_sigmoids_iou"]]
    for head, iou in zip([1, 2, 3, 4, "mean"], expected, strict=True):
        meter = MaskMeter(2)
        meter.update(model(tensors["input"], head=head), tensors["target"])
        assert meter.pooled_iou == pytest.approx(iou, abs=1e-6)


@torch.no_grad()
def test_pruning_of_the_reference(golden):
    model, tensors, document = golden
    for level in range(1, 5):
        smaller = model.pruned(level)
        assert parameters(smaller) == document["params_per_prune_level"][str(level)]
        nodes = {f"{i}.{j}" for i, j in model.run(tensors["input"], head=level).rows_run}
        assert nodes == set(document["nodes_executed_per_prune_level"][str(level)])
        assert same(smaller(tensors["input"]), model(tensors["input"], head=level))


def test_sizes_of_the_paper():
    with torch.device("meta"):
        assert parameters(UNetPlusPlus(deep_supervision=False)) == 9_163_329
        assert parameters(UNetPlusPlus()) == 9_163_428
        assert parameters(UNetPlusPlus(nested=False, deep_supervision=False)) == 7_852_545
        for level, count in enumerate((103_041, 519_105, 2_236_161, 9_163_329), start=1):
            assert parameters(UNetPlusPlus(depth=level, deep_supervision=False)) == count
    # and as an export, with the weights that count
    assert [parameters(UNetPlusPlus().pruned(level)) for level in (1, 3)] == [103_041, 2_236_161]


def test_reads_the_widespread_checkpoint_layout(golden):
    model, tensors, _ = golden
    state = {}
    for key, value in model.state_dict().items():
        kind, *place = key.split(".")
        if kind == "node":
            state[f"module.conv{place[0]}_{place[1]}.{'.'.join(place[2:])}"] = value
        else:
            state[f"module.final{place[0]}.{place[1]}"] = value
    again = UNetPlusPlus.from_reference_checkpoint(state)
    with torch.no_grad():
        assert same(again(tensors["input"], head=4), model(tensors["input"], head=4))
    for change, message in (
        ({"module.att.weight": torch.zeros(1)}, "att.weight.* too"),
        ({"module.conv0_1.conv9.weight": torch.zeros(1)}, "conv9.* too"),
        ({"module.conv1_1.conv1.weight": torch.zeros(2, 2, 3, 3)}, "shapes do not fit"),
    ):
        with pytest.raises(SkipError, match=message):
            UNetPlusPlus.from_reference_checkpoint(state | change)
    with pytest.raises(SkipError, match=r"lacks 'head\.4\.bias'"):
        UNetPlusPlus.from_reference_checkpoint({k: v for k, v in state.items() if k != "module.final4.bias"})
    with pytest.raises(SkipError, match="got NoneType"):
        UNetPlusPlus.from_reference_checkpoint(None)
    del state["module.conv0_1.conv1.bias"]
    with pytest.raises(SkipError, match="lacks"):
        UNetPlusPlus.from_reference_checkpoint(state)
    with pytest.raises(SkipError, match="expected keys"):
        UNetPlusPlus.from_reference_checkpoint({"a": torch.zeros(1)})


# --- laws


@torch.no_grad()
def laws(model, images):
    model = model.eval()
    full = model(images)
    sizes = []
    for level, expected in zip(model.levels, full, strict=True):
        run = model.run(images, head=level)
        assert run.logits.shape == (len(images), model.classes, *images.shape[-2:])
        assert set(run.rows_run) == {(i, j) for i in range(level + 1) for j in range(level + 1 - i)}
        assert same(run.logits, expected)
        smaller = model.pruned(level)
        assert same(smaller(images), expected)
        sizes.append(parameters(smaller))
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize(("name", "arguments"), FAMILIES.items(), ids=str)
def test_every_family(name, arguments):
    torch.manual_seed(0)
    model = UNetPlusPlus(name, classes=2, encoder_args=arguments)
    laws(model, torch.rand(1, 3, 50, 70))


@torch.no_grad()
def test_a_timm_encoder_stops_where_the_head_does():
    model = UNetPlusPlus("resnet10t").eval()
    ran = []
    for name, module in model.encoder.model.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(torch.rand(1, 3, 32, 32), head=1)
    assert "layer1" in ran
    assert "layer2" not in ran
    ran.clear()
    model(torch.rand(1, 3, 32, 32), head=2)
    assert "layer2" in ran
    assert "layer3" not in ran


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_any_size(height, width):
    laws(UNetPlusPlus(classes=1, in_channels=1, **TINY), torch.rand(2, 1, height, width))


def test_full_resolution_level():
    model = UNetPlusPlus("resnet10t", full_resolution=True)
    assert model.widths[0] == 16
    assert model.levels == [1, 2, 3, 4, 5]
    laws(model, torch.rand(1, 3, 40, 33))


@torch.no_grad()
def test_mean_is_the_mean_of_the_probabilities():
    model = UNetPlusPlus(**TINY).eval()
    images = torch.rand(2, 3, 24, 24)
    expected = torch.stack([head.sigmoid() for head in model(images)]).mean(0)
    torch.testing.assert_close(model(images, head="mean").sigmoid(), expected)
    extreme = unetpp.mean_of_probabilities([torch.tensor(200.0), torch.tensor(100.0)])
    assert extreme == pytest.approx(100 + math.log(2))


@torch.no_grad()
def test_adaptive_goes_deeper_only_where_heads_differ():
    torch.manual_seed(1)
    model = UNetPlusPlus(in_channels=1, **TINY).eval()
    images = torch.rand(6, 1, 24, 24) * torch.tensor([0.0, 0.2, 1, 5, 20, 80]).view(-1, 1, 1, 1)
    for conv in model.head.values():
        conv.bias -= 0.02
    full = model(images)
    for tolerance in (0.0, 0.1, 0.5, 1.0):
        run = model.run(images, "adaptive", tolerance)
        for row in range(6):
            level = 2
            while level < 3 and disagreement(full[level - 2][row], full[level - 1][row]) > tolerance:
                level += 1
            assert run.levels[row] == level
            torch.testing.assert_close(run.logits[row], full[level - 1][row], atol=1e-5, rtol=1e-4)
        assert run.rows_run[0, 2] == 6
        assert run.rows_run.get((0, 3), 0) == int((run.levels == 3).sum())
    assert same(model(images, head="adaptive", tolerance=1.0), full[1])
    shallow = UNetPlusPlus(in_channels=1, widths=(4, 8)).eval()
    assert same(shallow(images, head="adaptive"), shallow(images, head=1))


def disagreement(first, second):
    a, b = first > 0, second > 0
    union = int((a | b).sum())
    return int((a != b).sum()) / union if union else 0.0


@torch.no_grad()
def test_adaptive_on_a_timm_backbone():
    torch.manual_seed(2)
    model = UNetPlusPlus("resnet10t").eval()
    images = torch.rand(3, 3, 50, 40)
    images[1] = 0
    run = model.run(images, "adaptive", 0.0)
    full = model(images)
    for row, level in enumerate(run.levels.tolist()):
        torch.testing.assert_close(run.logits[row], full[level - 1][row], atol=1e-4, rtol=1e-4)


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(1, 3, 32, 32)
    for model in (UNetPlusPlus(classes=2, **TINY), UNetPlusPlus("resnet10t", encoder_args={"drop_path_rate": 0.1})):
        for saved in (model.eval(), model.pruned(2)):
            saved.save_pretrained(tmp_path / "model")
            again = UNetPlusPlus.from_pretrained(tmp_path / "model").eval()
            with torch.no_grad():
                assert same(again(images, head=2), saved(images, head=2))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["depth"] == 2
    config["pretrained"] = True  # as if timm's weights had been loaded: they are not fetched again
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    UNetPlusPlus.from_pretrained(tmp_path / "model")


def test_pruned_keeps_device_type_mode_and_frozen_weights():
    model = UNetPlusPlus(**TINY).double().eval()
    model.node_at(0, 0).conv1.weight.requires_grad_(False)
    smaller = model.pruned(1)
    weight = smaller.node_at(0, 0).conv1.weight
    assert not smaller.training
    assert not weight.requires_grad
    assert weight.data_ptr() != model.node_at(0, 0).conv1.weight.data_ptr()
    assert same(weight, model.node_at(0, 0).conv1.weight)


def test_gradients_reach_every_weight_and_a_step_lowers_the_loss():
    torch.manual_seed(0)
    model = UNetPlusPlus(in_channels=1, **TINY)
    images = torch.rand(4, 1, 16, 16)
    target = (images > 0.5).float()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = deep_supervision_loss(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses[-1] < 0.7 * losses[0]


def test_bad_input():
    model = UNetPlusPlus(**TINY).eval()
    good = torch.rand(1, 3, 16, 16)
    with pytest.raises(SkipError, match=r"\[N, 3, H, W\]; got \(1, 4, 16, 16\)"):
        model(torch.rand(1, 4, 16, 16))
    with pytest.raises(SkipError, match="got list"):
        model([good])
    with pytest.raises(SkipError, match="floats"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    bad = good.clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(SkipError, match="NaN"):
        model(bad)
    for head in (0, 4, "max", True, 1.0):
        with pytest.raises(SkipError, match="expected a head out of"):
            model(good, head=head)
    with pytest.raises(SkipError, match="tolerance"):
        model(good, head="adaptive", tolerance=2)
    with pytest.raises(SkipError, match="eval"):
        UNetPlusPlus(**TINY)(good, head="adaptive")
    single = UNetPlusPlus(deep_supervision=False, **TINY).eval()
    with torch.no_grad():
        assert single(good).shape == (1, 1, 16, 16)
    for head in (1, "mean", "adaptive"):
        with pytest.raises(SkipError, match="deep_supervision=True"):
            single(good, head=head)
    with pytest.raises(SkipError, match="deep_supervision=True"):
        single.pruned(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": "vit_tiny_patch16_224"}, "all have stride 16"),
        ({"encoder": "no_such_model"}, "no usable features"),
        ({"encoder": "resnet10t", "depth": 7}, "expected a depth up to 4"),
        ({"encoder": "vgg11", "full_resolution": True}, "full resolution already"),
        ({"pretrained": True}, "timm encoder"),
        ({"classes": 0}, "at least one class"),
        ({"depth": 0}, "at least 1"),
        ({"depth": 6}, "7 widths"),
        ({"in_channels": 0}, "in_channels"),
        ({"widths": (0, 8)}, "widths of at least 1"),
        ({"nested": False}, "deep_supervision=False"),
    ],
    ids=str,
)
def test_bad_settings(arguments, message):
    with pytest.raises(SkipError, match=message), torch.device("meta"):
        UNetPlusPlus(**arguments)


# --- losses and measures


def test_loss_on_paper():
    logits = torch.zeros(2, 1, 2, 2)
    target = torch.tensor([[[[1.0, 1], [0, 0]]], [[[0.0, 0], [0, 0]]]])
    # chance 1/2 everywhere: Dice is 2*1/(2+2) and (nearly) 0/(2+0)
    expected = 0.5 * math.log(2) + 1 - (0.5 + 0.0) / 2
    assert bce_dice_loss(logits, target).item() == pytest.approx(expected, abs=1e-5)
    heads = [logits, logits + 1]
    one, two = (bce_dice_loss(head, target) for head in heads)
    torch.testing.assert_close(deep_supervision_loss(heads, target), (one + two) / 2)
    torch.testing.assert_close(deep_supervision_loss(heads, target, weights=(3, 1)), (3 * one + two) / 4)
    torch.testing.assert_close(deep_supervision_loss(logits, target), one)
    for weights in ((1,), (0, 0), (-1, 2)):
        with pytest.raises(SkipError, match="weight"):
            deep_supervision_loss(heads, target, weights=weights)
    with pytest.raises(SkipError, match="shape"):
        bce_dice_loss(logits, target[:1])


def test_meters_count_over_the_set():
    torch.manual_seed(0)
    logits, target = torch.randn(6, 3, 5, 7), torch.rand(6, 3, 5, 7) > 0.6
    whole, parts = MaskMeter(3), MaskMeter(3)
    whole.update(logits, target)
    for at in (slice(0, 1), slice(1, 6)):
        parts.update(logits[at], target[at])
    assert same(whole.iou, parts.iou)
    found = logits > 0
    for c in range(3):
        both, either = int((found & target)[:, c].sum()), int((found | target)[:, c].sum())
        assert whole.iou[c].item() == pytest.approx(both / either)
        assert whole.dice[c].item() == pytest.approx(2 * both / (both + either))
    with pytest.raises(SkipError, match="NaN"):
        whole.update(logits * float("nan"), target)
    with pytest.raises(SkipError, match="expected logits"):
        whole.update(logits[:, :2], target[:, :2])
    with pytest.raises(SkipError, match="threshold"):
        MaskMeter(1, threshold=1.5)


def test_class_meter_both_ways():
    truth = torch.tensor([[[0, 0, 1, 255]], [[1, 1, 1, 1]]])
    found = torch.tensor([[[0, 1, 1, 0]], [[1, 1, 2, 1]]])
    meter = ClassMeter(4)
    for row in range(2):
        meter.update(found[row : row + 1], truth[row : row + 1])
    # over the set: class 0 1/2; class 1 4/6; class 2 0/1; class 3 nowhere
    assert meter.mean_iou == pytest.approx((1 / 2 + 4 / 6 + 0) / 3)
    # per batch: (1/2 + 1/2)/2, then 3/4; class 2 does not occur and is forgiven
    assert meter.challenge_miou == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert meter.accuracy == pytest.approx(5 / 7)
    logits = F.one_hot(found, 4).permute(0, 3, 1, 2).float()
    again = ClassMeter(4)
    again.update(logits, truth)
    assert same(again.confusion, meter.confusion)
    assert again.challenge_miou != pytest.approx(meter.challenge_miou), "that measure depends on the batch size"
    with pytest.raises(SkipError, match=r"expected classes 0\.\.3"):
        meter.update(torch.tensor([4]), torch.tensor([0]))
    with pytest.raises(SkipError, match="shape"):
        meter.update(found[0], truth)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(0, 8), st.integers(1, 5))
def test_tiles_join_without_a_seam(height, width, tile, overlap, batch):
    images = torch.rand(2, 3, height, width)
    overlap = min(overlap, tile // 2)
    found = predict_tiled(lambda x: x.mean(1, keepdim=True), images, tile=tile, overlap=overlap, batch=batch)
    torch.testing.assert_close(found, images.mean(1, keepdim=True))


@torch.no_grad()
def test_tiles_of_bytes_and_of_low_precision():
    bytes_ = torch.randint(256, (2, 3, 40, 50), dtype=torch.uint8)
    found = predict_tiled(lambda x: x.float() / 255, bytes_, tile=16, overlap=4)
    torch.testing.assert_close(found, bytes_.float() / 255)
    assert predict_tiled(lambda x: x.bfloat16(), bytes_, tile=16, overlap=4).dtype == torch.bfloat16
    with pytest.raises(SkipError, match=r"images \[N, C, H, W\]"):
        predict_tiled(lambda x: x, bytes_[0], tile=16, overlap=4)


def test_the_loss_of_large_masks_in_low_precision():
    logits, target = torch.full((1, 1, 300, 300), 4.0), torch.zeros(1, 1, 300, 300)
    target[..., :150] = 1  # 90 000 pixels: more than float16 holds
    expected = bce_dice_loss(logits, target)
    for dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(bce_dice_loss(logits.to(dtype), target), expected)


def test_a_mask_of_small_numbers_is_not_an_empty_one():
    square = np.zeros((4, 4), np.uint8)
    square[1:3] = 255
    assert inside_of(Image.fromarray(square)).sum() == 8
    assert inside_of(Image.fromarray(square > 0)).sum() == 8
    assert inside_of(Image.fromarray(0 * square)).sum() == 0
    for small in (square // 255, (square // 255) * 7):
        with pytest.raises(SkipError, match="expected 0 outside and 255 inside"):
            inside_of(Image.fromarray(small))


def test_tiles_of_a_model():
    model = UNetPlusPlus(**TINY).eval()
    images = torch.rand(1, 3, 60, 45)
    assert same(predict_tiled(lambda x: model(x, head=1), images, tile=64, overlap=8), model(images, head=1))
    # far from a tile's border, a tile shows what the whole image shows
    tiled = predict_tiled(lambda x: model(x, head=1), images, tile=40, overlap=20)
    assert tiled.shape == (1, 1, 60, 45)
    for overlap, tile in ((5, 8), (-1, 8), (0, 0)):
        with pytest.raises(SkipError, match="overlap"):
            predict_tiled(lambda x: x, images, tile=tile, overlap=overlap)
    for broken in (lambda x: x[..., ::2], model):
        with pytest.raises(SkipError, match="expected the model to return"):
            predict_tiled(broken, images, tile=8, overlap=4)


def test_overlay_paints_the_mask():
    from PIL import Image

    mask = torch.zeros(9, 12, dtype=torch.bool)
    mask[2:7, 3:9] = True
    picture = overlay(Image.new("L", (12, 9), 100), mask, colour=(200, 0, 0), opacity=0.5)
    assert picture.getpixel((0, 0)) == (100, 100, 100)
    assert picture.getpixel((3, 2)) == (200, 0, 0)
    assert picture.getpixel((5, 4)) == (150, 50, 50)
    with pytest.raises(SkipError, match="9x12"):
        overlay(Image.new("L", (12, 9)), mask.T)


@pytest.mark.parametrize("module", [unetpp, segmentation], ids=lambda m: m.__name__)
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
