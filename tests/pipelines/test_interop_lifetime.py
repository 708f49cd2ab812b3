"""A pipeline under guidance: callbacks, interrupts, moves, reloads, and others around the same denoiser."""

import copy
import inspect
import re
from contextlib import ExitStack

import diffusers
import pytest
import torch
from helpers.residue import traces
from helpers.stg_reference import SCALES, Reference, close

from skipguide import SkipError, Timetable
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines.registry.described import PIPELINES
from zoo.pipes import BY_PIPE, STEPS

pair = pytest.mark.parametrize("case", [BY_PIPE["ltx"], BY_PIPE["wan"]], ids=repr)


def guided(case, pipe, layers=(1,), settings=None, **call):
    with Stg(list(layers), **(settings or {})).apply(pipe):
        return case.run(pipe, **call)


# -- callbacks --------------------------------------------------------------------------------------------------------


@pair
def test_a_callback_that_changes_latents(case):
    def push(pipe, step, timestep, given):
        return {"latents": given["latents"] + 0.1 * (step + 1)}

    reference = case.build()
    Reference(reference, case, w=SCALES[case.name])
    out = guided(case, case.build(), callback_on_step_end=push)
    close(out, case.run(reference, callback_on_step_end=push))
    assert not torch.allclose(out, guided(case, case.build()), atol=1e-3)


@pair
@pytest.mark.parametrize("rescale", [0.0, 0.7])  # shifted branches need no w, solved ones read it anew at every step
def test_a_callback_that_changes_the_guidance_scale(case, rescale):
    scales = [SCALES[case.name], 2.0, 4.5]
    if case.name == "wan":  # keeps the scale in a local variable: the callback changes nothing, and must not for us
        scales = scales[:1] * 3
    reference = case.build()
    by_hand = Reference(reference, case, w=scales[0], rescale=rescale)

    def next_scale(pipe, step, timestep, given):
        pipe._guidance_scale = 2.0 if step == 0 else 4.5
        if pipe is reference and step + 1 < len(scales):
            by_hand.w = scales[step + 1]
        return given

    expected = case.run(reference, callback_on_step_end=next_scale)
    pipe = case.build()
    close(guided(case, pipe, settings={"rescale": rescale}, callback_on_step_end=next_scale), expected)
    if case.name == "ltx":
        assert not torch.allclose(guided(case, pipe, settings={"rescale": rescale}), expected, atol=1e-3)


def test_what_pipelines_keep_to_themselves_is_in_the_registry():
    """Whether a callback reaches the scale and the CFG switch, read off every pipeline's own source."""
    looked_at = 0
    for name, spec in PIPELINES.items():
        call = vars(getattr(diffusers, name, object)).get("__call__")
        source = inspect.getsource(call) if inspect.isfunction(call) else ""  # else a part of diffusers is missing here
        scales = set(re.findall(r"([\w.]*guidance_scale\w*) \* \(", source))
        reads_the_variable = any(name.startswith("call.") for names in spec.scales for name in names)
        keeps_it = spec.scales == ((),) and spec.switch.startswith("call.")  # nothing of it is read off the pipeline
        if spec.cfg not in ("batched", "two_calls") or not scales or reads_the_variable or keeps_it:
            continue
        looked_at += 1
        copied = "current_guidance_scale = self.guidance_scale" in source
        attribute = copied or any(scale.startswith("self.") for scale in scales)
        assert ("w" in spec.kept) == (not attribute), (name, scales)
        # in a variable of its own, or by the call's argument, which no callback reaches
        by_itself = r"^\s+do_classifier_free_guidance = |\* 2\) if guidance_scale > 1 "
        decided = re.search(by_itself, source, flags=re.MULTILINE) is not None
        assert ("cfg" in spec.kept) == decided, name
    assert looked_at >= 9


def test_a_callback_that_turns_cfg_off():
    """As diffusers' SDXLCFGCutoffCallback does: the scale to 0, and the conditional half of the embeddings."""
    case = BY_PIPE["sd3"]
    names = ["prompt_embeds", "pooled_prompt_embeds"]

    def cut(pipe, step, timestep, given):
        if step == 0:
            pipe._guidance_scale = 0.0
            return {name: given[name][-1:] for name in names}
        return {}

    call = {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": names}
    reference = case.build()
    by_hand = Reference(reference, case, w=SCALES["sd3"])

    def hand(*args, **kwargs):
        by_hand.mode = "batched" if len(kwargs["hidden_states"]) == 2 else "single"
        return by_hand(*args, **kwargs)

    reference.transformer.forward = hand
    close(guided(case, case.build(), **call), case.run(reference, **call))


# -- interrupts -------------------------------------------------------------------------------------------------------


@pair
@pytest.mark.parametrize("at", [0, 1])
def test_an_interrupted_run_ends_and_the_next_one_is_whole(case, at):
    def stop(pipe, step, timestep, given):
        pipe._interrupt = step >= at
        return given

    pipe = case.build()
    expected = guided(case, pipe)
    with Stg([1]).apply(pipe) as applied:
        half = case.run(pipe, callback_on_step_end=stop)
        passes = applied.stats.passes
        again = case.run(pipe)
    assert passes == (at + 1) * applied.stats.passes // (at + 1 + 3)
    assert torch.equal(again, expected) and not torch.equal(half, expected)
    short = case.build()
    close(half, guided(case, short, callback_on_step_end=stop))


def test_an_interrupt_with_differences_to_use_again():
    """The difference of the run that was stopped must not be used in the next one."""
    case = BY_PIPE["wan"]

    def stop(pipe, step, timestep, given):
        pipe._interrupt = True
        return given

    expected = guided(case, case.build(), settings={"every": 2})
    pipe = case.build()
    with Stg([1], every=2).apply(pipe):
        case.run(pipe, callback_on_step_end=stop)
        assert torch.equal(case.run(pipe), expected)


# -- moves and reloads ------------------------------------------------------------------------------------------------


@pair
def test_the_pipeline_changes_its_dtype_between_calls(case):
    given = case.call_kwargs()
    wide = [name for name, value in given.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    call = {name: given[name].bfloat16() for name in wide}
    pipe = case.build()
    first = guided(case, pipe)
    with Stg([1]).apply(pipe):
        assert torch.equal(case.run(pipe), first)
        pipe.to(torch.bfloat16)
        narrow = case.run(pipe, **call)
        pipe.to(torch.float32)
        again = case.run(pipe)
    rounded = case.build().to(torch.bfloat16)
    assert torch.equal(narrow, guided(case, rounded, **call))
    rounded.to(torch.float32)  # the weights were rounded on the way
    assert torch.equal(again, guided(case, rounded))


@pair
def test_the_pipeline_is_reloaded_from_its_files(case, tmp_path):
    pipe = case.build()
    expected = guided(case, pipe)
    with Stg([1]).apply(pipe):
        pipe.transformer.save_pretrained(tmp_path)
        assert torch.equal(case.run(pipe), expected), "saving has disturbed the guidance"
    plain = case.run(pipe)
    pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path).eval()
    close(case.run(pipe), plain)
    close(guided(case, pipe), expected)  # weights that lie elsewhere in memory are multiplied by other kernels


def test_new_weights_in_the_same_model():
    case = BY_PIPE["wan"]
    pipe, other = case.build(), case.build(seed=5)
    expected = guided(case, other)
    with Stg([1]).apply(pipe):
        case.run(pipe)
        pipe.transformer.load_state_dict(other.transformer.state_dict())
        assert torch.equal(case.run(pipe), expected)


def test_a_reload_inside_the_block_is_reported(caplog):
    case = BY_PIPE["wan"]
    pipe = case.build()
    with Stg([1]).apply(pipe):
        case.run(pipe)
        pipe.transformer = case.build(seed=5).transformer
        case.run(pipe)
    assert "pipe.transformer was exchanged" in caplog.text


@pair
def test_a_copy_of_a_pipeline_under_guidance_is_plain(case):
    pipe = case.build()
    plain = case.run(pipe)
    stock = copy.deepcopy(pipe.transformer)
    with Stg([1]).apply(pipe):
        clone = copy.deepcopy(pipe.transformer)
        whole = copy.deepcopy(pipe)
    for copied in (clone, whole.transformer):
        for module, twin in zip(copied.modules(), stock.modules(), strict=True):
            assert set(module.__dict__) == set(twin.__dict__)
    assert torch.equal(case.run(whole), plain)
    other = case.build(seed=5)
    other.transformer = clone
    assert torch.equal(case.run(other), plain)
    assert "cache_context" not in pipe.transformer.__dict__


# -- several pipelines around one denoiser ----------------------------------------------------------------------------


def two(case, scheduler=False):
    """Two pipelines that share the denoiser, and the scheduler too if asked to."""
    first, second = case.build(), case.build()
    second.transformer = first.transformer
    if scheduler:
        second.scheduler = first.scheduler
    return first, second


@pair
@pytest.mark.parametrize("scheduler", [False, True])
def test_guidance_on_one_of_two_pipelines(case, scheduler):
    """The other one's calls are plain, whatever came before them; with and without CFG, with other step counts."""
    first, second = two(case, scheduler)
    plain, short = case.run(second), case.run(second, cfg=False, num_inference_steps=2)
    expected = guided(case, case.build())
    before = traces(first.transformer)

    def stop(pipe, step, timestep, given):
        pipe._interrupt = True
        return given

    with Stg([1]).apply(first) as applied:
        assert torch.equal(case.run(second), plain)
        assert torch.equal(case.run(first), expected)
        passes = applied.stats.passes
        assert torch.equal(case.run(second, cfg=False, num_inference_steps=2), short)
        case.run(first, callback_on_step_end=stop)
        assert torch.equal(case.run(second, cfg=False, num_inference_steps=2), short)
        assert torch.equal(case.run(second, prompts := 2), case.run(second, prompts))
        assert torch.equal(case.run(first), expected)
    assert applied.stats.passes == passes * 2 + passes // 3
    assert traces(first.transformer) == before


@pair
def test_guidance_on_both_pipelines(case):
    first, second = two(case)
    settings = {"first": ([1], {}), "second": ([2], {"scale": 2.0, "part": "attn"})}
    expected = {name: guided(case, case.build(), *each) for name, each in settings.items()}
    plain = case.run(first)
    before = traces(first.transformer)
    for leaver in (0, 1):
        handles = [Stg([1]).apply(first), Stg([2], scale=2.0, part="attn").apply(second)]
        for _ in range(2):
            assert torch.equal(case.run(first), expected["first"])
            assert torch.equal(case.run(second), expected["second"])
        handles.pop(leaver).remove()
        stays, leaves = (second, first) if leaver == 0 else (first, second)
        assert torch.equal(case.run(stays), expected["second" if leaver == 0 else "first"])
        assert torch.equal(case.run(leaves), plain)
        handles.pop().remove()
        assert traces(first.transformer) == before


@pytest.mark.parametrize("name", ["ltx", "wan", "flux_true_cfg", "hunyuan_true_cfg"])
def test_one_pipeline_runs_in_the_other_ones_callback(name):
    """As a preview would; both are guided, each in its own way."""
    case = BY_PIPE[name]
    first, second = two(case)
    alone = guided(case, case.build()), guided(case, case.build(), layers=[2], num_inference_steps=2)
    seen = []

    def preview(pipe, step, timestep, given):
        seen.append(case.run(second, num_inference_steps=2))
        return given

    with Stg([1]).apply(first), Stg([2]).apply(second):
        out = case.run(first, callback_on_step_end=preview)
    assert torch.equal(out, alone[0])
    assert len(seen) == 3
    assert all(torch.equal(each, alone[1]) for each in seen)


@pytest.mark.parametrize("name", ["ltx", "wan"])
def test_guidance_that_begins_in_a_callback(name):
    """The same at every step, it begins there; what goes by the step would take the next one for the first."""
    case = BY_PIPE[name]
    pipe = case.build()
    with Stg([1], start=1 / STEPS).apply(pipe):
        expected = case.run(pipe)

    def beginning(stg):
        handles = []

        def at_step_end(pipe, step, timestep, tensors):
            if step == 0:
                handles.append(stg.apply(pipe))
            return tensors

        try:
            return case.run(pipe, callback_on_step_end=at_step_end)
        finally:
            for handle in handles:
                handle.remove()

    assert torch.equal(beginning(Stg([1])), expected)
    for stg in (Stg([1], start=0.5), Stg([1], every=2), Stg([1], scale=Timetable([(0.0, 1.0)])), Stg([1], stop=0.5)):
        with pytest.raises(SkipError, match="before calling the pipeline"):
            beginning(stg)


def test_a_second_guidance_on_the_same_pipeline_is_refused():
    case = BY_PIPE["wan"]
    first, second = two(case)
    with ExitStack() as stack:
        stack.enter_context(Stg([1]).apply(first))
        with pytest.raises(SkipError, match="already applied"):
            Stg([2]).apply(first)
        stack.enter_context(Stg([2]).apply(second))
        with pytest.raises(SkipError, match="already applied"):
            Stg([1]).apply(second)
