"""Tiny stock pipelines that edit a picture, or go by some: their latents share the sequence with the pictures'."""

import functools
import importlib

import diffusers
import torch

from zoo.family import TEXT, rows
from zoo.image_calls import MASK, picture, qwen_call, text_call, with_mask
from zoo.image_joint import qwen
from zoo.pipes import BATCHED, MODELS, SINGLE, TWO_CALLS, PipeCase, flow, placed
from zoo.pipes_image import BINNING, FLUX_TEXT, around, deep_vae, dynamic, image_vae, qwen_vae, wider


def small(make, module: str, sides: tuple[int | None, ...]):
    """A pipeline whose pictures have 64 pixels a side, not the area of a million that it scales them to."""

    def made(seed: int) -> diffusers.DiffusionPipeline:
        importlib.import_module(f"diffusers.pipelines.{module}").calculate_dimensions = lambda area, ratio: sides
        return make(seed)

    return made


def qwen_edit(cls: str, module: str, sides: tuple[int | None, ...], **config):
    made = around(cls, "qwen_image", flow, "processor", vae=qwen_vae, **config)
    return small(made, f"qwenimage.{module}", sides)


def edit_call(num_prompts: int, cfg: bool):
    return {**qwen_call(num_prompts, cfg), "image": picture()}


def edit_inpaint_call(num_prompts: int, cfg: bool):
    call = with_mask(edit_call, strength=1.0)(num_prompts, cfg)
    return {name: value for name, value in call.items() if name not in ("height", "width")}


class Encoder(torch.nn.Linear):
    """What a pipeline reads of a text encoder that it does not call."""

    dtype = property(lambda self: self.weight.dtype)
    device = property(lambda self: self.weight.device)


def layered(seed: int):
    """It reads the dtype of its text encoder, which is not there otherwise."""
    model = functools.partial(qwen, use_additional_t_cond=True, use_layer3d_rope=True)
    pipe = qwen_edit("QwenImageLayeredPipeline", "pipeline_qwenimage_layered", (64, 64), model=model)(seed)
    pipe.register_modules(text_encoder=Encoder(1, 1))
    return pipe


def layered_call(num_prompts: int, cfg: bool):
    """It has no latents to give: what comes is decoded."""
    call = {**edit_call(num_prompts, cfg), "layers": 1, "prompt": "a", "output_type": "pt"}
    return {name: value for name, value in call.items() if name not in ("height", "width")}


class Stacked(PipeCase):
    """Of a pipeline that gives a list with one tensor for each prompt."""

    def run(self, *args, **kwargs):
        return torch.stack(super().run(*args, **kwargs))


def words(pipe, encode):
    """In place of the text encoder: the same words give the same embeddings."""
    pipe.encode_prompt = lambda *args, **kwargs: placed(encode(*args, **kwargs), pipe)
    return pipe


def embedded(prompt, length: int = TEXT):
    prompts = [prompt] if isinstance(prompt, str) else prompt
    return torch.cat([rows(1, sum(map(ord, each)) % 1000 + 1, length, 24) for each in prompts])


class Processor:
    """What LongCat's pipeline reads of a processor when it is made."""

    image_processor = None


def longcat_edit(seed: int):
    config = dict(MODELS["longcat"].make().config) | {"in_channels": 64}  # it makes 16 channels of latents, always
    model = functools.partial(diffusers.LongCatImageTransformer2DModel, **config)
    vae = functools.partial(image_vae, channels=16)
    made = around("LongCatImageEditPipeline", "longcat", vae=vae, model=model, text_processor=Processor())
    pipe = small(made, "longcat_image.pipeline_longcat_image_edit", (64, 64))(seed)
    return words(pipe, lambda prompt, **_: (embedded(prompt), torch.zeros(TEXT, 3)))


def longcat_edit_call(num_prompts: int, cfg: bool):
    return {"prompt": "a", "image": picture(), "guidance_scale": 4.5 if cfg else 1.0}


def fibo(cls: str):
    def make(seed: int) -> diffusers.DiffusionPipeline:
        config = dict(MODELS["bria_fibo"].make().config) | {"in_channels": 4}
        model = functools.partial(diffusers.BriaFiboTransformer2DModel, **config)
        pipe = around(cls, "bria_fibo", dynamic, model=model, vae=wan_vae)(seed)

        def encode(prompt, guidance_scale, negative_prompt=None, **_):
            texts = [embedded(prompt), None if guidance_scale <= 1 else embedded(["n"] * len(prompt))]
            masks = [None if text is None else torch.ones(text.shape[:2]) for text in texts]
            masks[0][-1, -1] = 0
            layers = [None if text is None else [text[..., i : i + 12] for i in range(3)] for text in texts]
            ids = torch.zeros(len(texts[0]), TEXT, 3)
            return (*texts, ids, *masks, *layers)

        return words(pipe, encode)

    return make


def wan_vae():
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).eval()


def fibo_call(num_prompts: int, cfg: bool, **more):
    words = ["a", "b"][:num_prompts]
    return {"prompt": words, "height": 64, "width": 64, "guidance_scale": 5.0 if cfg else 1.0, **more}


def fibo_edit_call(num_prompts: int, cfg: bool):
    call = fibo_call(num_prompts, cfg, image=picture(), _auto_resize=False)
    return {**call, "prompt": ['{"edit_instruction": "a"}', '{"edit_instruction": "b"}'][:num_prompts]}


def sana_sprint_img2img_call(num_prompts: int, cfg: bool):
    call = text_call(64, 4.5, mask=MASK, intermediate_timesteps=None, **BINNING)(num_prompts, False)
    return {**call, "image": picture(), "strength": 1.0, "guidance_scale": 4.5}


def cloze(seed: int):
    made = around(
        "VisualClozeGenerationPipeline", "flux", flow, *FLUX_TEXT, vae=image_vae, model=wider("flux", 288, 16)
    )
    pipe = made(seed)
    pipe.resolution = pipe.image_processor.resolution = 64

    def encode(content_prompt, **_):
        text = embedded(content_prompt)
        return text, rows(len(text), 3, 12), torch.zeros(TEXT, 3)

    return words(pipe, encode)


def cloze_call(num_prompts: int, cfg: bool):
    """One finished example, then a picture whose counterpart is missing."""
    pictures = [[[picture(), picture()], [picture(), None]]] * num_prompts
    texts = {"task_prompt": ["t", "t"][:num_prompts], "content_prompt": ["a", "b"][:num_prompts]}
    return {**texts, "image": pictures, "guidance_scale": 30.0}


EDIT_PIPES = (
    PipeCase(
        "qwen_edit",
        "qwen_image",
        qwen_edit("QwenImageEditPipeline", "pipeline_qwenimage_edit", (64, 64, None)),
        edit_call,
        TWO_CALLS,
    ),
    PipeCase(
        "qwen_edit_plus",
        "qwen_image",
        qwen_edit("QwenImageEditPlusPipeline", "pipeline_qwenimage_edit_plus", (64, 64)),
        edit_call,
        TWO_CALLS,
    ),
    PipeCase(
        "qwen_edit_inpaint",
        "qwen_image",
        qwen_edit("QwenImageEditInpaintPipeline", "pipeline_qwenimage_edit_inpaint", (64, 64, None)),
        edit_inpaint_call,
        TWO_CALLS,
    ),
    Stacked("qwen_layered", "qwen_image", layered, layered_call, TWO_CALLS),
    PipeCase("longcat_edit", "longcat", longcat_edit, longcat_edit_call, TWO_CALLS),
    PipeCase("fibo", "bria_fibo", fibo("BriaFiboPipeline"), fibo_call, BATCHED),
    PipeCase("fibo_edit", "bria_fibo", fibo("BriaFiboEditPipeline"), fibo_edit_call, BATCHED),
    PipeCase(
        "sana_sprint_img2img",
        "sana_sprint",
        around("SanaSprintImg2ImgPipeline", "sana_sprint", diffusers.SCMScheduler, vae=deep_vae),
        sana_sprint_img2img_call,
        SINGLE,
    ),
    PipeCase("cloze", "flux", cloze, cloze_call, SINGLE),
)
