"""Tiny random language models of every family, and where their sublayers end, written by hand.

Nothing here imports skipguide: this is the truth that skipguide is tested against. A model without a sublayer is a
deep copy whose output projections of that sublayer are zero, never a hook.
"""

import copy
import inspect
from dataclasses import dataclass, field

import torch
import transformers
from torch import nn

# what the forwards of this transformers, generate() and their outputs call a KV cache
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
VOCAB, WIDTH, LAYERS = 64, 32, 4
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GPT = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class LM:
    """One family in one configuration.

    Attributes:
        name: of the test.
        cls: the class in transformers, without Config and its head.
        config: its arguments.
        layers: path of the layers.
        attn: the attention's output projection, from a layer.
        mlp: the feed-forward's, all that may be there.
        parallel: both sublayers read the layer's input.
    """

    name: str
    cls: str
    config: dict = field(default_factory=dict)
    layers: str = "model.layers"
    attn: str = "self_attn.o_proj"
    mlp: tuple[str, ...] = ("mlp.down_proj",)
    parallel: bool = False
    head: str = "ForCausalLM"
    config_cls: str = ""

    def __repr__(self):
        return self.name

    def build(self, seed=0, **config):
        made = getattr(transformers, self.config_cls or f"{self.cls}Config")(**self.config | config)
        torch.manual_seed(seed)
        model = getattr(transformers, self.cls + self.head)(made)
        model.generation_config.pad_token_id = 0
        return randomise(model, seed)

    def layer(self, model, i):
        return model.get_submodule(self.layers)[i]

    def zeroed(self, model, attn=(), mlp=()):
        edited = copy.deepcopy(model)
        for layers, paths in ((attn, (self.attn,)), (mlp, self.mlp)):
            for i in layers:
                assert sum(_zero(self.layer(edited, i), path) for path in paths), (self.name, i, paths)
        return edited


def _zero(layer, path):
    """Zero a projection, or a parameter (experts in one tensor), and its bias."""
    owner, _, last = path.rpartition(".")
    try:
        module = layer.get_submodule(owner)
    except AttributeError:
        return 0
    target = getattr(module, last, None)
    if target is None:
        return 0
    tensors = (target.weight, getattr(target, "bias", None)) if isinstance(target, nn.Module) else (target,)
    if not isinstance(target, nn.Module):
        tensors += (getattr(module, f"{last}_bias", None),)
    with torch.no_grad():
        for tensor in tensors:
            if tensor is not None:
                tensor.zero_()
    return 1


def randomise(model, seed=0, std=0.2):
    """Every parameter random, norms around 1, so that each sublayer has a visible effect; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_((1 + 0.1 * noise) if is_norm else std * noise)
    return model.eval().requires_grad_(False)


def prompt(batch=2, tokens=7, seed=0):
    """Token ids `[batch, tokens]`."""
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(batch=2, tokens=7, seed=0):
    """Token ids with row 0 padded by three on the left, and the mask."""
    ids = prompt(batch, tokens, seed)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids.masked_fill(mask == 0, 0), mask


def llama(cls, name=None, **config):
    return LM(name or cls.lower(), cls, _LLAMA | config)


_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2), "sliding_window": 4}
_MOE = ("mlp.down_proj", "mlp.experts.down_proj", "mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj")

ALL = (
    llama("Llama"),
    llama("Mistral", sliding_window=4),
    llama("Qwen2"),
    llama("Qwen3", head_dim=8),
    llama("Gemma", head_dim=8),
    llama("Gemma2", head_dim=8, query_pre_attn_scalar=8, **_SLIDING),
    LM(
        "gemma3",
        "Gemma3",
        _LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8} | _SLIDING,
        config_cls="Gemma3TextConfig",
    ),
    llama("Phi3"),
    llama("SmolLM3"),
    llama("Granite", residual_multiplier=0.5, embedding_multiplier=2.0),
    LM("starcoder2", "Starcoder2", _LLAMA, mlp=("mlp.c_proj",)),
    llama("Olmo2"),
    LM("mixtral", "Mixtral", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}, mlp=_MOE),
    LM(
        "qwen2moe",
        "Qwen2Moe",
        _LLAMA | _EXPERTS | {"shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
        mlp=_MOE,
    ),
    LM("qwen3moe", "Qwen3Moe", _LLAMA | _EXPERTS | {"head_dim": 8, "mlp_only_layers": [1]}, mlp=_MOE),
    LM(
        "gptoss",
        "GptOss",
        _LLAMA | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2} | _SLIDING,
        mlp=("mlp.experts.down_proj",),
    ),
    LM(
        "deepseekv3",
        "DeepseekV3",
        _LLAMA
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
        }
        | {"v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        | {"first_k_dense_replace": 2, "moe_intermediate_size": 24, "n_shared_experts": 1},
        mlp=_MOE,
    ),
    LM(
        "gpt2",
        "GPT2",
        _GPT | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128},
        layers="transformer.h",
        attn="attn.c_proj",
        mlp=("mlp.c_proj",),
        head="LMHeadModel",
    ),
    *(
        LM(
            f"gptneox_{'parallel' if parallel else 'serial'}",
            "GPTNeoX",
            {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"} | {"use_parallel_residual": parallel},
            layers="gpt_neox.layers",
            attn="attention.dense",
            mlp=("mlp.dense_4h_to_h",),
            parallel=parallel,
        )
        for parallel in (True, False)
    ),
    *(
        LM(
            f"opt{'' if before else '_postnorm'}",
            "OPT",
            _GPT
            | {"hidden_size": WIDTH, "ffn_dim": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
            | {"max_position_embeddings": 128, "word_embed_proj_dim": WIDTH, "do_layer_norm_before": before},
            layers="model.decoder.layers",
            attn="self_attn.out_proj",
            mlp=("fc2",),
        )
        for before in (True, False)
    ),
    *(
        LM(
            f"falcon_{name}",
            "Falcon",
            {k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "intermediate_size")} | config,
            layers="transformer.h",
            attn="self_attention.dense",
            mlp=("mlp.dense_4h_to_h",),
            parallel=name != "serial",
        )
        for name, config in {
            "parallel": {"parallel_attn": True, "new_decoder_architecture": False, "alibi": False},
            "new": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
            "serial": {"parallel_attn": False, "new_decoder_architecture": False, "multi_query": False, "alibi": False},
        }.items()
    ),
    *(
        LM(
            f"bloom{'_postnorm' if after else ''}",
            "Bloom",
            _GPT
            | {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4}
            | {"apply_residual_connection_post_layernorm": after},
            layers="transformer.h",
            attn="self_attention.dense",
            mlp=("mlp.dense_4h_to_h",),
        )
        for after in (False, True)
    ),
    LM(
        "mpt",
        "Mpt",
        _GPT | {"d_model": WIDTH, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64, "expansion_ratio": 2},
        layers="transformer.blocks",
        attn="attn.out_proj",
        mlp=("ffn.down_proj",),
    ),
    *(
        LM(
            f"stablelm_{'parallel' if parallel else 'serial'}",
            "StableLm",
            _LLAMA | {"use_parallel_residual": parallel},
            parallel=parallel,
        )
        for parallel in (False, True)
    ),
    LM("phi", "Phi", _LLAMA, attn="self_attn.dense", mlp=("mlp.fc2",), parallel=True),
    LM("cohere", "Cohere", _LLAMA, parallel=True),
    LM(
        "gptj",
        "GPTJ",
        _GPT | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
        layers="transformer.h",
        attn="attn.out_proj",
        mlp=("mlp.fc_out",),
        parallel=True,
    ),
    LM(
        "gemma3n",
        "Gemma3n",
        _LLAMA
        | {"head_dim": 8, "num_kv_shared_layers": 2, "num_hidden_layers": 6, "intermediate_size": [48] * 6}
        | {"vocab_size_per_layer_input": VOCAB}
        | {
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "activation_sparsity_pattern": None,
        }
        | {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 4},
        config_cls="Gemma3nTextConfig",
    ),
)
BY_NAME = {lm.name: lm for lm in ALL}
