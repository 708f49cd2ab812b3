"""SkipGuider: what it refuses, what is at work on the same denoiser, and in further pipelines with a guider."""

import copy
import threading

import diffusers
import pytest
import torch
from helpers import guider_calls
from helpers.guider_calls import LAYER, by_guider, step
from helpers.residue import agrees, no_gates, traces
from helpers.stg_reference import close

from skipguide import NoEffectError, SkipError
from skipguide.pipelines import SkipGuider, presets
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines.presets import KnownModel, Preset
from skipguide.schedule import Timetable
from zoo import BY_NAME, modular, randomise
from zoo.family import TEXT, prefix_mask, rows
from zoo.pipes import STEPS, embeds, size

# SkipGuider: what it refuses, and what is at work on the same denoiser.

wan = guider_calls.wan

# -- bad input -----------------------------------------------------------------------------------------------------

REFUSED = {
    "no layers": ({"layers": []}, "layers is empty"),
    "layers of several denoisers": ({"layers": {"transformer": [1]}}, "guider_2 is another"),
    "auto": ({"layers": "auto"}, "skipguide rank"),
    "a word": ({"layers": "some"}, "stochastic"),
    "preset in a stack": ({"layers": None, "stack": "blocks"}, "name the layers too"),
    "sigma": ({"scale": Timetable([(1.0, 2.0)], over="sigma")}, "over='step'"),
    "window": ({"start": 0.6, "stop": 0.5}, "start and stop"),
    "scale": ({"scale": float("nan")}, "finite"),
    "guidance scale": ({"guidance_scale": None}, "guidance_scale"),
    "guidance rescale": ({"guidance_rescale": 1.5}, "guidance_rescale"),
    "part": ({"part": "ffn"}, "unknown part"),
    "formula": ({"formula": "slg"}, "unknown formula"),
    "uncond without cfg": ({"formula": "uncond", "guidance_scale": 1.0}, "no CFG"),
    "interval without cfg": ({"cfg_interval": (0.0, 0.5), "guidance_scale": 1}, "no CFG"),
    "original without cfg": ({"zero_star": True, "guidance_scale": 0.0, "use_original_formulation": True}, "no CFG"),
    "every": ({"every": 0}, "every"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(SkipError, match=message):
        SkipGuider(**{"layers": [LAYER]} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [7]}, "out of range: WanTransformer3DModel"),
        ({"layers": [1], "stack": "singles"}, "no stack 'singles'"),
        ({"layers": None}, "no preset for WanTransformer3DModel"),
    ],
)
def test_what_the_model_does_not_have_is_refused_at_the_first_step(wan, settings, message):
    before = traces(wan[0].transformer)
    with pytest.raises(SkipError, match=message):
        by_guider(wan[0], SkipGuider(**settings))
    assert traces(wan[0].transformer) == before


def test_the_models_preset(wan, monkeypatch):
    config = dict(wan[0].transformer.config) | {"num_layers": 30}
    big = type(wan[0].transformer).from_config(config)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    known = KnownModel("big", type(big).__name__, 30, width, Preset((8,), 1.0, "here"))
    monkeypatch.setattr(presets, "PRESETS", (known,))
    guider = SkipGuider(guidance_scale=1.0)
    inputs = BY_NAME["wan"].inputs(1)
    step(guider, big.eval(), inputs)
    assert guider.stats.blocks_run == 30 + 30 - 9


def test_a_loop_that_does_not_drive_guiders_is_noticed(wan):
    model, inputs = wan[0].transformer, BY_NAME["wan"].inputs(1)
    guider = SkipGuider([LAYER], guidance_scale=1.0)
    with pytest.raises(SkipError, match="set_state"):
        guider.prepare_inputs({"encoder_hidden_states": inputs["encoder_hidden_states"]})
    before = traces(model)

    def begin():
        guider.set_state(0, 4, torch.tensor(1.0))
        return guider.prepare_inputs({"encoder_hidden_states": (inputs["encoder_hidden_states"],)})

    batches = begin()
    with pytest.raises(SkipError, match="pred_cond, pred_cond_skip"):
        guider(batches[:1])
    batches = begin()
    guider.prepare_models(model)
    with pytest.raises(SkipError, match="was not called for pred_cond"):
        guider.cleanup_models(model)
    assert traces(model) == before
    batches = begin()
    guider.prepare_models(model)
    BY_NAME["wan"].run(model, inputs)
    with pytest.raises(SkipError, match="calls its denoiser twice"):
        BY_NAME["wan"].run(model, inputs)
    assert traces(model) == before
    del batches


def test_other_guidance_on_the_same_denoiser_is_refused(wan):
    classic = wan[1]
    with Stg([LAYER]).apply(classic), pytest.raises(SkipError, match="remove"):
        step(SkipGuider([LAYER]), classic.transformer, BY_NAME["wan"].inputs(1))
    no_gates(classic.transformer)


def test_a_skip_without_an_effect_and_predictions_that_are_no_numbers():
    family = BY_NAME["ltx"]
    model = family.identity_block(family.build(), 0)
    model.transformer_blocks[0] = copy.deepcopy(model.transformer_blocks[1])
    for name in ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2"):
        layer = model.transformer_blocks[0].get_submodule(name)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    with pytest.raises(NoEffectError, match="did not change"):
        step(SkipGuider([0]), model, family.inputs(1))
    broken = family.build()
    torch.nn.init.constant_(broken.proj_out.bias, float("inf"))
    with pytest.raises(SkipError, match="not finite"):
        step(SkipGuider([0]), broken, family.inputs(1))


# -- company -------------------------------------------------------------------------------------------------------


def test_calls_from_other_threads_are_none_of_the_guiders(wan):
    family, model = BY_NAME["wan"], wan[0].transformer
    inputs, found = family.inputs(1), []
    plain = family.run(model, inputs)
    guider = SkipGuider([LAYER], guidance_scale=1.0)
    guider.set_state(0, 1, torch.tensor(1.0))
    batches = guider.prepare_inputs({})
    for batch in batches:
        guider.prepare_models(model)
        other = threading.Thread(target=lambda: found.append(family.run(model, inputs)))
        other.start()
        other.join()
        batch.noise_pred = family.run(model, inputs)
        guider.cleanup_models(model)
    assert all(agrees(each, plain) for each in found) and len(found) == 2
    assert not torch.equal(guider(batches).pred, plain)


def test_under_accelerate_hooks(wan):
    """As offloading has them: the hooks of blocks that do not run do not run either."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    pipe, guider = wan[0], SkipGuider([LAYER], guidance_scale=5.0)
    expected, seen = by_guider(pipe, guider, 1), []

    class Listener(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    modules = [pipe.transformer, *pipe.transformer.blocks]
    for module in modules:
        add_hook_to_module(module, Listener())
    fresh = guider.new()
    out = by_guider(pipe, fresh, 1)
    for module in modules:
        remove_hook_from_module(module)
    assert torch.equal(out, expected)
    assert len(seen) == fresh.stats.blocks_run + fresh.stats.passes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_in_bfloat16():
    pipe = modular.build("wan")
    pipe.transformer.to("cuda", torch.bfloat16)
    whole = by_guider(pipe, SkipGuider([LAYER], prefix_reuse=False))
    torch.testing.assert_close(by_guider(pipe, SkipGuider([LAYER])).float(), whole.float(), atol=0.05, rtol=0.05)


# SkipGuider in further pipelines with a guider, against the model with a block taken out, delivered by a shift.

SKIPPED, W, S = 1, 4.0, 1.5


def hunyuan_image(guider):
    pipe = diffusers.HunyuanImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0),
        transformer=BY_NAME["hunyuan_image"].build(),
        guider=guider,
        **dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )

    def call():
        text = {}
        for seed, prefix in ((1, ""), (2, "negative_")):
            text[f"{prefix}prompt_embeds"] = rows(2, seed, TEXT, 24)
            text[f"{prefix}prompt_embeds_mask"] = prefix_mask(2, TEXT)
            text[f"{prefix}prompt_embeds_2"] = rows(2, seed + 10, 4, 12)
            text[f"{prefix}prompt_embeds_mask_2"] = prefix_mask(2, 4)
        return pipe(**text, **size(128), **common())[0]

    return pipe, call


def motif(guider):
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    family = BY_NAME["motif"]
    config = dict(family.make().config) | {"in_channels": 9}  # the condition and its mask beside the latents
    transformer = type(family.make()).from_config(config)
    pipe = diffusers.MotifVideoPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(transformer, 3),
        guider=guider,
    )

    def call():
        return pipe(**embeds(2, True, mask="prompt_attention_mask"), **size(48, 5), **common())[0]

    return pipe, call


def ltx_modular(guider):
    pipe = modular.build("ltx", guider=guider)

    def call():
        text = embeds(2, True, mask="prompt_attention_mask")
        start = rows(2, 5, 2 * 3 * 3, 8)
        return pipe(**text, **size(96, 9), num_inference_steps=STEPS, latents=start, output="latents")

    return pipe, call


def common():
    generator = torch.Generator().manual_seed(11)
    return {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False, "generator": generator}


CASES = {
    "hunyuan_image": (hunyuan_image, "hunyuan_image"),
    "motif": (motif, "motif"),
    "ltx_modular": (ltx_modular, "ltx"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("w", [W, 1.0])
def test_against_the_block_taken_out(name, w):
    make, family = CASES[name]
    pipe, call = make(diffusers.ClassifierFreeGuidance(guidance_scale=w))
    pipe.set_progress_bar_config(disable=True)
    plain = call()
    model = pipe.transformer
    weak, run, delta = BY_NAME[family].identity_block(model, SKIPPED), model.forward, []

    def shifted(*args, **kwargs):
        """The same delta on both calls of a step, the conditional one first."""
        out = run(*args, **kwargs)
        d = delta.pop() if delta else S * (out[0] - weak(*args, **kwargs)[0])
        delta.extend([d] if w != 1 and not shifted.second else [])
        shifted.second = not shifted.second
        return (out[0] + d, *out[1:])

    shifted.second = False
    model.forward = shifted
    expected = call()
    del model.forward
    guider = SkipGuider([SKIPPED], scale=S, guidance_scale=w)
    if hasattr(pipe, "update_components") and name.endswith("modular"):
        pipe.update_components(guider=guider)
    else:
        pipe.guider = guider
    before = traces(model)
    out = call()
    assert traces(model) == before
    assert (out - plain).norm() > 0.01 * plain.norm()
    close(out, expected)
    blocks = len(BY_NAME[family].block_names)
    branches = 1 + (w != 1)
    assert guider.stats.passes == STEPS * (branches + 1)
    assert guider.stats.blocks_run == STEPS * (branches * blocks + blocks - 1 - SKIPPED)
