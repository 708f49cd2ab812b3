"""Sublayers left out of a Llama-3-8B shape: reading a prompt, and decoding token by token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from demos.gpu.race import Variant, clear, describe, race, tell
from demos.gpu.setting import Setting
from skipguide.llm import SublayerPlan, UnifiedSkip

VOCABULARY = 128256
PROMPT, TOKENS = 512, 128  # of decoding
BAR = 0.96  # time per decoded token with 3 of 64 sublayers out, relative to the whole model


def build(setting: Setting, tokens: int) -> Any:
    """The model, random, on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    full = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    dry = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=setting.pick(VOCABULARY, 128), num_key_value_heads=setting.pick(8, 2), rope_theta=500000.0,
        max_position_embeddings=tokens, tie_word_embeddings=False, **setting.pick(full, dry),
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = LlamaForCausalLM(config)
    model = model.to(setting.dtype).eval().requires_grad_(False)
    clear()
    return model


def ids(setting: Setting, model: Any, tokens: int) -> torch.Tensor:
    """A prompt."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator).to(setting.device)


def spread(count: int, layers: int) -> tuple[int, ...]:
    """So many layers, evenly, neither the first nor the last."""
    return tuple(sorted({1 + round((i + 0.5) * (layers - 3) / count) for i in range(count)}))


def prefill_plans(layers: int) -> dict[str, Callable[[Any], AbstractContextManager[Any]]]:
    """A quarter of all sublayers: whole layers by Unified's rule, and attention alone as AdaSkip chooses it."""
    unified = UnifiedSkip(speedup=4 / 3, phase="both").plan(layers)
    attention = SublayerPlan(attn=spread(layers // 2, layers))
    return {
        "unified_25": lambda model: unified.apply(model, cached=False),
        "attention_25": lambda model: attention.apply(model, cached=False),
    }


def prefill(setting: Setting, lengths: tuple[int, ...], rounds: int, warm: bool = True) -> dict[str, Any]:
    """Seconds to read prompts of these lengths (with `dry`, of fewer tokens)."""
    lengths = tuple(setting.pick(length, length // 256) for length in lengths)
    model = build(setting, max(lengths))
    layers = model.config.num_hidden_layers
    plans = prefill_plans(layers)
    tell(f"    {sum(p.numel() for p in model.parameters()) / 1e9:.2f} G parameters built")
    prompts = []
    for length in lengths:
        tell(f"    {length} tokens")
        prompt = ids(setting, model, length)

        def work(prompt: torch.Tensor = prompt) -> None:
            with torch.no_grad():
                model(input_ids=prompt, use_cache=False, logits_to_keep=1)

        variants = {"plain": Variant(nullcontext, work)}
        for name, applied in plans.items():
            variants[name] = Variant(lambda applied=applied: applied(model), work)
        try:
            if not warm:  # the kernels, on a prompt that costs nothing
                work(prompt[:, : max(1, length // 32)])
            prompts.append({"tokens": length, "variants": race(setting, variants, setting.pick(rounds, 1), warm)})
        except Exception as error:  # a length that does not fit must not end the others
            prompts.append({"tokens": length, "error": describe(error)})
        clear()
    return {"layers": layers, "share_of_sublayers": 0.25, "prompts": prompts}


def short(setting: Setting) -> dict[str, Any]:
    """Prompts of 4k and 32k tokens."""
    return prefill(setting, (4096, 32768), rounds=4)


def long(setting: Setting) -> dict[str, Any]:
    """A prompt of 128k tokens: a pass takes so long that it is its own warm-up."""
    return prefill(setting, (131072,), rounds=2, warm=False)


def decode(setting: Setting) -> dict[str, Any]:
    """Milliseconds per decoded token: the whole model, and 3 of its 64 sublayers out (of 16, dry)."""
    length, tokens = setting.pick((PROMPT, TOKENS), (8, 4))
    model = build(setting, length + tokens + 1)
    layers = model.config.num_hidden_layers
    prompt = ids(setting, model, length)
    some = spread(3, layers)
    cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # by version
    plans = {
        "plain": nullcontext,
        "attention_3": lambda: SublayerPlan(attn=some).apply(model),
        "mlp_3": lambda: SublayerPlan(mlp=some).apply(model),
    }
    state: dict[str, Any] = {}

    @contextmanager
    def read(plan: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """The prompt is read by the same plan, untimed."""
        with plan(), torch.no_grad():
            out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
            state.update(cache=getattr(out, cache), last=out.logits[:, -1:].argmax(-1))
            yield
        state.clear()

    def work() -> None:
        last = state["last"]
        for _ in range(tokens):
            out = model(input_ids=last, use_cache=True, **{cache: state["cache"]})
            last = out.logits[:, -1:].argmax(-1)

    variants = {name: Variant(lambda plan=plan: read(plan), work) for name, plan in plans.items()}
    found = race(setting, variants, rounds=setting.pick(4, 1))
    for row in found.values():
        if "seconds" in row:
            row["ms_per_token"] = round(1000 * row["seconds"] / tokens, 4)
    return {
        "layers": layers, "prompt": length, "tokens": tokens, "left_out": list(some), "of_sublayers": 2 * layers,
        "share_that_stays": round(1 - 3 / (2 * layers), 4), "bar": BAR, "variants": found,
    }  # fmt: skip
