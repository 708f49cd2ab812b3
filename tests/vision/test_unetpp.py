"""UNet++ obeys its laws on twelve backbones; its heads together, its weights, checkpoints and what it refuses."""

import json
import math

import pytest
import timm.models._builder
import torch
from helpers.tiny_unetpp import TINY, parameters
from hypothesis import given, settings
from hypothesis import strategies as st

import skipguide.vision.unetpp.network as unetpp
from skipguide.errors import SkipError
from skipguide.vision import UNetPlusPlus
from skipguide.vision.segmentation import deep_supervision_loss

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


@torch.no_grad()
def laws(model, images):
    model = model.eval()
    full = model(images)
    sizes = []
    for level, expected in zip(model.levels, full, strict=True):
        run = model.run(images, head=level)
        assert run.logits.shape == (len(images), model.classes, *images.shape[-2:])
        assert set(run.rows_run) == {(i, j) for i in range(level + 1) for j in range(level + 1 - i)}
        assert torch.equal(run.logits, expected)
        smaller = model.pruned(level)
        assert torch.equal(smaller(images), expected)
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


def disagreement(first, second):
    a, b = first > 0, second > 0
    union = int((a | b).sum())
    return int((a != b).sum()) / union if union else 0.0


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
    assert torch.equal(model(images, head="adaptive", tolerance=1.0), full[1])
    shallow = UNetPlusPlus(in_channels=1, widths=(4, 8)).eval()
    assert torch.equal(shallow(images, head="adaptive"), shallow(images, head=1))


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


class FetchedError(Exception):
    pass


def fetch(*_, **__):
    raise FetchedError


def test_save_and_load(tmp_path, monkeypatch):
    monkeypatch.setattr(timm.models._builder, "load_pretrained", fetch)
    with pytest.raises(FetchedError):  # here timm would have asked for its weights
        UNetPlusPlus("resnet10t", pretrained=True)
    torch.manual_seed(0)
    images = torch.rand(1, 3, 32, 32)
    for model in (UNetPlusPlus(classes=2, **TINY), UNetPlusPlus("resnet10t", encoder_args={"drop_path_rate": 0.1})):
        for saved in (model.eval(), model.pruned(2)):
            saved.save_pretrained(tmp_path / "model")
            again = UNetPlusPlus.from_pretrained(tmp_path / "model").eval()
            with torch.no_grad():
                assert torch.equal(again(images, head=2), saved(images, head=2))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["depth"] == 2
    config["pretrained"] = True  # as if timm's weights had been loaded: they are not fetched again
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    again = UNetPlusPlus.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(again(images, head=2), saved(images, head=2))


def test_pruned_keeps_device_type_mode_and_frozen_weights():
    model = UNetPlusPlus(**TINY).double().eval()
    model.node_at(0, 0).conv1.weight.requires_grad_(False)
    smaller = model.pruned(1)
    weight = smaller.node_at(0, 0).conv1.weight
    assert not smaller.training
    assert not weight.requires_grad
    assert weight.data_ptr() != model.node_at(0, 0).conv1.weight.data_ptr()
    assert torch.equal(weight, model.node_at(0, 0).conv1.weight)


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


def published(model):
    """The weights under the plain PyTorch UNet++'s keys."""
    state = {}
    for key, value in model.state_dict().items():
        kind, first, rest = key.split(".", 2)
        if kind == "node":
            second, rest = rest.split(".", 1)
            state[f"conv{first}_{second}.{rest}"] = value
        else:
            state[f"final{first if model.deep_supervision else ''}.{rest}"] = value
    return state


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("widths", [(4, 6), (4, 6, 8), (4, 5, 6, 7, 8)])
@torch.no_grad()
def test_every_depth_in_every_form(widths, deep, tmp_path):
    torch.manual_seed(0)
    model = UNetPlusPlus(classes=2, deep_supervision=deep, widths=widths).eval()
    state, images = published(model), torch.rand(1, 3, 32, 16)
    old = {key: value for key, value in state.items() if "num_batches" not in key}  # of torch before 0.4
    wrapped = {f"module._orig_mod.module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 3, "model": state}, tmp_path / "model.pth")
    for form in (state, wrapped, {"state_dict": state}, old, tmp_path / "model.pth", str(tmp_path / "model.pth")):
        again = UNetPlusPlus.from_reference_checkpoint(form)
        assert torch.equal(again.run(images).logits, model.run(images).logits)


def test_keys_that_only_look_like_its_own_are_named():
    state = published(UNetPlusPlus(widths=(4, 6)))
    for key in ("conv0_0_1.conv1.weight", "conva_b.conv1.weight", "finale.weight"):
        with pytest.raises(SkipError, match=key):
            UNetPlusPlus.from_reference_checkpoint(state | {key: torch.zeros(1)})
    with pytest.raises(SkipError, match=r"conv0_0\.conv1\.bias"):
        UNetPlusPlus.from_reference_checkpoint(state | {"conv0_0.conv1.bias": "none"})


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
        ({"classes": 0}, "classes as a whole number of at least 1"),
        ({"depth": 0}, "at least 1"),
        ({"depth": 6}, "7 widths"),
        ({"in_channels": 0}, "in_channels"),
        ({"widths": (0, 8)}, "widths as a whole number of at least 1"),
        ({"nested": False}, "deep_supervision=False"),
    ],
    ids=str,
)
def test_bad_settings(arguments, message):
    with pytest.raises(SkipError, match=message), torch.device("meta"):
        UNetPlusPlus(**arguments)


def test_one_image_that_shrank_to_a_pixel_cannot_be_normalised_in_training():
    model = UNetPlusPlus(widths=(4, 6, 8))
    with pytest.raises(SkipError, match=r"more than one value per channel.*model\.eval\(\)"):
        model(torch.rand(1, 3, 4, 4))
    assert model(torch.rand(2, 3, 4, 4))[-1].shape == model.eval()(torch.rand(2, 3, 4, 4))[-1].shape
    assert torch.isfinite(model(torch.rand(1, 3, 4, 4))[-1]).all()
