"""The many families whose layers are Llama's but for names, norms, experts or the attention's inside."""

from helpers.llm_model import EXPERTS, GPT, LAYERS, LLAMA, LM, MOE, SLIDING, WIDTH, llama

_LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
_LATENT |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
# every config takes of these what it knows: two dense layers, then four experts of which each token gets two
_SPARSE = EXPERTS | {"head_dim": 8, "num_local_experts": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
_SPARSE |= {"first_k_dense_replace": 2, "n_shared_experts": 1}
_DENSE = (
    *("Arcee", "BitNet", "Cwm", "DiffLlama", "Ernie4_5", "Exaone4", "Glm", "Glm4", "GraniteSWA", "Helium"),
    *("HunYuanDenseV1", "Jais2", "Ministral", "Ministral3", "Olmo", "Olmo3", "SeedOss", "Apertus", "VaultGemma"),
)
_EXPERT = (
    *(
        "Dots1",
        "Ernie4_5_Moe",
        "ExaoneMoe",
        "FlexOlmo",
        "Flint",
        "Glm4Moe",
        "HYV3",
        "HunYuanMoEV1",
        "Kolibri1",
        "Laguna",
    ),
    *("Mellum", "MiMoV2Flash", "MiniMaxM2", "Olmoe", "Phimoe", "SolarOpen"),
)

LIKE_LLAMA = (
    *(llama(name, head_dim=8) for name in _DENSE),
    *(llama(name, mlp=("mlp.fc2", "mlp.down_proj"), head_dim=8) for name in ("NanoChat", "Nemotron")),
    *(llama(name, mlp=MOE, **_SPARSE) for name in _EXPERT),
    *(llama(name, mlp=MOE, **_SPARSE | _LATENT) for name in ("AXK1", "DeepseekV2", "Glm4MoeLite", "MiniCPM3", "Youtu")),
    *(
        llama(name, mlp=("block_sparse_moe.experts.down_proj",), num_local_experts=4)
        for name in ("GraniteMoe", "GraniteMoeSWA")
    ),
    llama("Afmoe", mlp=MOE, num_dense_layers=2, **EXPERTS, head_dim=8),
    LM("persimmon", "Persimmon", LLAMA, attn="self_attn.dense", mlp=("mlp.dense_4h_to_h",)),
    LM("emu3", "Emu3", LLAMA, config_cls="Emu3TextConfig"),
    LM(
        "llama4",
        "Llama4",
        LLAMA | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 4},
        mlp=("feed_forward.experts.down_proj", "feed_forward.shared_expert.down_proj"),
        config_cls="Llama4TextConfig",
    ),
    LM("cohere2", "Cohere2", LLAMA | {"head_dim": 8} | SLIDING, parallel=True),
    LM("cohere2moe", "Cohere2Moe", LLAMA | _SPARSE, mlp=MOE, parallel=True),
    LM(
        "modernbert",
        "ModernBertDecoder",
        LLAMA | {"global_attn_every_n_layers": 2, "local_attention": 4},
        attn="attn.Wo",
        mlp=("mlp.Wo",),
    ),
    LM(
        "gptbigcode",
        "GPTBigCode",
        GPT | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128},
        layers="transformer.h",
        attn="attn.c_proj",
        mlp=("mlp.c_proj",),
    ),
    LM(
        "gptneo",
        "GPTNeo",
        GPT
        | {"hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": 4, "max_position_embeddings": 128}
        | {"attention_types": [[["global", "local"], LAYERS // 2]], "window_size": 4},
        layers="transformer.h",
        attn="attn.attention.out_proj",
        mlp=("mlp.c_proj",),
    ),
    LM(
        "codegen",
        "CodeGen",
        GPT | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "n_ctx": 128, "rotary_dim": 4},
        layers="transformer.h",
        attn="attn.out_proj",
        mlp=("mlp.fc_out",),
        parallel=True,
    ),
    LM(
        "xglm",
        "XGLM",
        GPT
        | {"d_model": WIDTH, "ffn_dim": 48, "num_layers": LAYERS, "attention_heads": 4}
        | {"max_position_embeddings": 128},
        attn="self_attn.out_proj",
        mlp=("fc2",),
    ),
    LM(
        "biogpt",
        "BioGpt",
        GPT
        | {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48}
        | {"max_position_embeddings": 128, "layer_norm_eps": 1e-5},
        layers="biogpt.layers",
        attn="self_attn.out_proj",
        mlp=("fc2",),
    ),
)
