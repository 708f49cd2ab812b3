"""The laws, for every family and every part, against references that are built into copies of the model."""

import copy

import pytest
import torch

from skipguide import Prefix, Skipper, SkipPlan, capture, check, find_blocks, resume
from skipguide.arguments import Arguments
from zoo import FAMILIES, IMAGE_JOINT, JOINT, values
from zoo.pipes import BY_PIPE, PIPES, STEPS, understand_prompts
from zoo.video_joint import VIDEO_JOINT

# The laws, for every family and every part, against references that are built into copies of the model.

families = pytest.mark.parametrize("family", FAMILIES, ids=repr)


def skipped(family, model, inputs, *args, **kwargs):
    with Skipper(model, SkipPlan(*args, **kwargs)) as skipper:
        out = family.run(model, inputs)
    return out, skipper.stats


@families
def test_blocks_are_found_in_execution_order(family):
    model = family.build()
    blocks = find_blocks(model)
    assert [b.name for b in blocks] == family.block_names
    for i, block in enumerate(blocks):
        assert {"attn", "cross_attn", "mlp"} & set(block.parts) == set(family.parts(i))
        assert ("attn_identity" in block.parts) == bool(family.blocks[i][1].values)
        assert block.name in blocks.describe()


@families
def test_empty_plan_is_bit_equal(family):
    model, inputs = family.build(), family.inputs(2)
    out, stats = skipped(family, model, inputs)
    assert torch.equal(out, family.run(model, inputs))
    assert list(stats.calls) == family.block_names and stats.skipped_fraction == 0


@families
def test_block_skip_equals_the_block_taken_out(family):
    model, inputs = family.build(), family.inputs(2)
    plain = family.run(model, inputs)
    for i in family.layers:
        out, stats = skipped(family, model, inputs, [i])
        assert torch.equal(out, family.run(family.identity_block(model, i), inputs))
        assert not torch.equal(out, plain)
        assert family.block_names[i] not in stats.calls
        assert stats.skipped_fraction == pytest.approx(1 / len(family.block_names))


@families
def test_sublayer_skip_equals_zeroed_output_projection(family):
    model, inputs = family.build(), family.inputs(2)
    plain = family.run(model, inputs)
    for i in family.layers:
        for part in family.parts(i):
            out, stats = skipped(family, model, inputs, [i], part)
            assert torch.equal(out, family.run(family.zeroed(model, i, part), inputs)), (i, part)
            assert not torch.equal(out, plain), (i, part)
            assert 0 < stats.skipped_fraction < 1 / len(family.block_names)


@families
def test_attention_identity_equals_the_reference_by_hand(family):
    model, inputs = family.build(), family.inputs(2)
    plain = family.run(model, inputs)
    for i in family.layers:
        if not family.blocks[i][1].values:
            continue
        out, _ = skipped(family, model, inputs, [i], "attn_identity")
        reference = family.run(family.value_identity(model, i, inputs), inputs)
        torch.testing.assert_close(out, reference, atol=family.slack, rtol=1e-5)
        assert not torch.allclose(out, plain, atol=1e-5)


@families
@pytest.mark.parametrize("part", ["block", "attn", "mlp", "attn_identity"])
def test_rows_that_skip_and_rows_that_stay(family, part):
    """Row 1 of 3 skips: it is the skipped model's row, the others are the plain model's rows."""
    model, inputs = family.build(), family.inputs(3)
    plain = family.run(model, inputs)
    layers = [block.index for block in find_blocks(model) if part in block.parts]
    if not layers:
        pytest.skip(f"{family.name} has no {part}")
    layer = layers[len(layers) // 2]
    every, _ = skipped(family, model, inputs, [layer], part)
    some, _ = skipped(family, model, inputs, [layer], part, rows=[1])
    torch.testing.assert_close(some[[0, 2]], plain[[0, 2]], atol=family.slack, rtol=1e-5)
    torch.testing.assert_close(some[[1]], every[[1]], atol=family.slack, rtol=1e-5)
    full, _ = skipped(family, model, inputs, [layer], part, rows=[0, 1, -1])
    assert torch.equal(full, every)
    none, _ = skipped(family, model, inputs, [layer], part, rows=[])
    assert torch.equal(none, plain)


@families
def test_rows_that_skip_are_not_computed(family):
    model, inputs = family.build(), family.inputs(3)
    with Skipper(model, SkipPlan([1], rows=[0, 2])) as skipper:
        family.run(model, inputs)
    rows = skipper.stats.rows
    assert rows[family.block_names[1]] == 1 and rows[family.block_names[0]] == 3


@families
def test_resume_is_bit_equal_at_equal_batch(family):
    model, inputs = family.build(), family.inputs(2)
    plain = family.run(model, inputs)
    for layer in family.layers:
        prefix = Prefix(layer)
        with capture(model, prefix):
            assert torch.equal(family.run(model, inputs), plain)
        with resume(model, prefix) as skipper:
            assert torch.equal(family.run(model, inputs), plain)
        assert list(skipper.stats.calls) == family.block_names[layer:]


@families
def test_skipped_suffix_equals_skipped_full_pass(family):
    model, inputs = family.build(), family.inputs(2)
    layer, last = 1, len(family.block_names) - 1
    part = next(iter(family.parts(last)), None)
    plan = SkipPlan([layer]) | SkipPlan([last], part=part) if part else SkipPlan([layer])
    prefix = Prefix(layer)
    with capture(model, prefix):
        family.run(model, inputs)
    with Skipper(model, plan):
        full = family.run(model, inputs)
    with Skipper(model, plan, resume=prefix) as skipper:
        assert torch.equal(family.run(model, inputs), full)
    assert list(skipper.stats.calls) == family.block_names[layer + 1 :]


@families
def test_resume_for_some_rows_equals_to_rounding(family):
    model, both = family.build(), family.inputs(2)
    plain = family.run(model, both)
    prefix = Prefix(2)
    with capture(model, prefix):
        family.run(model, both)
    spec = find_blocks(model).spec
    _, second = Arguments(model).rows((), both, slice(1, 2), 2, spec.shared, spec.listed, spec.folded, 0, spec.layered)
    with resume(model, prefix.select(slice(1, 2), 2)):
        out = family.run(model, second)
    torch.testing.assert_close(out, plain[1:], atol=family.slack, rtol=1e-5)


@families
def test_check_passes_on_every_family(family):
    model = family.build()
    report = check(model)
    assert report.blocks == len(family.block_names) and "residue: none" in str(report)
    if not family.thin:
        check(model, family.inputs(2))


# The reference models: they build, every sublayer matters, the written-out attention is right.

BLOCKS = [
    pytest.param(family, i, id=f"{family.name}-{name}")
    for family in FAMILIES
    for i, name in enumerate(family.block_names)
    if i in family.layers
]


@pytest.fixture(scope="module")
def built():
    made = {}

    def get(family):
        if family.name not in made:
            made[family.name] = family.build()
        return made[family.name]

    return get


def effect(edited, plain):
    return ((edited - plain).norm() / plain.norm()).item()


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_builds_and_runs(family, built):
    model, inputs = built(family), family.inputs(3)
    out = family.run(model, inputs)
    assert torch.isfinite(out).all()
    assert out.shape[0] == 3
    assert torch.equal(out, family.run(family.build(), inputs)), "the same seed gives the same model"
    assert effect(out[0], out[1]) > 0.05, "rows differ"
    torch.testing.assert_close(out[:2], family.run(model, family.inputs(2)))
    assert not torch.equal(out, family.run(model, family.inputs(3, seed=9)))
    assert all(parameter.std() > 0 for parameter in model.parameters() if parameter.numel() > 1)


@pytest.mark.parametrize(("family", "i"), BLOCKS)
def test_every_edit_has_a_visible_effect(family, i, built):
    model, inputs = built(family), family.inputs(2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = family.run(model, inputs)
    edits = {part: family.zeroed(model, i, part) for part in family.parts(i)}
    edits["block"] = family.identity_block(model, i)
    if family.blocks[i][1].values:
        edits["attn_identity"] = family.value_identity(model, i, inputs)
    for name, edited in edits.items():
        assert family.visible < effect(family.run(edited, inputs), plain) < 1.5, name
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(family.run(model, inputs), plain)


@pytest.mark.parametrize(
    ("family", "i"), [block for block in BLOCKS if block.values[0] in JOINT + VIDEO_JOINT + IMAGE_JOINT]
)
def test_written_out_attention_without_the_edit_is_the_stock_one(family, i, built, monkeypatch):
    """The same code, video rows not overwritten, gives the stock model's output."""
    monkeypatch.setattr(
        values,
        "attend",
        lambda q, k, v, video, mask=None: torch.nn.functional.scaled_dot_product_attention(q, k, v, mask),
    )
    monkeypatch.setattr(values.SelfValues, "forward", lambda self, *args, **kw: self.attn(*args, **kw))
    model, inputs = built(family), family.inputs(3)
    stock = family.run(model, inputs)
    torch.testing.assert_close(family.run(family.value_identity(model, i, inputs), inputs), stock, atol=2e-6, rtol=0)


def test_identity_of_all_blocks_is_the_model_without_blocks(built):
    """PassThrough against the plainest reference there is: an empty block list."""
    family = next(family for family in FAMILIES if family.name == "ltx")
    model, inputs = built(family), family.inputs(2)
    edited = model
    for i in range(len(family.blocks)):
        edited = family.identity_block(edited, i)
    empty = copy.deepcopy(model)
    empty.transformer_blocks = torch.nn.ModuleList()
    assert torch.equal(family.run(edited, inputs), family.run(empty, inputs))


@pytest.fixture(scope="module")
def pipelines():
    made = {}

    def get(case):
        if case.name not in made:
            made[case.name] = case.build()
        return made[case.name]

    return get


def denoiser_rows(pipe, run):
    """The batch size of every call of a denoiser, by component name."""
    seen = []

    def note(name):
        return lambda module, args, kwargs: seen.append((name, len(kwargs["hidden_states"])))

    denoisers = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in denoisers.items()
        if module is not None
    ]
    out = run()
    for handle in handles:
        handle.remove()
    return out, seen


@pytest.mark.parametrize("case", PIPES, ids=str)
def test_pipeline_runs_deterministically_in_its_cfg_modes(case, pipelines):
    pipe = pipelines(case)
    outs = []
    for mode, cfg in zip(case.cfg_modes, (True, False), strict=False):
        for prompts in (1, 2):
            out, calls = denoiser_rows(pipe, lambda p=prompts, c=cfg: case.run(pipe, p, c))
            assert torch.isfinite(out).all()
            assert len(out) == prompts
            assert torch.equal(out, case.run(pipe, prompts, cfg))
            outs.append(out)
            expected = {"batched": [2 * prompts], "two_calls": [prompts] * 2, "single": [prompts]}[mode]
            assert [n for _, n in calls] == expected * STEPS
    if len(case.cfg_modes) == 2:
        assert effect(outs[2], outs[0]) > 0.02, "CFG matters"


def test_both_wan22_transformers_run(pipelines):
    case = BY_PIPE["wan22"]
    _, calls = denoiser_rows(pipelines(case), lambda: case.run(pipelines(case)))
    assert {name for name, _ in calls} == {"transformer", "transformer_2"}


def test_pipeline_options_reach_the_pipeline(pipelines):
    for name, option in (("ltx", {"guidance_rescale": 0.7}), ("wan", {"guidance_scale": 2.0})):
        case = BY_PIPE[name]
        assert effect(case.run(pipelines(case), **option), case.run(pipelines(case))) > 0.02


@pytest.mark.parametrize("name", ["ltx", "wan"])
def test_several_videos_per_prompt(name):
    case = BY_PIPE[name]
    pipe = case.build()
    understand_prompts(pipe)
    words = {"prompt": ["a tram", "rain"], "negative_prompt": ["", ""], "num_videos_per_prompt": 2}
    given = {key: None for key in case.call_kwargs() if "prompt" in key}
    assert len(case.run(pipe, **given, **words)) == 4
