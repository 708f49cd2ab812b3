"""Perturbations against references by hand: what still runs, weakened, on joint, single-stream and cross-attention."""

import pytest
import torch
from helpers.perturbation_table import PERTURBATIONS

from skipguide import Prefix, SkipError, Skipper, SkipPlan, capture
from skipguide.parts import PART_SPECS, PARTS
from skipguide.perturbations.attention_maps import Windows, blur_matrix
from skipguide.perturbations.tokens import swap_order
from zoo import BY_NAME, perturbed
from zoo.perturbed import GRIDS, LAYERS

PLACES = [(name, layer) for name, layers in LAYERS.items() for layer in layers]
rows_of_the_table = pytest.mark.parametrize("row", PERTURBATIONS.values(), ids=PERTURBATIONS)
NEW = [part for part in PARTS if PART_SPECS[part].runs]


@pytest.fixture(scope="module")
def built():
    made = {}

    def get(name):
        if name not in made:
            made[name] = BY_NAME[name].build()
        return made[name]

    return get


def under(family, model, inputs, plan, **how):
    with Skipper(model, plan, **how) as skipper:
        out = family.run(model, inputs)
    return out, skipper.stats


def close(out, reference):
    torch.testing.assert_close(out, reference, atol=5e-6 * max(1.0, reference.abs().max().item()), rtol=0)


@pytest.mark.parametrize(("name", "layer"), PLACES)
def test_written_out_attention_is_the_stock_one(name, layer, built):
    """The references are edits of this: without the edit it is the model."""
    family, model, inputs = BY_NAME[name], built(name), BY_NAME[name].inputs(2)
    reference = perturbed.written_out(family, model, layer, inputs, perturbed.plain)
    close(family.run(reference, inputs), family.run(model, inputs))


@rows_of_the_table
@pytest.mark.parametrize(("name", "layer"), PLACES)
def test_a_perturbation_equals_the_reference_by_hand(name, layer, row, built):
    if not row.fits(name):
        pytest.skip("a picture has one frame")
    family, model, inputs = BY_NAME[name], built(name), BY_NAME[name].inputs(2)
    plain = family.run(model, inputs)
    out, stats = under(family, model, inputs, SkipPlan([layer], row.part, **row.told))
    close(out, family.run(row.by_hand(family, model, layer), inputs))
    assert not torch.allclose(out, plain, atol=1e-4)
    assert stats.skipped_fraction == 0 and set(family.block_names) <= set(stats.calls)
    assert torch.equal(under(family, model, inputs, SkipPlan([layer], row.part, **row.told))[0], out)
    assert torch.equal(family.run(model, inputs), plain)


@rows_of_the_table
@pytest.mark.parametrize("name", ["ltx", "cogvideox", "hunyuan", "flux"])
def test_only_what_follows_runs_again_and_rows_are_apart(name, row, built):
    """From the block on, with the same bits; of three rows one is perturbed."""
    if not row.fits(name):
        pytest.skip("a picture has one frame")
    family, model, inputs = BY_NAME[name], built(name), BY_NAME[name].inputs(3)
    layer = LAYERS[name][-1]
    plan, prefix = SkipPlan([layer], row.part, **row.told), Prefix(layer)
    with capture(model, prefix):
        plain = family.run(model, inputs)
    every, _ = under(family, model, inputs, plan)
    suffix, stats = under(family, model, inputs, plan, resume=prefix)
    assert torch.equal(suffix, every)
    assert [each for each in family.block_names if each in stats.calls] == family.block_names[layer:]
    some, _ = under(family, model, inputs, SkipPlan([layer], row.part, rows=[1], **row.told))
    close(some[[0, 2]], plain[[0, 2]])
    close(some[[1]], every[[1]])


@pytest.mark.parametrize("part", NEW)
def test_text_is_untouched(part, built):
    """In joint attention what the text gets is what it gets without the plan; nothing moves its tokens."""
    family, model, inputs = BY_NAME["hunyuan"], built("hunyuan"), BY_NAME["hunyuan"].inputs(1)
    seen = []
    attention = model.transformer_blocks[1].attn
    handle = attention.register_forward_hook(lambda module, args, kwargs, out: seen.append(out), with_kwargs=True)
    family.run(model, inputs)
    under(family, model, inputs, SkipPlan([1], part))
    handle.remove()
    (video, text), (changed, same) = seen
    assert not torch.allclose(video, changed, atol=1e-4)
    if PART_SPECS[part].sublayers:  # attention to tokens that moved is another one
        assert torch.equal(text, same)


def test_windows_in_all_layers_are_the_model_on_crops(built):
    """What SWG does, where every layer has the windows: each crop alone, with the places that its tokens have."""
    family, model, inputs = BY_NAME["ltx"], built("ltx"), BY_NAME["ltx"].inputs(2)
    places = torch.stack(torch.meshgrid(*map(torch.arange, (2, 3, 3)), indexing="ij")).flatten(1)
    inputs = {**inputs, "video_coords": places[None].expand(2, -1, -1).float()}
    out, _ = under(family, model, inputs, SkipPlan(range(4), "window_time", part_options={"window": 1}))
    for frame in (slice(0, 9), slice(9, 18)):
        crop = {name: inputs[name][:, frame] for name in ("hidden_states",)}
        crop = {**inputs, **crop, "video_coords": inputs["video_coords"][:, :, frame], "num_frames": 1}
        close(out[:, frame], family.run(model, crop))


def test_a_shuffle_of_all_rows_is_one_and_keeps_norms():
    """The order is the seed's and the block's alone, and the global generators are left as they are."""
    family = BY_NAME["wan"]
    model, inputs = family.build(), family.inputs(3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, _ = under(family, model, inputs, SkipPlan([2], "token_shuffle"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(under(family, model, inputs, SkipPlan([2], "token_shuffle"))[0], first)
    other, _ = under(family, model, inputs, SkipPlan([2], "token_shuffle", part_options={"seed": 1}))
    assert not torch.allclose(other, first, atol=1e-4)
    one, _ = under(family, model, family.inputs(1), SkipPlan([2], "token_shuffle"))
    close(first[:1], one)


def test_two_perturbations_of_one_block_follow_each_other(built):
    """First the tokens of the first term move, then those of the second; the union runs in one pass."""
    family, model, inputs = BY_NAME["wan"], built("wan"), BY_NAME["wan"].inputs(2)
    plan = SkipPlan([2], "token_shuffle") | SkipPlan([2], "self_swap")
    order = perturbed.shuffle(0, 2)
    reference = perturbed.moved(family, model, 2, lambda x: perturbed.swap_both(order(x)))
    close(under(family, model, inputs, plan)[0], family.run(reference, inputs))


def test_heads_by_layer(built):
    """HeadHunter's pairs of layer and head, in one plan or as a union of plans."""
    family, model, inputs = BY_NAME["wan"], built("wan"), BY_NAME["wan"].inputs(2)
    plan = SkipPlan([1, 2], "attn_identity", heads={1: [0], 2: [1]})
    union = SkipPlan([1], "attn_identity", heads=[0]) | SkipPlan([2], "attn_identity", heads=1)
    assert torch.equal(under(family, model, inputs, plan)[0], under(family, model, inputs, union)[0])
    every, _ = under(family, model, inputs, SkipPlan([1, 2], "attn_identity", heads=[0, 1]))
    close(every, under(family, model, inputs, SkipPlan([1, 2], "attn_identity"))[0])
    with pytest.raises(SkipError, match="2 heads, 0 to 1"):
        Skipper(model, SkipPlan([1], "attn_identity", heads=[2]))


def test_plans_with_options_go_to_json_and_back():
    plan = SkipPlan([3, 4], "attn_blur", heads={3: [0, 2], 4: [1]}, strength=0.5, part_options={"sigma": 2})
    union = plan | SkipPlan([1], "window_space", part_options={"window": [2, 3]}) | SkipPlan([7])
    assert SkipPlan.from_dict(union.to_dict()) == union
    assert set(SkipPlan([7]).to_dict()["terms"][0]) == {"layers", "part", "stack", "rows", "start", "stop"}
    infinite = SkipPlan([1], "attn_blur", part_options={"sigma": float("inf")})
    assert infinite == SkipPlan([1], "attn_blur") and infinite.to_dict()["terms"][0].get("part_options") is None


BAD = {
    "strength must lie": {"strength": 1.5},
    "not about heads": {"heads": [0]},
    "heads are numbers": {"part": "attn_identity", "heads": []},
    "an entry for each of the layers": {"part": "attn_identity", "heads": {1: [0]}},
    "has no option sigma": {"part_options": {"sigma": 2.0}},
    "above 0": {"part": "attn_blur", "part_options": {"sigma": 0}},
    "unknown over": {"part": "self_swap", "part_options": {"over": "time"}},
    "1 at most": {"part": "self_swap", "part_options": {"ratio": 1.5}},
    "a height and a width": {"part": "window_space", "part_options": {"window": [1, 2, 3]}},
    "unknown part": {"part": "attn_sharpen"},
    "a mapping of names": {"part_options": [1]},
}


@pytest.mark.parametrize("words", BAD)
def test_what_cannot_be_meant_is_refused(words):
    with pytest.raises(SkipError, match=words):
        SkipPlan([0], **BAD[words])


REFUSED = [
    ("latte", 0, "window_time", "of one frame"),
    ("latte", 1, "window_space", "of one place"),
    ("sana_video", 0, "attn_blur", "linear"),
    ("chroma", 3, "token_shuffle", "one sequence"),
    ("chroma", 3, "attn_blur", "one sequence"),
    ("framepack", 0, "self_swap", "not described where"),
    ("flux", 0, "window_time", "one frame"),
    ("kandinsky5", 0, "token_shuffle", "the text"),
]


@pytest.mark.parametrize(("name", "layer", "part", "why"), REFUSED)
def test_a_family_that_cannot_says_why(name, layer, part, why, built):
    with pytest.raises(SkipError, match=f"no part '{part}'.*{why}"):
        Skipper(built(name), SkipPlan([layer], part))


def test_further_tokens_and_useless_windows_are_refused(built):
    family, model, inputs = BY_NAME["ltx"], built("ltx"), BY_NAME["ltx"].inputs(1)
    further = {**inputs, "num_frames": 1, "video_coords": torch.zeros(1, 3, 18)}
    with pytest.raises(SkipError, match=r"expected 1 x 3 x 3 tokens .* got 18"):
        under(family, model, further, SkipPlan([1], "attn_blur"))
    with pytest.raises(SkipError, match="nothing is restricted"):
        under(family, model, inputs, SkipPlan([1], "window_space", part_options={"window": 3}))


# -- the maths ---------------------------------------------------------------------------------------------------------


def test_blur_matrix_by_hand():
    """Sigma 0.5 reaches two places to each side, three on a line of three: as far as it can be reflected."""
    e = torch.exp(torch.tensor([-2.0, 0.0, -2.0], dtype=torch.float64))
    a, b, _ = e / e.sum()
    expected = torch.stack([torch.stack([b, 2 * a, 0 * a]), torch.stack([a, b, a]), torch.stack([0 * a, 2 * a, b])])
    torch.testing.assert_close(blur_matrix(3, 0.5), expected)
    for length in (2, 4, 7):
        torch.testing.assert_close(blur_matrix(length, 50.0).sum(1), torch.ones(length, dtype=torch.float64))


def test_windows_cover_the_grid_evenly():
    """As the published crops: 20 of 32, at 0 and 12."""
    found = [int(window[0]) for window in Windows(False, None, "window_space").places((1, 32, 32))]
    assert found == [0, 12, 12 * 32, 12 * 32 + 12]
    whole = Windows(True, 2, "window_time").places((5, 1, 1))
    assert [window.tolist() for window in whole] == [[0, 1], [1, 2], [3, 4]]


def test_swaps_are_of_two(monkeypatch):
    things = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    order = swap_order(things, 0.5)
    assert torch.equal(order[order], torch.arange(40)) and 0 < int((order != torch.arange(40)).sum()) <= 40
    monkeypatch.setattr("skipguide.perturbations.tokens.AT_ONCE", 100)  # a few rows at a time
    assert torch.equal(swap_order(things, 0.5), order)
    assert GRIDS.keys() == LAYERS.keys()
