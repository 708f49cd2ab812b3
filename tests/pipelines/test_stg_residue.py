"""Skip guidance leaves nothing: after an exception, in a cache, after its handle is removed."""

import pytest
import torch
from helpers.stg_reference import LAYER, guided, named

from skipguide import SkipError, find_blocks
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE, PIPES


@named(PIPES)
def test_no_residue_after_an_exception_in_the_model(case):
    pipe = case.build()
    plain = case.run(pipe)
    before = [(name, sorted(m.__dict__)) for name, m in pipe.transformer.named_modules()]
    block = find_blocks(pipe.transformer)[2].module
    handle = block.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), Stg([LAYER]).apply(pipe):
        case.run(pipe)
    handle.remove()
    assert [(name, sorted(m.__dict__)) for name, m in pipe.transformer.named_modules()] == before
    assert torch.equal(case.run(pipe), plain)


def test_a_run_after_an_exception_starts_afresh():
    """An exception between the two calls of a step must not make the next run's first call an unconditional one."""
    case = BY_PIPE["wan"]
    pipe = case.build()
    expected_out, _ = guided(case, Stg([LAYER]), prompts=1)
    block = find_blocks(pipe.transformer)[2].module
    with Stg([LAYER]).apply(pipe):
        handle = block.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            case.run(pipe)
        handle.remove()
        assert torch.equal(case.run(pipe), expected_out)


def test_skipped_pass_has_its_own_cache_context(monkeypatch):
    case = BY_PIPE["wan"]
    pipe = case.build()
    names = []
    original = type(pipe.transformer).cache_context

    def listening(self, name, **where):
        names.append(name)
        return original(self, name, **where)

    monkeypatch.setattr(type(pipe.transformer), "cache_context", listening)
    with Stg([LAYER]).apply(pipe):
        case.run(pipe)
    assert names == ["cond", "skip", "uncond"] * 3
    assert "cache_context" not in pipe.transformer.__dict__


def test_a_handle_is_for_one_block():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    with Stg([1]).apply(pipe) as applied:
        case.run(pipe)
    with pytest.raises(SkipError, match="was removed"), applied:
        case.run(pipe)
