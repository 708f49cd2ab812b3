"""Saved vision networks: they come back whole, without a second download, or with a reason why not."""

import doctest
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import resnet18

from skipguide.assets import bundled
from skipguide.errors import SkipError
from skipguide.vision import FloorPlanNet, SkipNet, UNetPlusPlus, skipnet
from skipguide.vision.skipnet import backbones

TINY = {"blocks": [1, 2], "widths": [4, 8], "num_classes": 3}


@pytest.mark.parametrize(
    "net",
    [lambda: UNetPlusPlus(widths=(4, 6)), lambda: FloorPlanNet(widths=(4, 6)), lambda: SkipNet(TINY)],
    ids=["UNetPlusPlus", "FloorPlanNet", "SkipNet"],
)
def test_weights_that_lack_a_part_are_not_loaded(net, tmp_path):
    net = net()
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path)
    assert again.training is False
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in net.state_dict().items())
    state = load_file(tmp_path / "model.safetensors")
    lost = sorted(state)[-1]
    del state[lost]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(SkipError, match=f"(?s)not those of a {type(net).__name__}.*{lost}"):
        type(net).from_pretrained(tmp_path)


def test_a_folder_is_read_without_a_word(capsys):
    assert not UNetPlusPlus.from_pretrained(bundled("tiny-unetpp")).training
    assert capsys.readouterr() == ("", "")


def test_the_name_of_a_bundled_model_says_where_it_is():
    with pytest.raises(SkipError, match=r"UNetPlusPlus\.from_pretrained\(bundled\('tiny-unetpp'\)\)"):
        UNetPlusPlus.from_pretrained("tiny-unetpp")
    with pytest.raises(SkipError, match="no bundled model 'tiny-unet'; there are"):
        UNetPlusPlus.from_pretrained("tiny-unet")


def test_settings_that_ask_for_heads_that_were_not_trained(tmp_path):
    UNetPlusPlus(widths=(4, 6, 8), deep_supervision=False).save_pretrained(tmp_path)
    with pytest.raises(SkipError, match=r"head\.1\.weight"):
        UNetPlusPlus.from_pretrained(tmp_path, deep_supervision=True)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_pretrained_backbone_is_not_fetched_again(library, tmp_path, monkeypatch):
    net = SkipNet(f"{library}/resnet18", num_classes=3).eval()
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # as if it had been skipnet("resnet18", pretrained=library)
    (tmp_path / "config.json").write_text(json.dumps(config | {"backbone": "resnet18", "pretrained": library}))

    def refuse(source, name, classes, weights):
        assert not weights, "the library's weights were asked for"
        return build(source, name, classes, weights)

    build = backbones._from_library
    monkeypatch.setattr(backbones, "_from_library", refuse)
    again = SkipNet.from_pretrained(tmp_path)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(again(images), net(images))


def test_the_ambiguous_name_stays_what_its_weights_said():
    assert backbones.unweighted("resnet152", True) == "torchvision/resnet152"
    assert backbones.unweighted("imagenet_resnet152", "timm:a1_in1k") == "timm/resnet152"
    for name in ("resnet152", "timm/resnet26d", "cifar_resnet152"):
        assert backbones.unweighted(name, None) == name
    assert not doctest.testmod(backbones).failed


def test_a_network_given_as_a_module_comes_back_with_one(tmp_path):
    net = SkipNet(resnet18(num_classes=3)).eval()
    net.save_pretrained(tmp_path)
    with pytest.raises(SkipError, match="backbone=module"):
        SkipNet.from_pretrained(tmp_path)
    again = SkipNet.from_pretrained(tmp_path, backbone=resnet18(num_classes=3))
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(again(images), net(images))
    with pytest.raises(SkipError, match="not those of a SkipNet"):
        SkipNet.from_pretrained(tmp_path, backbone=skipnet("resnet38").backbone)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"encoder": "nosuch"}, "no usable features for 'nosuch'"),
        ({"encoder": "timm/resnet10t"}, "no usable features for 'timm/resnet10t'"),
        ({"encoder": "local-dir:/not/there"}, "no usable features for 'local-dir:/not/there'"),
        ({"encoder": "hf-hub:not/there"}, "no usable features for 'hf-hub:not/there'"),
        ({"encoder": 5}, "expected encoder as None or the name"),
        ({"encoder": None}, "not those of a"),
        ({"encoder_args": {"pretrained": True}}, "encoder_args has pretrained, which the encoder sets itself"),
        ({"encoder_args": {"in_chans": 1}}, "encoder_args has in_chans"),
        ({"encoder_args": {"checkpoint_path": "/not/there"}}, "no usable features"),
        ({"encoder_args": ["a"]}, "expected encoder_args as a mapping"),
        ({"encoder_args": {"nosuch": 1}}, "no usable features .* 'nosuch'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("net", [UNetPlusPlus, FloorPlanNet])
def test_an_encoder_that_is_not_there(net, change, says, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    net("resnet10t", depth=1, widths=(4, 6)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SkipError, match=f"(?s){says}"):
        net.from_pretrained(tmp_path)
