"""A name that is not there: the error says what it looks like, or where to look."""

import subprocess
import sys

import pytest

import skipguide
import skipguide.llm
import skipguide.pipelines
import skipguide.vision


@pytest.mark.parametrize(
    ("package", "wrong", "meant"),
    [
        (skipguide, "SkipPlans", "did you mean SkipPlan"),
        (skipguide, "SpatiotemporalSkipGuidance", "skipguide.pipelines (guidance in diffusers pipelines)"),
        (skipguide.pipelines, "SpatioTemporalSkipGuidance", "did you mean SpatiotemporalSkipGuidance"),
        (skipguide.vision, "UnetPlusPlus", "did you mean UNetPlusPlus"),
        (skipguide.llm, "Adaskip", "did you mean AdaSkip"),
    ],
)
def test_a_wrong_name_is_answered_with_the_one_that_is_like_it(package, wrong, meant):
    with pytest.raises(AttributeError) as error:
        getattr(package, wrong)
    assert meant in str(error.value) and wrong in str(error.value)
    assert not hasattr(package, wrong)


def test_a_package_that_is_not_imported_says_how_to():
    code = "import skipguide\ntry:\n    skipguide.vision\nexcept AttributeError as error:\n    print(error)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "write `import skipguide.vision`" in said
