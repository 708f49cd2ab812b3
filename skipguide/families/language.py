"""Data only: the layers of every supported language model family, matched by class name.

Each entry is proven in the tests (tests/llm/test_families.py) on a tiny random instance, bit-equal to a copy whose
output projections are zero: plain forward, left-padded cached generation, static cache, beam search, chunked prefill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from skipguide.arguments import argument_names
from skipguide.hosts.wrappers import unwrap
from skipguide.spec import BlockSpec, ModelSpec, Sublayer


@dataclass(frozen=True)
class DecoderLayout:
    """How the layers of some language models are built.

    Args:
        models: class name -> path of the decoder, the module that runs the layers (empty: the model itself).
        attn: self-attention.
        mlp: feed-forward or experts.
        stack: path of the layers from the decoder.
        between: module of the layer whose first input is the residual stream between attention and feed-forward;
            empty in parallel layers.
        parallel: both sublayers read the layer's input.
        prenorm: leaving both sublayers out is the identity, and a left-out sublayer can stand for `h * scale`.
        none_outputs: how many outputs of a layer follow the hidden states (attention weights).
        none_outputs_with: the argument of a layer's forward that these outputs come with: transformers drops both, one
            family after the other (from GPT-J in 5.24). Empty where they are always there.
        when: attributes of the decoder's config that this layout is for.
        note: what is special, for the table.
    """

    models: Mapping[str, str]
    attn: Sublayer
    mlp: Sublayer
    stack: str = "layers"
    between: str = ""
    parallel: bool = False
    prenorm: bool = True
    none_outputs: int = 0
    none_outputs_with: str = ""
    when: tuple[tuple[str, Any], ...] = ()
    note: str = ""

    def block(self, model: nn.Module, decoder: str) -> BlockSpec:
        """The core's description of these layers in `model`, whose decoder lies at `decoder`."""
        stack = f"{decoder}.{self.stack}" if decoder else self.stack
        layers = submodule(model, stack) or nn.ModuleList()
        more = not self.none_outputs_with or any(
            self.none_outputs_with in argument_names(unwrap(layer)) for layer in layers.children()
        )
        return BlockSpec(
            stack,
            attn=(self.attn,),
            mlp=(self.mlp,),
            none_outputs=self.none_outputs if more else 0,
            identity=False,
            cached=True,
            shared=("position_ids", "position_embeddings", "cache_position"),
        )


def _models(*names: str, decoder: str = "model", base: str = "Model") -> dict[str, str]:
    return {f"{name}ForCausalLM": decoder for name in names} | {f"{name}{base}": "" for name in names}


def _attn(*helper_modules: str, path: str = "self_attn") -> Sublayer:
    return Sublayer(path, none_outputs=1, helper_modules=helper_modules, shares="store_full_length_kv")


def _mlp(*helper_modules: str, path: str = "mlp", **rest: Any) -> Sublayer:
    return Sublayer(
        path, outputs=("",), helper_modules=helper_modules, **rest
    )  # families name a feed-forward's input x or otherwise


_LLAMA = DecoderLayout(
    _models(
        *("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Phi3", "SmolLM3", "Granite", "Starcoder2"),
        *("Arcee", "BitNet", "Cwm", "DiffLlama", "Ernie4_5", "Glm", "GraniteSWA", "Helium", "HunYuanDenseV1"),
        *("Jais2", "MiniCPM3", "Ministral", "Ministral3", "NanoChat", "Nemotron", "Olmo", "Persimmon", "SeedOss"),
        "Youtu",
        *("Mixtral", "Qwen2Moe", "Qwen3Moe", "DeepseekV3"),
        *("AXK1", "DeepseekV2", "Dots1", "Ernie4_5_Moe", "ExaoneMoe", "Flint", "Glm4Moe", "Glm4MoeLite", "HYV3"),
        *("HunYuanMoEV1", "Laguna", "Mellum", "MiMoV2Flash", "MiniMaxM2", "Olmoe", "Phimoe", "SolarOpen"),
    )
    | {"Emu3ForCausalLM": "model", "Emu3TextModel": ""},
    attn=_attn("input_layernorm"),
    mlp=_mlp("post_attention_layernorm"),
    between="post_attention_layernorm",
)
_GPT2 = DecoderLayout(
    {"GPT2LMHeadModel": "transformer", "GPT2Model": ""} | _models("GPTBigCode", decoder="transformer"),
    attn=_attn("ln_1", path="attn"),
    mlp=_mlp("ln_2"),
    stack="h",
    between="ln_2",
)
_GEMMA2 = DecoderLayout(
    _models("Gemma2", "Gemma3")
    | {
        "Gemma3TextModel": "",
        "Gemma3ForConditionalGeneration": "model.language_model",
        "Gemma3Model": "language_model",
    },
    attn=_attn("input_layernorm", "post_attention_layernorm"),
    mlp=_mlp("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    between="pre_feedforward_layernorm",
    note="a norm before and after each sublayer",
)
_OPT = DecoderLayout(
    {"OPTForCausalLM": "model.decoder", "OPTModel": "decoder", "OPTDecoder": ""},
    attn=_attn("self_attn_layer_norm"),
    mlp=_mlp("final_layer_norm", "fc1", path="fc2", width="out_features"),
    between="final_layer_norm",
    when=(("do_layer_norm_before", True),),
    note="the feed-forward is two layers inside the block",
)
_NEOX = DecoderLayout(
    _models("GPTNeoX", decoder="gpt_neox"),
    attn=_attn("input_layernorm", path="attention"),
    mlp=_mlp("post_attention_layernorm"),
    between="post_attention_layernorm",
    when=(("use_parallel_residual", False),),
)
_FALCON = DecoderLayout(
    _models("Falcon", decoder="transformer"),
    attn=_attn("input_layernorm", path="self_attention"),
    mlp=_mlp("post_attention_layernorm"),
    stack="h",
    between="post_attention_layernorm",
    none_outputs=1,
    none_outputs_with="output_attentions",
    when=(("new_decoder_architecture", False), ("parallel_attn", False)),
)
_BLOOM = DecoderLayout(
    _models("Bloom", decoder="transformer"),
    attn=Sublayer(
        "self_attention", outputs=("residual",), none_outputs=1, inside=True, helper_modules=("input_layernorm",)
    ),
    mlp=Sublayer("mlp", outputs=("residual",), inside=True, helper_modules=("post_attention_layernorm",)),
    stack="h",
    between="post_attention_layernorm",
    none_outputs=1,
    none_outputs_with="output_attentions",
    when=(("apply_residual_connection_post_layernorm", False),),
    note="each sublayer adds the residual itself",
)
_STABLELM = DecoderLayout(
    _models("StableLm"),
    attn=_attn("input_layernorm"),
    mlp=_mlp("post_attention_layernorm"),
    between="post_attention_layernorm",
    when=(("use_parallel_residual", False),),
)
_PARALLEL = DecoderLayout(
    _models("Phi", "Cohere", "Cohere2", "Cohere2Moe"),
    attn=_attn(),
    mlp=_mlp(),
    parallel=True,
    note="one norm feeds both sublayers",
)

# The first layout whose class and config fit is the one.
DECODER_LAYOUTS: tuple[DecoderLayout, ...] = (
    _LLAMA,
    replace(
        _LLAMA,
        models=_models("GptOss"),
        mlp=_mlp("post_attention_layernorm", none_outputs=1),
        note="experts return their router scores too; attention sinks",
    ),
    replace(
        _LLAMA,
        models=_models("Llama4", base="TextModel"),
        mlp=_mlp("post_attention_layernorm", path="feed_forward", none_outputs=1),
        note="the feed-forward returns its router scores too",
    ),
    replace(
        _LLAMA,
        models=_models("GraniteMoe", "GraniteMoeSWA"),
        mlp=_mlp("post_attention_layernorm", path="block_sparse_moe"),
    ),
    replace(
        _LLAMA,
        models=_models("Apertus"),
        attn=_attn("attention_layernorm"),
        mlp=_mlp("feedforward_layernorm"),
        between="feedforward_layernorm",
    ),
    replace(
        _LLAMA,
        models=_models("VaultGemma"),
        mlp=_mlp("pre_feedforward_layernorm"),
        between="pre_feedforward_layernorm",
    ),
    replace(
        _LLAMA,
        models=_models("ModernBertDecoder"),
        attn=_attn("attn_norm", path="attn"),
        mlp=_mlp("mlp_norm"),
        between="mlp_norm",
    ),
    _GEMMA2,
    replace(
        _GEMMA2,
        models=_models("Afmoe"),
        mlp=_mlp("pre_mlp_layernorm", "post_mlp_layernorm"),
        between="pre_mlp_layernorm",
    ),
    replace(
        _GEMMA2,
        models=_models("Glm4", "Kolibri1"),
        attn=_attn("input_layernorm", "post_self_attn_layernorm"),
        mlp=_mlp("post_attention_layernorm", "post_mlp_layernorm"),
        between="post_attention_layernorm",
    ),
    DecoderLayout(
        _models("Gemma3n")
        | {
            "Gemma3nTextModel": "",
            "Gemma3nForConditionalGeneration": "model.language_model",
            "Gemma3nModel": "language_model",
        },
        attn=_attn("post_attention_layernorm"),
        mlp=_mlp("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        prenorm=False,
        note="several streams; attention whose keys later layers share cannot be left out",
    ),
    replace(
        _GEMMA2,
        models=_models("Gemma4", base="TextModel")
        | {"Gemma4ForConditionalGeneration": "model.language_model", "Gemma4Model": "language_model"},
        between="",
        prenorm=False,
        when=(("enable_moe_block", False),),
        note="each layer adds an embedding of its own; attention whose keys later layers share cannot be left out",
    ),
    DecoderLayout(
        _models("Olmo2", "Olmo3", "FlexOlmo", "Exaone4"),
        attn=_attn("post_attention_layernorm"),
        mlp=_mlp("post_feedforward_layernorm"),
        between="mlp",
        note="norms after the sublayers only",
    ),
    _GPT2,
    replace(
        _GPT2,
        models=_models("GPTNeo", decoder="transformer"),
        none_outputs=1,
        none_outputs_with="output_attentions",
    ),
    _OPT,
    replace(
        _OPT,
        models=_models("XGLM") | _models("BioGpt", decoder="biogpt"),
        when=(),
    ),
    replace(
        _OPT,
        attn=_attn(),
        mlp=_mlp("fc1", path="fc2", width="out_features"),
        between="fc1",
        prenorm=False,
        when=(("do_layer_norm_before", False),),
        note="norms after the residual sum: they stay when a sublayer is left out",
    ),
    _NEOX,
    replace(_NEOX, parallel=True, between="", when=()),
    _FALCON,
    replace(
        _FALCON,
        attn=_attn("ln_attn", path="self_attention"),
        mlp=_mlp("ln_mlp"),
        parallel=True,
        between="",
        when=(),
        note="one norm for both sublayers, or one for each",
    ),
    _BLOOM,
    replace(
        _BLOOM,
        attn=replace(_BLOOM.attn, helper_modules=()),
        mlp=replace(_BLOOM.mlp, helper_modules=()),
        prenorm=False,
        when=(),
        note="the residual is the norm's output",
    ),
    DecoderLayout(
        _models("Mpt", decoder="transformer"),
        attn=_attn("norm_1", path="attn"),
        mlp=Sublayer("ffn", outputs=("residual",), inside=True, helper_modules=("norm_2",)),
        stack="blocks",
        between="norm_2",
        none_outputs=1,
        none_outputs_with="output_attentions",
        note="the feed-forward adds the residual itself",
    ),
    _STABLELM,
    replace(_STABLELM, attn=_attn(), mlp=_mlp(), parallel=True, between="", when=()),
    _PARALLEL,
    replace(
        _PARALLEL,
        models=_models("GPTJ", "CodeGen", decoder="transformer"),
        attn=_attn(path="attn"),
        stack="h",
        none_outputs=1,
        none_outputs_with="output_attentions",
    ),
)


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, the model itself for an empty one, or None."""
    found: Any = model
    for step in path.split(".") if path else ():
        found = getattr(found, step, None)
    return found if isinstance(found, nn.Module) else None


def layout_of(model: nn.Module) -> tuple[DecoderLayout, str] | None:
    """The layout of a language model and the path of its decoder, or None for a model that is not described."""
    for cls in type(model).__mro__:
        for layout in DECODER_LAYOUTS:
            if (path := layout.models.get(cls.__name__)) is None:
                continue
            config = getattr(submodule(model, path), "config", None)
            if all(getattr(config, name, None) == value for name, value in layout.when):
                return layout, path
    return None


def language_model_spec(model: nn.Module) -> ModelSpec | None:
    """The core's description of a language model, or None."""
    if (found := layout_of(model)) is None:
        return None
    layout, path = found
    return ModelSpec((layout.block(model, path),))
