"""What goes together and what does not: every denoiser and pipeline of diffusers, every row of the table."""

import functools
import inspect
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from helpers.company_table import APART, text
from helpers.versions import newest_diffusers

from skipguide import SkipError, UnknownBlockError, find_blocks
from skipguide.families.described import FAMILIES
from skipguide.families.refused import UNSUPPORTED_MODELS
from skipguide.families.vision import VISION_FAMILIES
from skipguide.hosts.diffusers_caches import CACHES
from skipguide.pipelines import SpatiotemporalSkipGuidance
from skipguide.pipelines.registry.described import PIPELINES
from skipguide.pipelines.registry.refused import UNSUPPORTED_PIPELINES
from skipguide.pipelines.registry.support import document, support_table
from zoo import FAMILIES as ZOO
from zoo.all_pipes import MAKERS
from zoo.pipes import BY_PIPE

# Every denoiser and every pipeline that diffusers exports is described and proven, or refused with the reason.

ROOT = Path(__file__).resolve().parents[2]
DENOISERS = ("diffusers.models.transformers", "diffusers.models.unets")
DESCRIBED = {name for name in FAMILIES if name not in VISION_FAMILIES}
REASON = 12  # letters that a reason has at least


@functools.cache
def exported(kind, modules=("diffusers",)):
    """Names of the classes of a kind that diffusers exports."""
    found = set()
    with warnings.catch_warnings():  # what diffusers imports warns of itself
        warnings.simplefilter("ignore")
        for name in dir(diffusers):
            cls = getattr(diffusers, name)
            if inspect.isclass(cls) and issubclass(cls, kind) and cls.__module__.startswith(modules):
                found.add(name)
    return found


@newest_diffusers
@pytest.mark.parametrize(
    ("found", "described", "refused"),
    [
        pytest.param(lambda: exported(torch.nn.Module, DENOISERS), DESCRIBED, UNSUPPORTED_MODELS, id="models"),
        pytest.param(lambda: exported(diffusers.DiffusionPipeline), PIPELINES, UNSUPPORTED_PIPELINES, id="pipelines"),
    ],
)
def test_everything_in_diffusers_is_described_or_refused(found, described, refused):
    names = found()
    assert len(names) > 70
    assert not (both := set(described) & set(refused)), f"described and refused: {sorted(both)}"
    missing = names - set(described) - set(refused)
    assert not missing, (
        f"diffusers {diffusers.__version__} exports {sorted(missing)}, which are neither described nor listed with the "
        f"reason in families_unsupported.py or registry_unsupported.py"
    )
    gone = {name for name in set(described) | set(refused) if not hasattr(diffusers, name)}
    assert not gone, f"not in diffusers {diffusers.__version__} any more: {sorted(gone)}"
    assert all(len(reason) > REASON and reason == reason.strip(" .") for reason in refused.values())


@newest_diffusers
def test_every_described_model_is_proven():
    proven = {type(family.make()).__name__ for family in ZOO}
    assert proven == DESCRIBED
    assert len(proven) >= 25


@newest_diffusers
def test_every_described_pipeline_is_tested():
    assert {type(make()).__name__ for make in MAKERS} == set(PIPELINES)


def test_the_reason_is_what_the_user_sees():
    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    with pytest.raises(UnknownBlockError, match="UNet of convolutions"):
        find_blocks(model)
    pipe = diffusers.DDPMPipeline(model, diffusers.DDPMScheduler())
    with pytest.raises(SkipError, match=r"DDPMPipeline is not supported: .*UNet of convolutions"):
        SpatiotemporalSkipGuidance([1]).apply(pipe)
    with pytest.raises(SkipError, match=r"not described.*register_pipeline"):
        SpatiotemporalSkipGuidance([1]).apply(object())


@newest_diffusers
def test_the_tables_are_those_of_the_data():
    """`python -m demos.support_table` writes them, and they are in one place."""
    supported = (ROOT / "pipelines" / "SUPPORTED.md").read_text(encoding="utf-8")
    assert supported == document()
    assert support_table() in supported
    head = support_table().splitlines()[0]
    assert all(head not in (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "pipelines/README.md"))


# Every row of the "does not go together" table raises what it says, and pipelines/README.md says the same.

README = (Path(__file__).parents[2] / "pipelines" / "README.md").read_text(encoding="utf-8")


def make(name):
    return BY_PIPE[name].build()


def run(name, pipe):
    return BY_PIPE[name].run(pipe, num_inference_steps=2)


@pytest.mark.parametrize("row", APART, ids=lambda row: row.what)
def test_the_error_is_what_the_table_says(row):
    with pytest.raises(SkipError) as caught:
        row.provoke(make, run)
    assert row.error in str(caught.value)


def test_every_refused_cache_has_a_row():
    refused = [cache.refusal for cache in CACHES.values() if cache.refusal]
    assert all(any(row.error in refusal for row in APART) for refusal in refused)


def test_the_readme_has_the_list_and_the_table():
    """`python tests/helpers/company_table.py` prints them."""
    assert text() in README
