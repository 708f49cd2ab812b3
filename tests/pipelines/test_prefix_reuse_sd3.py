"""PrefixReuse on Stable Diffusion 3: the pass without skip_guidance_layers, in its window of the steps."""

from types import SimpleNamespace

import pytest
import torch
from helpers.native_calls import compared, near

from skipguide.pipelines import PrefixReuse
from zoo.family import randomise
from zoo.joint import sd3, sd3_inputs
from zoo.pipes import BY_PIPE

BLOCKS = 4
WINDOW = {"num_inference_steps": 5, "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.7}
IN_WINDOW = 3  # steps 1, 2 and 3 of 5: the pipeline leaves out the first step, as both ends are exclusive


@pytest.mark.parametrize("name", ["sd3", "sd35"])
@pytest.mark.parametrize("clips", [1, 2])
@pytest.mark.parametrize("layers", [[1], [2], [1, 2], [2, 1]], ids=str)
def test_the_third_pass_starts_behind_the_layers_it_skips(name, clips, layers):
    case = BY_PIPE[name]
    pipe = case.build()
    plain, out, stats = compared(case, pipe, num_prompts=clips, skip_guidance_layers=layers, **WINDOW)
    near(out, plain)
    assert not torch.allclose(case.run(pipe, num_prompts=clips, **WINDOW), plain, atol=1e-3)
    assert stats.passes == 5 + IN_WINDOW
    assert stats.blocks_plain == clips * (5 * 2 * BLOCKS + IN_WINDOW * (BLOCKS - len(layers)))
    assert stats.blocks_plain - stats.blocks_run == clips * IN_WINDOW * min(layers)
    assert stats.reused == {"skipped layers": IN_WINDOW} and not stats.not_reused


@pytest.mark.parametrize(
    ("layers", "why"),
    [([0, 2], "it differs from the first block on"), ([2, 3], "no block runs behind those that are left out")],
)
def test_what_cannot_be_taken_up_runs_whole(layers, why):
    case = BY_PIPE["sd3"]
    plain, out, stats = compared(case, case.build(), skip_guidance_layers=layers, **WINDOW)
    assert torch.equal(out, plain)
    assert stats.not_reused == {f"skipped layers whole: {why}": IN_WINDOW} and not stats.reused
    assert stats.blocks_run == stats.blocks_plain == 5 * 2 * BLOCKS + IN_WINDOW * (BLOCKS - 2)


def test_layers_that_the_model_does_not_have_are_left_to_the_pipeline():
    case = BY_PIPE["sd3"]
    plain, out, stats = compared(case, case.build(), skip_guidance_layers=[7, 8, 9], **WINDOW)
    assert torch.equal(out, plain)
    assert stats.blocks_run == stats.blocks_plain == (5 * 2 + IN_WINDOW) * BLOCKS


def test_outside_the_window_nothing_is_kept():
    case = BY_PIPE["sd3"]
    pipe = case.build()
    kept = []

    def look(pipe, step, timestep, given):
        kept.append(sum(len(state.calls) for state in applied._parts[0]._threads.values()))
        return {}

    with PrefixReuse().apply(pipe) as applied:
        case.run(pipe, skip_guidance_layers=[1], callback_on_step_end=look, **WINDOW)
    assert kept == [0] * 5


@torch.no_grad()
def test_residuals_of_a_controlnet_lie_between_the_blocks():
    model = randomise(sd3(), 1)
    inputs = {**sd3_inputs(2), "return_dict": False}
    inputs["block_controlnet_hidden_states"] = [torch.randn(2, 16, 32) for _ in range(2)]
    with PrefixReuse().apply(SimpleNamespace(transformer=model)) as applied:
        for _ in range(2):
            model(**inputs)
            out = model(**inputs, skip_layers=[1])[0]
    assert torch.equal(out, model(**inputs, skip_layers=[1])[0])
    assert set(applied.stats.not_reused) == {
        "skipped layers whole: a ControlNet adds to the stream between the blocks that are left out"
    }
