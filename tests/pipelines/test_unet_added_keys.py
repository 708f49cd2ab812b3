"""Skip guidance on Kandinsky 2 and DeepFloyd IF, whose predictions have variances, against a reference by hand."""

import diffusers
import pytest
import torch
from helpers.unet_reference import BY_CASE, check

from skipguide import SkipError
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.family import rows
from zoo.pipes import size
from zoo.pipes_unet_added_keys import ADDED_KEYS_PIPES
from zoo.unet_picture import IMAGE

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("case", ADDED_KEYS_PIPES, ids=repr)
def test_guided_pipeline_equals_the_reference(case):
    check(case)


@pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated")  # how the combined pipeline calls its decoder
def test_a_pipeline_of_a_prior_and_a_decoder_is_guided_at_the_decoder():
    """As the error says that is raised for the pipeline itself."""
    parts = BY_CASE["kandinsky22"].build().components
    names = ("prior", "image_encoder", "text_encoder", "tokenizer", "scheduler", "image_processor")
    pipe = diffusers.KandinskyV22CombinedPipeline(**parts, **{f"prior_{name}": None for name in names})
    pipe.decoder_pipe.set_progress_bar_config(disable=True)
    pipe.prior_pipe = lambda **_: (rows(1, 1, IMAGE), rows(1, 2, IMAGE))

    def run():
        return pipe(
            "a tram", **size(64), num_inference_steps=3, output_type="latent", return_dict=False,
            generator=torch.Generator().manual_seed(1),
        )[0]  # fmt: skip

    plain = run()
    with pytest.raises(SkipError, match=r"guide its decoder, pipe\.decoder_pipe"):
        Stg([1]).apply(pipe)
    with Stg([1]).apply(pipe.decoder_pipe) as applied:
        out = run()
    assert applied.stats.passes == 6 and not torch.allclose(out, plain, atol=1e-3)
    assert torch.equal(run(), plain)
