"""What the tiny image pipelines are called with."""

import torch

from zoo.family import TEXT, prefix_mask, rows
from zoo.pipes import embeds, size

MASK = "prompt_attention_mask"


def chroma_call(num_prompts: int, cfg: bool, **more):
    """The masks are multiplied with each other, so they are numbers."""
    text = embeds(num_prompts, cfg, mask=MASK)
    text = {name: value.float() for name, value in text.items()}
    return {**text, **size(64), "guidance_scale": 5.0 if cfg else 1.0, **more}


def chroma_img2img_call(num_prompts: int, cfg: bool):
    return chroma_call(num_prompts, cfg, image=picture(), strength=1.0)


def text_call(pixels: int, w: float, *, mask: str | None = None, name: str = "guidance_scale", **more):
    """Embeddings, a size and a scale."""

    def call(num_prompts: int, cfg: bool):
        return {**embeds(num_prompts, cfg, mask=mask), **size(pixels), name: w if cfg else 1.0, **more}

    return call


def picture(pixels: int = 64):
    from PIL import Image

    return Image.linear_gradient("L").resize((pixels, pixels)).convert("RGB")


def sd3_img2img_call(num_prompts: int, cfg: bool):
    text = embeds(num_prompts, cfg, pooled=True)
    return {**text, **size(64), "image": picture(), "strength": 1.0, "guidance_scale": 7.0 if cfg else 1.0}


def sd3_inpaint_call(num_prompts: int, cfg: bool):
    return {**sd3_img2img_call(num_prompts, cfg), "mask_image": picture().convert("L")}


def flux_call(num_prompts: int, cfg: bool, **more):
    text = embeds(num_prompts, cfg, pooled=True)
    return {**text, **size(64), "guidance_scale": 3.5, "true_cfg_scale": 4.0 if cfg else 1.0, **more}


def flux_img2img_call(num_prompts: int, cfg: bool):
    return flux_call(num_prompts, cfg, image=picture(), strength=1.0)


def flux_inpaint_call(num_prompts: int, cfg: bool):
    return {**flux_img2img_call(num_prompts, cfg), "mask_image": picture().convert("L")}


def kontext_call(num_prompts: int, cfg: bool):
    return flux_call(num_prompts, cfg, image=picture(), max_area=64 * 64, _auto_resize=False)


def distilled_call(num_prompts: int, cfg: bool):
    return {**embeds(num_prompts, False), **size(64), "guidance_scale": 3.5}


def flux_control_call(num_prompts: int, cfg: bool):
    return {**embeds(num_prompts, False, pooled=True), **size(64), "guidance_scale": 3.5, "control_image": picture()}


def flux_fill_call(num_prompts: int, cfg: bool):
    text = embeds(num_prompts, False, pooled=True)
    return {**text, **size(64), "image": picture(), "mask_image": picture().convert("L"), "guidance_scale": 3.5}


def qwen_call(num_prompts: int, cfg: bool):
    text = embeds(num_prompts, cfg, mask="prompt_embeds_mask")
    return {**text, **size(64), "true_cfg_scale": 4.0 if cfg else 1.0}


def qwen_img2img_call(num_prompts: int, cfg: bool):
    return {**qwen_call(num_prompts, cfg), "image": picture(), "strength": 1.0}


def sana_sprint_call(num_prompts: int, cfg: bool):
    text = embeds(num_prompts, False, mask="prompt_attention_mask")
    fixed = {"num_inference_steps": 3, "intermediate_timesteps": None, "use_resolution_binning": False}
    return {**text, **size(256), "guidance_scale": 4.5, **fixed}


def hunyuan_dit_call(num_prompts: int, cfg: bool):
    text = embeds(num_prompts, cfg, mask="prompt_attention_mask")
    for seed, prefix in ((3, ""), (4, "negative_"))[: 1 + cfg]:
        text[f"{prefix}prompt_embeds_2"] = rows(num_prompts, seed, 4, 24)
        text[f"{prefix}prompt_attention_mask_2"] = prefix_mask(num_prompts, 4)
    sides = {**size(64), "use_resolution_binning": False}
    return {**text, **sides, "guidance_scale": 5.0 if cfg else 1.0}


def hidream_call(num_prompts: int, cfg: bool):
    out: dict[str, object] = {}
    for seed, prefix in ((1, ""), (2, "negative_"))[: 1 + cfg]:
        out[f"{prefix}prompt_embeds_t5"] = rows(num_prompts, seed, TEXT, 24)
        out[f"{prefix}prompt_embeds_llama3"] = torch.stack([rows(num_prompts, seed + 5 + i, 4, 24) for i in range(2)])
        out[f"{prefix}pooled_prompt_embeds"] = rows(num_prompts, seed + 20, 12)
    return {**out, **size(64), "guidance_scale": 5.0 if cfg else 1.0}


def zimage_call(num_prompts: int, cfg: bool):
    """The negative prompt is longer than the prompt by a whole step of the padding; c + g (c - u)."""
    texts = {"prompt_embeds": list(rows(num_prompts, 1, TEXT, 24))}
    texts["negative_prompt_embeds"] = list(rows(num_prompts, 2, 34, 24)) if cfg else []
    return {**texts, **size(64), "guidance_scale": 3.0 if cfg else 0.0}


def zimage_img2img_call(num_prompts: int, cfg: bool):
    return {**zimage_call(num_prompts, cfg), "image": picture(), "strength": 1.0}


def hunyuan_image_call(num_prompts: int, cfg: bool):
    out: dict[str, object] = {}
    for seed, prefix in ((1, ""), (2, "negative_")):
        out[f"{prefix}prompt_embeds"] = rows(num_prompts, seed, TEXT, 24)
        out[f"{prefix}prompt_embeds_mask"] = prefix_mask(num_prompts, TEXT)
        out[f"{prefix}prompt_embeds_2"] = rows(num_prompts, seed + 10, 4, 12)
        out[f"{prefix}prompt_embeds_mask_2"] = prefix_mask(num_prompts, 4)
    return {**out, "height": 128, "width": 128}


def longcat_call(num_prompts: int, cfg: bool):
    words = {"prompt": ["a", "b"][:num_prompts], "negative_prompt": ["", ""][:num_prompts]}
    return {**words, **size(64), "guidance_scale": 4.5 if cfg else 1.0, "enable_prompt_rewrite": False}


def krea2_call(num_prompts: int, cfg: bool):
    """c + g (c - u)."""
    out: dict[str, object] = {}
    for seed, prefix in ((1, ""), (2, "negative_"))[: 1 + cfg]:
        out[f"{prefix}prompt_embeds"] = rows(num_prompts, seed, TEXT, 2, 24)
        out[f"{prefix}prompt_embeds_mask"] = prefix_mask(num_prompts, TEXT).bool()
    return {**out, **size(64), "guidance_scale": 3.0 if cfg else 0.0}


def flux_control_img2img_call(num_prompts: int, cfg: bool):
    return {**flux_control_call(num_prompts, cfg), "image": picture(), "strength": 1.0}


def with_mask(call, **more):
    """The same call with a mask over the image."""

    def masked(num_prompts: int, cfg: bool):
        return {**call(num_prompts, cfg), "mask_image": picture().convert("L"), **more}

    return masked
