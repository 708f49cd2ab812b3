"""SkipGuider in modular LTX-2: one guider in the places of the video's and the sound's, as diffusers' two do it."""

import diffusers
import pytest
import torch
from helpers.residue import no_gates, traces
from helpers.stg_reference import close

from skipguide import SkipError, Timetable
from skipguide.pipelines import SkipGuider
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo import modular
from zoo.pipes import STEPS
from zoo.pipes_video import BY_VIDEO

pytestmark = pytest.mark.numerics
BLOCKS, LAYER = 3, 2  # of the zoo's LTX-2
SCALES = {"video": 0.7, "audio": 0.4}
OFF = {"stg_scale": 0.0, "audio_stg_scale": 0.0}


def native_pair(**changed):
    """diffusers' two guiders; the blocks are read off the video's."""
    video = {"guidance_scale": 3.0, "stg_scale": 0.7, "modality_scale": 2.0, "guidance_rescale": 0.7}
    audio = {"guidance_scale": 7.0, "stg_scale": 0.4, "modality_scale": 1.5, "guidance_rescale": 0.3}
    video, audio = ({**own, **{k: v for k, v in changed.items() if k in own}} for own in (video, audio))
    return {
        "guider": diffusers.LTX2Guidance(**video, spatio_temporal_guidance_blocks=[LAYER]),
        "audio_guider": diffusers.LTX2Guidance(**audio),
    }


OURS = {
    "guidance_scale": {"video": 3.0, "audio": 7.0},
    "modality_scale": {"video": 2.0, "audio": 1.5},
    "guidance_rescale": {"video": 0.7, "audio": 0.3},
}


def ours(**changed):
    return SkipGuider(**{"layers": [LAYER], "scale": SCALES, "part": "attn_identity"} | OURS | changed)


@pytest.mark.parametrize("clips", [1, 2])
def test_one_guider_takes_the_place_of_both(clips):
    pipe = modular.build_ltx2(**native_pair())
    expected = modular.run_ltx2(pipe, clips)
    guider = ours().attach(pipe)
    assert pipe.guider is guider and pipe.audio_guider is guider
    before = traces(pipe.transformer)
    close(modular.run_ltx2(pipe, clips), expected)
    assert traces(pipe.transformer) == before
    assert guider.stats.passes == 4 * STEPS
    assert guider.stats.blocks_run == STEPS * (3 * BLOCKS + BLOCKS - LAYER)


@pytest.mark.parametrize(
    ("native", "changed"),
    [
        ({"modality_scale": 1.0}, {"modality_scale": 1.0}),
        ({"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
        ({"guidance_rescale": 0.0}, {"guidance_rescale": 0.0}),
        ({"stg_scale": 0.0}, {"scale": 0.0}),
        ({"stg_scale": 0.5}, {"scale": 0.5}),
        ({"guidance_rescale": 0.0, "modality_scale": 1.0}, {"guidance_rescale": 0.0, "modality_scale": 1.0}),
    ],
    ids=str,
)
def test_each_of_its_terms_alone(native, changed):
    pipe = modular.build_ltx2(**native_pair(**native))
    expected = modular.run_ltx2(pipe)
    ours(**changed).attach(pipe)
    close(modular.run_ltx2(pipe), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"rescale": 0.5},
        {"apg": 0.2, "apg_norm": 0.5},
        {"zero_star": True},
        {"formula": "wan"},
        {"formula": "uncond", "scale": 1.0},
        {"cfg_interval": (0.0, 0.5)},
        {"layers": "stochastic", "drop": 0.3, "seed": 2},
        {"scale": {"video": Timetable([(0.0, 0.0), (0.5, 1.0)]), "audio": 0.4}},
        {"rescale": Timetable([(0.0, 0.0), (0.5, 0.7)])},
    ],
    ids=str,
)
def test_the_guider_does_what_apply_does(settings):
    """`apply` on the classic pipeline, with its own modality pass; `SkipGuider` on the modular one."""
    own_cfg = {"guidance_scale": {"video": 3.0, "audio": 5.0}, "guidance_rescale": 0.0}
    modular_pipe = modular.build_ltx2()
    guider = ours(**own_cfg | settings).attach(modular_pipe)
    out = modular.run_ltx2(modular_pipe, 2, noise=11)
    pipe = BY_VIDEO["ltx2_own"].build()
    with Stg(**{"layers": [LAYER], "scale": SCALES, "part": "attn_identity"} | settings).apply(pipe) as applied:
        expected = by_classic(pipe, **OFF)
    close(out, expected)
    assert guider.stats.blocks_run == applied.stats.blocks_run + STEPS * BLOCKS  # the pipeline's own modality pass


def test_every_second_step_keeps_a_difference_for_each():
    """`apply` keeps differences of velocities, the guider those of denoised samples, which is what it is given."""
    pipe = modular.build_ltx2()
    guider = ours(every=2).attach(pipe)
    assert torch.isfinite(modular.run_ltx2(pipe)).all()
    fresh = (STEPS + 1) // 2
    assert guider.stats.passes == 3 * STEPS + fresh
    assert guider.stats.renewals == 2 * (fresh - 1)


def by_classic(pipe, **call):
    """What the classic pipeline makes of the same noise, packed as the modular one leaves it."""
    case = BY_VIDEO["ltx2_own"]
    video, audio = pipe(**{**case.call_of(True), **call})
    return torch.cat([pipe._pack_latents(video).flatten(1), audio.transpose(1, 2).flatten(1)], dim=1)


def test_both_pipelines_start_alike():
    """So that what is compared above is the guidance."""
    guider = ours(scale=0.0, guidance_rescale=0.0, guidance_scale={"video": 3.0, "audio": 5.0})
    modular_pipe = modular.build_ltx2()
    guider.attach(modular_pipe)
    close(modular.run_ltx2(modular_pipe, 2, noise=11), by_classic(BY_VIDEO["ltx2_own"].build(), **OFF))


@pytest.mark.parametrize("over", [{}, {"guidance_scale": Timetable([(0.0, 3.0), (0.5, 1.0)]), "modality_scale": 1.0}])
def test_saved_and_loaded_it_is_the_same_and_needs_attach_for_both_places(tmp_path, over):
    guider = ours(**over)
    guider.save_pretrained(tmp_path)
    again = SkipGuider.from_pretrained(tmp_path)
    assert again.settings == guider.settings
    names = ("guidance_scale", "modality_scale", "guidance_rescale")
    assert [getattr(again, name) for name in names] == [getattr(guider, name) for name in names]
    pipe = modular.build_ltx2()
    pipe.update_components(guider=guider, audio_guider=again)  # as a pipeline that was loaded has them
    with pytest.raises(SkipError, match=r"one SkipGuider takes both places, by attach\(pipe\)"):
        modular.run_ltx2(pipe)
    no_gates(pipe.transformer)
    again.attach(pipe)
    assert torch.isfinite(modular.run_ltx2(pipe)).all()


def test_in_one_place_beside_the_guider_of_diffusers():
    """Where that asks for no pass of its own, it is right; where it does, it is refused."""
    pipe = modular.build_ltx2()
    expected = modular.run_ltx2((ours(scale={"video": 0.7, "audio": 0.0}, modality_scale=1.0).attach(pipe), pipe)[1])
    alone = SkipGuider([LAYER], 0.7, 3.0, "attn_identity", guidance_rescale=0.7)
    pipe.update_components(guider=alone, audio_guider=diffusers.LTX2Guidance(guidance_scale=7.0, guidance_rescale=0.3))
    close(modular.run_ltx2(pipe), expected)
    pipe.update_components(**native_pair() | {"guider": alone})
    with pytest.raises(SkipError, match=r"more passes than the 3.*both places"):
        modular.run_ltx2(pipe)
    pipe.update_components(**native_pair() | {"audio_guider": alone})
    with pytest.raises(SkipError, match="takes both places"):
        modular.run_ltx2(pipe)
    no_gates(pipe.transformer)


def test_a_run_that_was_broken_off_leaves_nothing(monkeypatch):
    pipe = modular.build_ltx2()
    guider = ours().attach(pipe)
    expected = modular.run_ltx2(pipe)
    for place in ("guider", "sound"):
        combine, calls = guider.forward, []

        def failing(*args, combine=combine, calls=calls, place=place, **kwargs):
            calls.append(1)
            if len(calls) == (3 if place == "guider" else 4):  # of the second step: video, then sound
                raise KeyboardInterrupt
            return combine(*args, **kwargs)

        monkeypatch.setattr(guider, "forward", failing)
        with pytest.raises(KeyboardInterrupt):
            modular.run_ltx2(pipe)
        monkeypatch.undo()
        no_gates(pipe.transformer)
        assert torch.equal(modular.run_ltx2(pipe), expected)


def test_scales_of_its_own_that_a_pipeline_has_no_use_for():
    wan = modular.build("wan")
    for given, words in (
        ({"modality_scale": 2.0}, "about video and sound"),
        ({"scale": SCALES}, "predicts one thing"),
        ({"guidance_scale": SCALES}, "predicts one thing"),
    ):
        with pytest.raises(SkipError, match=words):
            SkipGuider(**{"layers": [1]} | given).attach(wan)
        wan.update_components(guider=SkipGuider(**{"layers": [1]} | given))
        with pytest.raises(SkipError, match=words):
            modular.run(wan)
        no_gates(wan.transformer)
    with pytest.raises(SkipError, match="give one for each"):
        ours(guidance_scale={"video": 3.0}).attach(modular.build_ltx2())
    with pytest.raises(SkipError, match="0 to 1"):
        ours(guidance_rescale={"video": 1.5, "audio": 0.0})
    with pytest.raises(SkipError, match="noise level"):
        ours(guidance_scale=Timetable([(1.0, 3.0)], over="sigma"))


def test_the_preset_is_found_by_attach(monkeypatch):
    from skipguide.pipelines import presets
    from skipguide.pipelines.presets import KnownModel, Preset

    pipe = modular.build_ltx2()
    config = pipe.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    known = KnownModel("tiny", type(pipe.transformer).__name__, BLOCKS, width, Preset((LAYER,), 0.7, "here"))
    monkeypatch.setattr(presets, "PRESETS", (known,))
    guider = SkipGuider(guidance_scale=3.0).attach(pipe)
    assert guider.settings.layers == (LAYER,) and guider.settings.scale == 0.7
    assert torch.isfinite(modular.run_ltx2(pipe)).all()
