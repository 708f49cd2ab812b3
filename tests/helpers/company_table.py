"""What goes together with skip guidance and what does not, as data: pipelines/README.md has it as a list and a table.

`python tests/helpers/company_table.py` prints them. Every row of the table has a function that brings its error about.
"""

import functools
import pickle
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import diffusers
import torch
from helpers.cache_cases import CACHE_CASES, ELSEWHERE, FAMILIES
from helpers.stateful_forward import keep_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from skipguide import Skipper, SkipPlan
from skipguide.pipelines import PassSchedule, PassStep, PrefixReuse, SkipGuider
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import MODELS

TOGETHER = {
    "LoRA through peft": "loaded, weighted, fused, unfused and unloaded before, during or after `apply`",
    "torchao int8, bitsandbytes 8 and 4 bit": "quantised before or during",
    "Offloading": "model, sequential, disk and group offload (groups of one or several blocks, leaves), enabled before "
    "`apply`, model and group offload also during; nothing is loaded for a block that is skipped or comes before the "
    "first one",
    "`torch.compile`": "repeated blocks, the whole model in place, or wrapped; a second run compiles nothing again",
    "Attention backends": "tested with torch's own, its math kernel and flex; `attn_identity` of joint attention uses "
    "torch's own in the block that it changes, whatever is set",
    "Caches": "FirstBlockCache, MagCache, SeaCache, TaylorSeer, Pyramid Attention Broadcast and FasterCache of "
    "diffusers and cache-dit 1.5 (enabled before or during; for Flux before), TeaCache as published (before): every "
    "branch has a state of its own, and the cache decides for each by itself. A skipped pass still begins where it "
    "differs, and one that is answered costs nothing; only under FasterCache with CFG, DBPrune, and cache-dit on "
    "models with two lists of blocks it runs from the beginning. The same under `SkipGuider`. Which goes with which "
    "model: [below](#caches-and-models)",
    "Context parallelism": "Ulysses, tested with Wan and Flux on two processes: the result of one",
    "Callbacks and interrupts": "`callback_on_step_end` may change latents, embeddings and the guidance scale; a run "
    "that was interrupted leaves nothing for the next one",
    "`pipe.to(...)`, new weights": "between calls inside the `with` block",
    "Several pipelines around one denoiser": "one of them guided or each in its own way, in turn or one in a callback "
    "of the other; also from other threads",
}


@dataclass(frozen=True)
class Apart:
    """Something that does not work together.

    Args:
        what: the two.
        error: words of the error that the user sees.
        instead: what to do.
        provoke: brings the error about, given a function that makes a tiny pipeline by name and one that runs it.
    """

    what: str
    error: str
    instead: str
    provoke: Callable[..., None]


def cached(name: str, **settings):
    """Apply to a Wan pipeline that has the hooks of that cache."""
    configs = {
        "fbc_leader_block_hook": diffusers.FirstBlockCacheConfig(),
        "mag_cache_leader_block_hook": diffusers.MagCacheConfig(mag_ratios=[1.0] * 3, num_inference_steps=3),
        "taylorseer_cache": diffusers.TaylorSeerCacheConfig(cache_identifiers=[r"blocks\.\d+\.attn1"]),
    }

    def provoke(make, run):
        model = (pipe := make("wan")).transformer
        if name in configs:
            model.enable_cache(configs[name])
        else:
            registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model)
            registry.register_hook(diffusers.hooks.ModelHook(), name)
        Stg(**({"layers": [1]} | settings)).apply(pipe)

    return provoke


def cache_dit(make, run):
    pipe = make("wan")
    pipe._is_cached = True
    Stg([1]).apply(pipe)


def late_cache_dit(make, run):
    """What stands in front of guidance then: a forward that keeps the one before, and a manager of contexts."""
    pipe = make("wan")
    with Stg([1]).apply(pipe):
        model = pipe.transformer
        inner = model.forward
        model.forward = functools.wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))
        manager = types.SimpleNamespace(_cached_context_manager={}, _current_context=None)
        model._original_forward, model._context_manager, model._is_cached = inner, manager, True
        run("wan", pipe)


def faster_cache(make, run):
    pipe = make("cogvideox")
    pipe.transformer.enable_cache(faster_config())
    Stg([1], formula="uncond").apply(pipe)


def faster_config():
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        current_timestep_callback=lambda: 500,
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BFCHW",
    )


def alternating_teacache(make, run):
    """The attributes that its script for Wan 2.1 puts on the class."""
    pipe = make("wan")
    pipe.transformer.enable_teacache, pipe.transformer.previous_residual_even = True, None
    pipe.transformer.forward = types.MethodType(lambda self, *args: self.enable_teacache, pipe.transformer)
    Stg([1]).apply(pipe)


def late_adapter(make, run):
    from peft import LoraConfig

    pipe = make("hunyuan")
    with Stg([4], part="mlp").apply(pipe):
        run("hunyuan", pipe)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["proj_mlp"]))
        run("hunyuan", pipe)


def late_unhook(make, run):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    pipe = make("wan")
    add_hook_to_module(pipe.transformer.blocks[1], ModelHook())
    with Stg([1]).apply(pipe):
        remove_hook_from_module(pipe.transformer.blocks[1])
        run("wan", pipe)


def own_attention(make, run):
    pipe = make("cogvideox")
    pipe.transformer.transformer_blocks[1].attn1.processor = lambda attn, hidden_states, encoder_hidden_states, **_: (
        hidden_states,
        encoder_hidden_states,
    )
    with Stg([1], part="attn_identity").apply(pipe):
        run("cogvideox", pipe)


def parallel_identity(make, run):
    model = make("flux").transformer
    model.transformer_blocks[1].attn.processor._parallel_config = object()  # as enable_parallelism does
    with Skipper(model, SkipPlan([1], "attn_identity")):
        MODELS["flux"].run(model, MODELS["flux"].inputs(1))


def pickled(make, run):
    with Skipper(model := make("wan").transformer, SkipPlan([1])):
        pickle.dumps(model)


def guider(make, run):
    pipe = make("hunyuan15")
    pipe.guider = diffusers.AdaptiveProjectedGuidance()
    Stg([1]).apply(pipe)


def guider_step(model):
    """As the loop of a pipeline begins a step."""
    skips = SkipGuider([1], guidance_scale=1.0)
    skips.set_state(0, 1, torch.tensor(1.0))
    batches = skips.prepare_inputs({})
    skips.prepare_models(model)
    return batches


def guider_and_faster_cache(make, run):
    model = make("wan").transformer
    model.enable_cache(faster_config())
    guider_step(model)


def guider_and_guidance(make, run):
    pipe = make("wan")
    with Stg([1]).apply(pipe):
        guider_step(pipe.transformer)


def parallel_branches(cache=None, **settings):
    """Apply with branch_parallel, as one of two processes."""

    def provoke(make, run):
        pipe = make("wan")
        if cache is not None:
            pipe.transformer.enable_cache(cache)
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        try:
            Stg([1], **settings).apply(pipe, branch_parallel=True)
        finally:
            torch.distributed.destroy_process_group()

    return provoke


def twice(make, run):
    pipe = make("wan")
    with Stg([1]).apply(pipe):
        Stg([2]).apply(pipe)


def over_native(make, run):
    pipe = make("sd3")
    pipe.transformer.register_forward_pre_hook(  # as the pipeline's third pass does
        lambda model, args, kwargs: (args, {**kwargs, "skip_layers": [2]}), with_kwargs=True
    )
    with Stg([1]).apply(pipe):
        run("sd3", pipe)


def reused(make, run):
    pipe = make("wan")
    with PrefixReuse().apply(pipe):
        Stg([1]).apply(pipe)


def by_hand(make, run):
    pipe = make("wan")
    with Stg([1]).apply(pipe):
        run("wan", pipe)
        MODELS["wan"].run(pipe.transformer, MODELS["wan"].inputs(1))


def in_two_threads(make, run):
    pipe = make("wan")
    with Stg([1]).apply(pipe), ThreadPoolExecutor(1) as other:
        pipe.transformer.proj_out.register_forward_pre_hook(lambda *args: other.submit(run, "wan", pipe).result())
        run("wan", pipe)


def stateful(make, run):
    pipe = make("ltx")
    keep_state(pipe.transformer, ("transformer_blocks",))
    with Stg([1]).apply(pipe):
        run("ltx", pipe)


def own_loop(make, run):
    class Mine(diffusers.WanPipeline):
        def __call__(self, **call):
            return MODELS["wan"].run(self.transformer, MODELS["wan"].inputs(1))

    pipe = make("wan")
    pipe.__class__ = Mine
    with Stg([1]).apply(pipe):
        pipe()


def late_forward(make, run):
    pipe = make("wan")
    with Stg([1]).apply(pipe):
        pipe.transformer.forward = types.MethodType(type(pipe.transformer).forward, pipe.transformer)
        run("wan", pipe)


def folded_input(make, run):
    pipe = make("wan")

    def more(module, args, kwargs):
        return args, kwargs | {"encoder_hidden_states": torch.cat([kwargs["encoder_hidden_states"]] * 2)}

    pipe.transformer.register_forward_pre_hook(more, with_kwargs=True)
    with Stg([1], tail="batched").apply(pipe):
        run("wan", pipe)


DISABLE = "`pipe.transformer.disable_cache()`"
APART = (
    Apart(
        "A cache that found no block and no attention layer (TaylorSeer's defaults on LTX, Wan and CogVideoX; "
        "TextKVCache on all but NucleusMoE, which is not described)",
        "none of its hooks is on a block or an attention layer",
        "identifiers that match, as `cache_identifiers`",
        cached("text_kv_cache_transformer"),
    ),
    Apart(
        'FasterCache with CFG, and `formula="uncond"`',
        "leaves blocks out in these very rows",
        "another formula",
        faster_cache,
    ),
    Apart(
        "FasterCache with CFG, and `SkipGuider`",
        "a guider has a pass for each",
        "`is_guidance_distilled=True`",
        guider_and_faster_cache,
    ),
    Apart(
        "cache-dit that is enabled after `apply`, where it keeps the forward elsewhere than 1.5 does",
        "enable it first, then apply",
        "as it says",
        late_cache_dit,
    ),
    Apart(
        "cache-dit of another version than 1.5 that keeps its contexts elsewhere",
        "its contexts are not where version 1.5 keeps them",
        "`cache_dit.disable_cache(pipe)`",
        cache_dit,
    ),
    Apart(
        "TeaCache for Wan 2.1, Cosmos and Lumina 2, whose forwards keep several states",
        "takes every second call for the unconditional one",
        "cache-dit or FirstBlockCache",
        alternating_teacache,
    ),
    Apart(
        "FirstBlockCache, and block 0 skipped",
        "it decides by what block 0 adds to its input, and block 0 is to be skipped",
        "other layers, or a sublayer of block 0",
        cached("fbc_leader_block_hook", layers=[0]),
    ),
    Apart(
        "MagCache or TeaCache, and a skipped pass at some steps only",
        "it counts passes as steps",
        "`every=1`, no window, no timetable",
        cached("mag_cache_leader_block_hook", every=2),
    ),
    Apart(
        "A cache, and `cfg_interval` or `segmented`",
        "cfg_interval leaves passes of the pipeline out",
        f"{DISABLE}, or CFG at every step",
        cached("taylorseer_cache", cfg_interval=(0.0, 0.5)),
    ),
    Apart(
        "A cache, and `cfg_every`",
        "cfg_every leaves passes of the pipeline out",
        f"{DISABLE}, or `cfg_every=1`",
        cached("taylorseer_cache", cfg_every=2),
    ),
    Apart(
        "A cache, and a `schedule`",
        "schedule leaves passes of the pipeline out",
        f"{DISABLE}, or leave the schedule out",
        cached("taylorseer_cache", schedule=PassSchedule([PassStep()] * 2)),
    ),
    Apart(
        'A cache, and `formula="uncond"` in a window',
        "whose cache would mix skipped and plain steps",
        "`start=0, stop=1`",
        cached("taylorseer_cache", formula="uncond", start=0.5),
    ),
    Apart(
        'A cache, and `tail="batched"`',
        "tail='batched' changes the batch that the cache sees",
        '`tail="separate"`',
        cached("taylorseer_cache", tail="batched"),
    ),
    Apart(
        "An adapter on a Linear that is itself skipped, added during",
        "is now another module",
        "add the adapter before `apply`",
        late_adapter,
    ),
    Apart(
        "A hook that was there before and is taken off during",
        "Apply skip plans after hooks, caches and offloading are set up, and remove them before those are removed",
        "as it says",
        late_unhook,
    ),
    Apart(
        "`attn_identity` of joint attention, and context parallelism",
        "context parallelism deals them out",
        '`part="block"` or `"attn"`',
        parallel_identity,
    ),
    Apart(
        "`attn_identity` of joint attention, and an attention processor of your own",
        "saw no call of torch's scaled_dot_product_attention",
        '`part="block"`',
        own_attention,
    ),
    Apart("Pickling a model with an active plan", "this model has an active plan", "`save_pretrained`", pickled),
    Apart(
        "A guider that is not `ClassifierFreeGuidance`",
        "expected pipe.guider to be ClassifierFreeGuidance",
        "`SkipGuider` in its place",
        guider,
    ),
    Apart(
        "`SkipGuider`, and `SpatiotemporalSkipGuidance` on its denoiser",
        "is applied to this denoiser: remove() it, or the guider",
        "one of them",
        guider_and_guidance,
    ),
    Apart(
        "`branch_parallel`, and a cache",
        "and branch_parallel do not work together",
        DISABLE,
        parallel_branches(diffusers.FirstBlockCacheConfig()),
    ),
    Apart(
        '`branch_parallel`, and `formula="uncond"` or another `tail`',
        "branch_parallel runs the skipped passes elsewhere",
        '`tail="separate"`, another formula',
        parallel_branches(tail="batched"),
    ),
    Apart(
        "The pipeline's own skip guidance in the same call",
        "makes a skip-guidance pass of its own in this call",
        "turn it off in the call; `PrefixReuse`; `over_native=True`",
        over_native,
    ),
    Apart("`PrefixReuse` on the same pipeline", "PrefixReuse is applied to this denoiser", "one of them", reused),
    Apart("Two guidances on one pipeline", "guidance is already applied", "`groups`, or `remove()` first", twice),
    Apart(
        "Another forward that keeps state between calls (ParaAttention, WaveSpeed)",
        "its forward keeps state between calls",
        "take it off; FirstBlockCache or MagCache",
        stateful,
    ),
    Apart(
        "A subclass of a described pipeline with a loop of its own",
        "guidance follows the loop",
        "`register_pipeline`",
        own_loop,
    ),
    Apart(
        "Another forward on the denoiser while guidance is on",
        "the gate on WanTransformer3DModel was replaced",
        "put it there before `apply`",
        late_forward,
    ),
    Apart(
        '`tail="batched"`, and an input that folds further rows into the batch',
        "is not the batch",
        '`tail="separate"` or `"auto"`',
        folded_input,
    ),
    Apart(
        "Calling the denoiser yourself while guidance is on",
        "is it called by something that is not a pipeline",
        "`Skipper`, or `remove()` first",
        by_hand,
    ),
    Apart(
        "One pipeline in two threads at once",
        "two threads run this WanPipeline at once",
        "one call at a time, or each thread its own pipeline and scheduler: "
        "`from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))`",
        in_two_threads,
    ),
)


def text() -> str:
    """The list and the table, in Markdown."""
    lines = [f"- **{what}**: {how}." for what, how in TOGETHER.items()]
    lines += ["", "| does not go together | the error says | do instead |", "|---|---|---|"]
    lines += [f"| {each.what} | … {each.error} … | {each.instead} |" for each in APART]
    return "\n".join([*lines, "", *caches_and_models()])


def caches_and_models() -> list[str]:
    """Which caches go with which models, from the table that the laws are tested on."""
    lines = ["### Caches and models", "", f"| | {' | '.join(FAMILIES)} |", "|---|" + "---|" * len(FAMILIES)]
    notes: list[str] = []
    for cache, case in (CACHE_CASES | ELSEWHERE).items():
        cells = []
        for family in FAMILIES:
            why = case.notes.get(family) or case.absent.get(family)
            if why is not None and why not in notes:
                notes.append(why)
            mark = "" if why is None else f" ({notes.index(why) + 1})"
            cells.append(("—" if family in case.absent else "yes") + mark)
        lines.append(f"| {cache} | {' | '.join(cells)} |")
    return [*lines, "", *(f"{number}. {why[:1].upper()}{why[1:]}." for number, why in enumerate(notes, 1))]


if __name__ == "__main__":
    print(text())
