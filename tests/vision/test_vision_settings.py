"""The vision systems take numbers of NumPy and torch as Python's own, and refuse by name what is none."""

import json

import numpy as np
import pytest
import torch

from skipguide import SkipError
from skipguide.vision import FloorPlanNet, LayerMask, SkipDEQ, SkipNet, UNetPlusPlus, masked_forward, skipnet
from skipguide.vision.fixed_point import fixed_point
from skipguide.vision.skip_tuning import ClassSkip, TuneConfig
from skipguide.vision.skipnet import CifarResNet
from skipguide.vision.skipnet.objectives import Reinforce
from skipguide.vision.skipnet.train import TrainConfig

CONFIGS = [
    (ClassSkip, {"ratio": 0.5, "decay": 0.25}, {"max": 7}, {}),
    (TuneConfig, {"lr_text": 0.5, "weight_decay": 0.0}, {"epochs": 3, "views": 2, "seed": 4}, {"homogeneous": True}),
    (Reinforce, {"alpha": 0.5, "gamma": 0.25}, {}, {"detach": False}),
    (TrainConfig, {"lr": 0.5, "alpha": 0.25}, {"steps": 3, "seed": 4}, {"freeze_bn": True}),
]
# an array of a text stands for everything that is neither number nor flag and has a truth of its own
NO_NUMBER = ["x", True, float("nan"), float("inf"), [], np.array([1, 2]), object(), -1]
NO_WHOLE = [1.5, *NO_NUMBER]
NO_FLAG = ["no", 0, 1.0, [], np.array([True, True]), object()]


def net(**settings):
    return SkipNet(**({"backbone": {"blocks": [1, 1], "widths": [4, 4]}} | settings))


def tiny(**settings):
    return UNetPlusPlus(**({"widths": (4, 6)} | settings))


def deq(**settings):
    return SkipDEQ(**({"f": lambda z, x: torch.tanh(z / 2 + x)} | settings))


WHOLES = {
    "UNet++": (tiny, ("classes", "in_channels", "depth", "widths")),
    "floor plan": (FloorPlanNet, ("classes", "zones", "edge_types", "hidden", "features", "map_size", "in_channels")),
    "SkipNet": (net, ("embed", "hidden", "image_size")),
    "skipnet": (lambda **s: skipnet("resnet38", **s), ("num_classes",)),
    "CIFAR": (lambda **s: CifarResNet(**({"blocks": [1]} | s)), ("num_classes", "in_channels", "blocks", "widths")),
    "DEQ": (deq, ("budget", "memory", "phantom_steps", "backward_budget", "state_shape")),
}
FLAGS = {
    "UNet++": (tiny, ("deep_supervision", "nested", "full_resolution", "pretrained")),
    "floor plan": (FloorPlanNet, ("skips", "reinject", "pretrained")),
    "DEQ": (deq, ("coupled",)),
    "mask": (lambda **s: LayerMask(torch.ones(1, 2, 2) > 0, **s), ("crop",)),
    "forward": (lambda **s: masked_forward(torch.nn.Conv2d(3, 4, 1), **s), ("crop",)),
}


@pytest.mark.parametrize(("kind", "numbers", "wholes", "flags"), CONFIGS)
def test_numbers_of_other_libraries_become_pythons(kind, numbers, wholes, flags):
    plain = kind(**numbers, **wholes, **flags)
    for as_number, as_whole, as_flag in ((np.float32, np.int64, np.bool_), (torch.tensor,) * 3):
        given = {k: as_number(v) for k, v in numbers.items()} | {k: as_whole(v) for k, v in wholes.items()}
        found = kind(**given, **{k: as_flag(v) for k, v in flags.items()})
        assert found == plain
        assert json.loads(json.dumps(found.to_dict())) == plain.to_dict()


@pytest.mark.parametrize(("kind", "numbers", "wholes", "flags"), CONFIGS)
def test_what_is_no_number_is_refused_by_name(kind, numbers, wholes, flags):
    for names, junk in ((numbers, NO_NUMBER), (wholes, NO_WHOLE), (flags, NO_FLAG)):
        for name in names:
            for value in junk[:-1] if name == "seed" else junk:  # a seed may be negative, as torch's
                with pytest.raises(SkipError, match=rf"\b{name}\b"):
                    kind(**{name: value})


@pytest.mark.parametrize("what", WHOLES)
def test_counts_of_networks(what):
    make, names = WHOLES[what]
    for name in names:
        for value in NO_WHOLE:
            if isinstance(value, {"state_shape": (list, np.ndarray), "widths": np.ndarray}.get(name, ())):
                continue  # one number per row is a state; an array of whole numbers is widths, or a shape
            with pytest.raises(SkipError):
                make(**{name: value})


@pytest.mark.parametrize("what", FLAGS)
def test_flags_of_networks(what):
    make, names = FLAGS[what]
    for name in names:
        for value in NO_FLAG:
            with pytest.raises(SkipError, match=name):
                make(**{name: value})


def test_numpys_numbers_make_networks_that_are_saved_whole(tmp_path):
    one, two = np.int64(1), np.int64(2)
    made = {
        "unet": UNetPlusPlus(classes=two, in_channels=one, widths=[np.int32(4), np.int64(6), 8]),
        "plan": FloorPlanNet(classes=two, widths=np.array([4, 6]), hidden=np.int64(8), features=np.int64(8)),
        "skipnet": SkipNet({"blocks": [one, two], "widths": range(4, 9, 4)}, embed=np.int64(3)),
    }
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
        again = type(model).from_pretrained(tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)), name
    images = torch.rand(1, 1, 16, 16)
    unet = made["unet"].eval()
    assert torch.equal(unet(images, head=np.int64(1)), unet(images, head=1))
    assert torch.equal(unet.pruned(np.int64(1))(images), unet(images, head=1))
    sized = net(image_size=np.array([3, 8, 8]))
    assert sized.image_size == (3, 8, 8) and TuneConfig(cache_limit=2e9).cache_limit == 2_000_000_000
    solved = fixed_point(torch.cos, torch.zeros(1, 1), tol=np.float32(1e-5), budget=np.int64(40))
    assert solved.converged
