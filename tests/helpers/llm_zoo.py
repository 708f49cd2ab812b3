"""Tiny random language models of every family that is described: see llm_model."""

from helpers.llm_like_llama import LIKE_LLAMA
from helpers.llm_model import (
    CACHE,
    EXPERTS,
    GPT,
    LAYERS,
    LLAMA,
    LM,
    MOE,
    SLIDING,
    VOCAB,
    WIDTH,
    left_padded,
    llama,
    prompt,
    randomise,
)

__all__ = ["ALL", "BY_NAME", "CACHE", "GPT", "LLAMA", "LM", "VOCAB", "left_padded", "prompt", "randomise"]

ALL = (
    llama("Llama"),
    llama("Mistral", sliding_window=4),
    llama("Qwen2"),
    llama("Qwen3", head_dim=8),
    llama("Gemma", head_dim=8),
    llama("Gemma2", head_dim=8, query_pre_attn_scalar=8, **SLIDING),
    LM(
        "gemma3",
        "Gemma3",
        LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8} | SLIDING,
        config_cls="Gemma3TextConfig",
    ),
    llama("Phi3"),
    llama("SmolLM3"),
    llama("Granite", residual_multiplier=0.5, embedding_multiplier=2.0),
    LM("starcoder2", "Starcoder2", LLAMA, mlp=("mlp.c_proj",)),
    llama("Olmo2"),
    LM("mixtral", "Mixtral", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}, mlp=MOE),
    LM(
        "qwen2moe",
        "Qwen2Moe",
        LLAMA | EXPERTS | {"shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
        mlp=MOE,
    ),
    LM("qwen3moe", "Qwen3Moe", LLAMA | EXPERTS | {"head_dim": 8, "mlp_only_layers": [1]}, mlp=MOE),
    LM(
        "gptoss",
        "GptOss",
        LLAMA | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2} | SLIDING,
        mlp=("mlp.experts.down_proj",),
    ),
    LM(
        "deepseekv3",
        "DeepseekV3",
        LLAMA
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
        }
        | {"v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        | {"first_k_dense_replace": 2, "moe_intermediate_size": 24, "n_shared_experts": 1},
        mlp=MOE,
    ),
    LM(
        "gpt2",
        "GPT2",
        GPT | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128},
        layers="transformer.h",
        attn="attn.c_proj",
        mlp=("mlp.c_proj",),
        head="LMHeadModel",
    ),
    *(
        LM(
            f"gptneox_{'parallel' if parallel else 'serial'}",
            "GPTNeoX",
            {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | {"use_parallel_residual": parallel},
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
            GPT
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
            {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "intermediate_size")} | config,
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
            GPT
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
        GPT | {"d_model": WIDTH, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64, "expansion_ratio": 2},
        layers="transformer.blocks",
        attn="attn.out_proj",
        mlp=("ffn.down_proj",),
    ),
    *(
        LM(
            f"stablelm_{'parallel' if parallel else 'serial'}",
            "StableLm",
            LLAMA | {"use_parallel_residual": parallel},
            parallel=parallel,
        )
        for parallel in (False, True)
    ),
    LM("phi", "Phi", LLAMA, attn="self_attn.dense", mlp=("mlp.fc2",), parallel=True),
    LM("cohere", "Cohere", LLAMA, parallel=True),
    LM(
        "gptj",
        "GPTJ",
        GPT | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
        layers="transformer.h",
        attn="attn.out_proj",
        mlp=("mlp.fc_out",),
        parallel=True,
    ),
    LM(
        "gemma3n",
        "Gemma3n",
        LLAMA
        | {"head_dim": 8, "num_kv_shared_layers": 2, "num_hidden_layers": 6, "intermediate_size": [48] * 6}
        | {"vocab_size_per_layer_input": VOCAB}
        | {
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "activation_sparsity_pattern": None,
        }
        | {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 4},
        shares=True,
        config_cls="Gemma3nTextConfig",
    ),
    LM(
        "gemma4",
        "Gemma4",
        LLAMA
        | {"head_dim": 8, "num_kv_shared_layers": 2, "num_hidden_layers": 6, "hidden_size_per_layer_input": 8}
        | {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 4}
        | {"vocab_size_per_layer_input": VOCAB},
        shares=True,
        config_cls="Gemma4TextConfig",
    ),
)
ALL += tuple(lm for lm in LIKE_LLAMA if lm.exists)  # some are younger than the oldest transformers that serves
BY_NAME = {lm.name: lm for lm in ALL}
