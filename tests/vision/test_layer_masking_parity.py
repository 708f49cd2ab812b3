"""Layer masking: parity with the published code, and the ablation by partial convolution."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from skipguide.vision import LayerMask, masked_forward
from skipguide.vision.layer_masking import mask_of
from skipguide.vision.layer_masking.action import prepare
from skipguide.vision.layer_masking.fill import fill, fill_weights
from skipguide.vision.layer_masking.geometry import Window
from skipguide.vision.layer_masking.mask_cache import MaskCache
from skipguide.vision.layer_masking.masks import whole
from skipguide.vision.layer_masking.rules.windows import run_window
from zoo.masking import close

pytestmark = pytest.mark.numerics

GOLDEN = Path(__file__).parents[1] / "golden" / "layer_masking"
VARIANTS = {"lm": "neighbours", "nopad": "zeros", "pconv": "partial"}


@pytest.fixture(scope="module")
def golden():
    def block(inside, out, stride):
        down = None
        if stride != 1 or inside != out:
            down = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        return nn.Sequential(BasicBlock(inside, out, stride, down))

    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    model.conv1, model.bn1 = nn.Conv2d(3, 12, 7, 2, 3, bias=False), nn.BatchNorm2d(12)
    model.layer1, model.layer2 = block(12, 12, 1), block(12, 24, 2)
    model.layer3, model.layer4 = block(24, 48, 2), block(48, 96, 2)
    model.fc = nn.Linear(96, 10)
    model.load_state_dict(load_file(GOLDEN / "lm_basic_weights.safetensors"))
    return model.eval(), load_file(GOLDEN / "lm_basic_cases.safetensors")


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("shape", ["rect", "blob", "patch16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("crop", [False, True])
@torch.no_grad()
def test_logits_of_the_reference(golden, size, shape, variant, crop):
    model, cases = golden
    keep = cases[f"mask{size}.{shape}"].bool()
    with LayerMask(keep, VARIANTS[variant], crop).apply(model) as applied:
        for _ in range(2):  # the first pass may find out what the model does, the second has a plan
            close(model(cases[f"img{size}"]), cases[f"{variant}{size}.{shape}.logits"])
    assert applied.stats.planned >= 1


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("shape", ["rect", "blob", "patch16"])
@torch.no_grad()
def test_masks_and_activations_of_the_reference(golden, size, shape):
    model, cases = golden
    seen, acts = {}, {}

    def look(name):
        def hook(module, inputs, output):
            seen[name], acts[name] = mask_of(output), output

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        for crop in (False, True):
            with LayerMask(cases[f"mask{size}.{shape}"].bool(), crop=crop).apply(model):
                model(cases[f"img{size}"])
                model(cases[f"img{size}"])
            prefix = f"lm{size}.{shape}.mask."
            wanted = {key.removeprefix(prefix): value.bool() for key, value in cases.items() if key.startswith(prefix)}
            assert len(wanted) == 7
            for name, mask in wanted.items():
                assert torch.equal(seen[name], mask), name
            if not crop:
                for name in ("layer1", "layer4"):
                    theirs = cases[f"lm{size}.{shape}.act.{name}"]
                    close(acts[name][: len(theirs)] * seen[name], theirs * seen[name])
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def test_everything_and_nothing_as_in_the_reference(golden):
    model, cases = golden
    for size in (64, 96):
        x = cases[f"img{size}"]
        forward = masked_forward(model)
        close(model(x), cases[f"plain_logits{size}"])
        assert torch.equal(forward(torch.ones(1, size, size), x), model(x))
        close(forward(torch.ones(1, size, size), x), cases[f"lm{size}.ones.logits"])
        assert torch.equal(forward(torch.zeros(1, size, size), x), model.fc.bias.expand(3, -1))
        close(forward(torch.zeros(1, size, size), x), cases[f"lm{size}.zeros.logits"])


def test_fill_of_the_reference():
    unit = load_file(GOLDEN / "lm_unit.safetensors")
    mask, x = unit["m"].bool(), unit["x"] * unit["m"]
    for rounds in (0, 1, 2, 3, 7):
        torch.testing.assert_close(fill(x, fill_weights(mask, rounds)), unit[f"fill{rounds}"], rtol=1e-4, atol=1e-5)


def test_layers_of_the_reference():
    unit = load_file(GOLDEN / "lm_unit.safetensors")
    mask, x = unit["m"].bool(), unit["x"]

    def run(op, plain):
        cache = MaskCache()
        after = cache.mask(op, [mask])
        action = prepare(op, [mask], after, [whole(mask)], whole(after), op.rounds, torch.float32, "neighbours", cache)
        out = run_window(op, action, x, whole(mask), plain, plain)
        return out * after, after, action

    names = [key.removesuffix(".weight") for key in unit if key.endswith(".weight")]
    assert len(names) == 5
    for name in names:
        weight, bias = unit[f"{name}.weight"], unit.get(f"{name}.bias")
        k, s, p = (int(name[name.index(letter) + 1]) for letter in "ksp"[:1] + "sp")
        op = Window("conv2d", (0,), "conv", (k, k), (s, s), (p, p, p, p))
        out, after, _ = run(op, lambda v, w=weight, b=bias, s=s, p=p: F.conv2d(v, w, b, s, p))
        assert torch.equal(after.byte(), unit[f"{name}.mask"]), name
        torch.testing.assert_close(out, unit[f"{name}.out"], rtol=1e-4, atol=1e-5)
    for positive in (True, False):
        op = Window("max_pool2d", (0,), "max", (3, 3), (2, 2), (1, 1, 1, 1), positive=positive)
        out, after, _ = run(op, lambda v: F.max_pool2d(v, 3, 2, 1))
        assert torch.equal(after.byte(), unit["maxpool321.mask"])
        # the reference's maximum counts a hidden position as 0; ours does so after a ReLU only, where it is no matter
        theirs = unit["maxpool321.out"]
        same = out if positive else out.clamp_min(0)
        torch.testing.assert_close(same, theirs if positive else theirs.clamp_min(0), rtol=1e-4, atol=1e-5)
    op = Window("avg_pool2d", (0,), "avg", (2, 2), (2, 2))
    out, after, action = run(op, lambda v: F.avg_pool2d(v, 2))
    assert torch.equal(after.byte(), unit["avgpool22.mask"])
    # ours is the mean over the visible; the reference divides by the whole window
    plain = out / torch.where(action.scale > 0, action.scale, 1.0)
    torch.testing.assert_close(plain, unit["avgpool22.out"], rtol=1e-4, atol=1e-5)

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.same = nn.Conv2d(3, 3, 1, bias=False)
            nn.init.dirac_(self.same.weight)

        def forward(self, x):
            return F.adaptive_avg_pool2d(self.same(x), 1)

    torch.testing.assert_close(masked_forward(Mean().eval())(mask, x), unit["gap.out"], rtol=1e-4, atol=1e-5)


class Biased(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, **settings)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize("settings", [{"padding": 1}, {"stride": 2}, {"dilation": 2, "padding": (0, 2), "groups": 2}])
@pytest.mark.parametrize("crop", [False, True])
@torch.no_grad()
def test_a_bias_is_added_after_the_weighing(settings, crop):
    torch.manual_seed(0)
    model, x = Biased(**settings), torch.randn(2, 4, 16, 20)
    keep = torch.zeros(1, 1, 16, 20, dtype=torch.bool)
    keep[..., 3:9, 4:12] = True
    conv = model.conv
    window = torch.full((1, 1, 3, 3), 1 / 9)
    share = F.conv2d(keep.float(), window, None, conv.stride, conv.padding, conv.dilation)
    known = share > 0
    plain = F.conv2d(x * keep, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    values = (plain / share.clamp_min(1e-9) + conv.bias[:, None, None]) * known
    forward = masked_forward(model, "partial", crop=crop)
    for _ in range(2):
        torch.testing.assert_close(forward(keep, x), values.sum((2, 3)) / known.sum())
