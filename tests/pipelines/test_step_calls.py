"""What a guided step costs in Python, counted: the calls into our files, which are the same on every machine."""

import diffusers
import torch
from helpers.call_counter import CallCounter

from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE

BLOCKS, LAYER, STEPS, WARM = 28, 19, 4, 1
MOST = 700


def long_ltx():
    """LTXPipeline with as many blocks as the released model has."""
    pipe = BY_PIPE["ltx"].build()
    config = dict(pipe.transformer.config) | {"num_layers": BLOCKS}
    torch.manual_seed(0)
    model = diffusers.LTXVideoTransformer3DModel.from_config(config).eval()
    for parameter in model.parameters():  # the tables that modulate a block start at nearly nothing
        torch.nn.init.normal_(parameter, std=0.1)
    pipe.transformer = model
    return pipe


def test_a_guided_step_takes_few_calls():
    case, pipe, counts = BY_PIPE["ltx"], long_ltx(), []
    with Stg([LAYER]).apply(pipe), CallCounter() as counter:

        def after(*_):
            counts.append(counter.calls.copy())
            return {}

        case.run(pipe, num_inference_steps=STEPS, callback_on_step_end=after)
    steps = [later - earlier for earlier, later in zip(counts[WARM:], counts[WARM + 1 :], strict=False)]
    assert all(step == steps[0] for step in steps), "every step makes the same calls"
    assert steps[0].total() <= MOST, "\n".join(f"{number:5} {place}" for place, number in steps[0].most_common())
