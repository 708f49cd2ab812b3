"""Two threads that run one guided pipeline at once: its scheduler holds one call's place, and both are told so."""

import contextlib
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from skipguide import SkipError
from skipguide.pipelines import SkipGuider
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo import modular
from zoo.pipes import BY_PIPE

AT_ONCE = r"two threads run this \w+ at once, .*one call at a time"


class Paused:
    """Holds a pass of the denoiser until another thread has run, and says when it is there."""

    def __init__(self, module, at):
        self.calls, self.at = 0, at
        self.there, self.go = threading.Event(), threading.Event()
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.calls += 1
        if self.calls - 1 == self.at:
            self.there.set()
            assert self.go.wait(600)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["ltx", "wan", "flux"])
def test_both_are_told(name, at):
    """The first is held in its first step, or in the next, while the second begins."""
    case = BY_PIPE[name]
    pipe = case.build()
    plain = case.run(pipe)
    with Stg([1]).apply(pipe), ThreadPoolExecutor(1) as other:
        expected = case.run(pipe)
        paused = Paused(pipe.transformer.proj_out, at)
        first = other.submit(case.run, pipe)
        assert paused.there.wait(600)
        with pytest.raises(SkipError, match=AT_ONCE):
            case.run(pipe)
        paused.go.set()
        with pytest.raises(SkipError, match=AT_ONCE):
            first.result(600)
        assert torch.equal(case.run(pipe), expected), "one at a time goes on"
        assert torch.equal(other.submit(case.run, pipe).result(600), expected)
        assert torch.equal(case.run(pipe), expected), "from whichever thread"
    assert torch.equal(case.run(pipe), plain)


def test_a_pipeline_and_a_scheduler_for_each_thread():
    """What the error says to do: the denoiser is shared, each is guided in its own way, and both run at once."""
    case = BY_PIPE["ltx"]
    pipe = case.build()
    twin = type(pipe).from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))
    twin.set_progress_bar_config(disable=True)
    assert twin.transformer is pipe.transformer and twin.scheduler is not pipe.scheduler
    with Stg([1]).apply(pipe), Stg([2]).apply(twin), ThreadPoolExecutor(1) as other:
        expected = case.run(pipe), case.run(twin)
        for at in (0, 1, 2):
            paused = Paused(pipe.transformer.proj_out, at)
            first = other.submit(case.run, pipe)
            assert paused.there.wait(600)
            assert torch.equal(case.run(twin), expected[1])
            paused.go.set()
            assert torch.equal(first.result(600), expected[0])
            paused.handle.remove()


def test_a_call_that_was_left_in_another_thread_is_over():
    """Interrupted in the middle, its thread alive or ended: the next call of any thread is a new one."""
    case = BY_PIPE["wan"]
    pipe = case.build()

    def stop(pipe, step, timestep, given):
        raise KeyboardInterrupt

    def interrupted():
        with pytest.raises(KeyboardInterrupt):
            case.run(pipe, callback_on_step_end=stop)

    with Stg([1]).apply(pipe):
        expected = case.run(pipe)
        with ThreadPoolExecutor(1) as other:
            other.submit(interrupted).result(600)
            assert torch.equal(case.run(pipe), expected)
            other.submit(interrupted).result(600)
        assert torch.equal(case.run(pipe), expected)


@pytest.mark.parametrize("at", [0, 1, 3, 4])
def test_under_a_guider(at):
    """The second is refused before it changes anything of the first's run."""
    pipe = modular.build("wan")
    guider = SkipGuider([1]).attach(pipe)
    expected = modular.run(pipe)
    model = pipe.transformer
    with ThreadPoolExecutor(1) as other:
        paused = Paused(model.proj_out, at)
        first = other.submit(modular.run, pipe)
        assert paused.there.wait(600)
        with pytest.raises(SkipError, match="two threads run the pipeline of this SkipGuider at once"):
            modular.run(pipe)
        paused.go.set()
        with contextlib.suppress(Exception):  # its scheduler was begun anew: diffusers may fail, as without a guider
            first.result(600)
        assert torch.equal(modular.run(pipe), expected)
        assert torch.equal(other.submit(modular.run, pipe).result(600), expected)
        assert torch.equal(modular.run(pipe), expected)
    assert guider.stats.passes
