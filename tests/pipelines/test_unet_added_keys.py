"""Skip guidance on Kandinsky 2 and DeepFloyd IF, whose predictions have variances, against a reference by hand."""

import pytest
from helpers.residue import no_gates
from helpers.unet_reference import BY_CASE, check, each

from skipguide import SkipError, applied_to, remove_from
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines import calibrate
from zoo.pipes_unet_added_keys import ADDED_KEYS_PIPES

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.filterwarnings("ignore:`callback"),  # how combined pipelines call their decoders
]


@each(ADDED_KEYS_PIPES, ("kandinsky21", "kandinsky22", "kandinsky22_combined", "if", "if_super"))
def test_guided_pipeline_equals_the_reference(case):
    check(case)


def test_a_pipeline_of_a_prior_and_a_decoder_is_guided_at_the_decoder():
    """The handle is found at both of them."""
    pipe = BY_CASE["kandinsky22_combined"].build()
    applied = Stg([1]).apply(pipe)
    assert applied_to(pipe) == applied_to(pipe.decoder_pipe) == [applied]
    with pytest.raises(SkipError, match="already applied"):
        Stg([1]).apply(pipe.decoder_pipe)
    assert Stg([1]).cost(pipe) == Stg([1]).cost(pipe.decoder_pipe)
    remove_from(pipe)
    no_gates(pipe.unet)
    with pytest.raises(SkipError, match=r"calibrate pipe\.decoder_pipe"):
        calibrate(pipe, "a tram")
