"""Skip Tuning: a tower resumed in its middle is the whole tower, gradients as well."""

import copy

import pytest
import torch
from helpers.tuning import CONTEXT, MODELS, clip, images, siglip, words

from skipguide.vision.skip_tuning.towers import find_towers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_resumed_pass_is_the_whole_pass(name, layer):
    model = MODELS[name]()
    towers = find_towers(model)
    pixels, tokens = torch.stack(images(3)), words(["a b", "a much longer text here", "c"])
    short, where = towers.text.crop(tokens)
    assert short.shape[1] == (CONTEXT if name == "siglip" else 7)
    with torch.no_grad():
        image = towers.image.suffix(towers.image.prefix(pixels, layer), torch.zeros(3, dtype=torch.long), layer)
        text = towers.text.suffix(towers.text.prefix(short, layer), where, layer)
        torch.testing.assert_close(image, towers.image.full(pixels), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(text, towers.text.full(tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_whole_model(name):
    model = MODELS[name]()
    whole = find_towers(copy.deepcopy(model))
    pixels, tokens = torch.stack(images(3)), words(["a b", "a much longer text", "c"])
    (whole.image.full(pixels).square().sum() + whole.text.full(tokens).sin().sum()).backward()
    wanted = {n: p.grad for n, p in whole.model.named_parameters()}
    towers = find_towers(model)
    short, where = towers.text.crop(tokens)
    with torch.no_grad():
        hidden, texts = towers.image.prefix(pixels, 1), towers.text.prefix(short, 1)
    first = torch.zeros(3, dtype=torch.long)
    (towers.image.suffix(hidden, first, 1).square().sum() + towers.text.suffix(texts, where, 1).sin().sum()).backward()
    names = towers.trained(1, 1)
    assert names
    for n, p in model.named_parameters():
        if n in names:
            torch.testing.assert_close(p.grad, wanted[n], rtol=1e-4, atol=1e-5)
        else:
            assert p.grad is None, n


def test_the_last_block_asks_one_query():
    model = clip()
    seen = []
    last = model.text_model.encoder.layers[-1]
    handles = [
        m.register_forward_hook(lambda m, a, out: seen.append(out.shape)) for m in (last.self_attn.q_proj, last.mlp)
    ]
    towers = find_towers(model)
    tokens, where = towers.text.crop(words(["a b", "c"]))
    towers.text.suffix(towers.text.prefix(tokens, 1), where, 1)
    for handle in handles:
        handle.remove()
    assert seen == [(2, 16), (2, 16)]


def test_old_end_of_text_ids_pool_at_the_largest():
    model = clip()
    model.text_model.eos_token_id = model.text_model.config.eos_token_id = 2
    towers = find_towers(model)
    tokens = words(["a b", "c d e"])
    short, where = towers.text.crop(tokens)
    found = towers.text.suffix(towers.text.prefix(short, 1), where, 1)
    torch.testing.assert_close(found, towers.text.full(tokens), rtol=1e-5, atol=1e-6)


def test_scale_and_bias_are_scalars_that_work_on_any_device():
    towers = find_towers(siglip())
    assert towers.scale().shape == towers.bias().shape == ()
