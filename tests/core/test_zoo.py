"""The reference models: they build, every sublayer matters, the written-out attention is right."""

import copy

import pytest
import torch

from zoo import FAMILIES, IMAGE_JOINT, JOINT, values
from zoo.pipes import BY_PIPE, PIPES, STEPS, understand_prompts
from zoo.video_joint import VIDEO_JOINT

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
