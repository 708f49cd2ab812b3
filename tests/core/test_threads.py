"""Threads and async tasks with different plans on one model do not see each other."""

import asyncio
import contextvars
import sys
import threading
from functools import partial

import pytest
import torch
from helpers.residue import Watch, agrees

from skipguide import Skipper, SkipPlan
from skipguide.active import active_plans
from zoo import BY_NAME

PLANS = (SkipPlan([1]), SkipPlan([2], "mlp"), SkipPlan([0], "attn_identity") | SkipPlan([3], rows=[1]), None)


def run_all(*targets):
    """Run the targets in threads, and raise what any of them raised."""
    errors = []

    def guarded(target):
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def expected(watch, plan):
    if plan is None:
        return watch.plain
    with Skipper(watch.model, plan):
        out = watch.run()
    assert not agrees(out, watch.plain)
    return out


@pytest.mark.parametrize("family", [BY_NAME["ltx"], BY_NAME["hunyuan"]], ids=repr)
def test_each_thread_gets_its_own_result(family):
    """Four threads, one of them without a plan, meet at a barrier before every pass."""
    watch = Watch(family)
    barrier = threading.Barrier(len(PLANS), timeout=600)
    references = [expected(watch, plan) for plan in PLANS]

    def worker(plan, reference):
        def work():
            skipper = None if plan is None else Skipper(watch.model, plan)
            for i in range(12):
                barrier.wait()
                if skipper is None:
                    assert agrees(watch.run(), reference), i
                    continue
                with skipper:
                    assert agrees(watch.run(), reference), i
            assert skipper is None or skipper.stats.passes == 12

        return work

    run_all(*(worker(plan, reference) for plan, reference in zip(PLANS, references, strict=True)))
    watch.same()


def test_one_skipper_in_two_threads():
    watch = Watch(BY_NAME["ltx"])
    skipper = Skipper(watch.model, SkipPlan([1]))
    reference = expected(watch, skipper.plan)
    barrier = threading.Barrier(2, timeout=600)

    def work():
        for _ in range(10):
            barrier.wait()
            with skipper:
                assert agrees(watch.run(), reference)
            assert active_plans() == ()

    run_all(work, work)
    watch.same()


def test_a_plan_installed_elsewhere_does_not_show():
    """The plan stays on in one thread while another one, without a plan, calls the model."""
    watch = Watch(BY_NAME["flux"])
    entered, seen = threading.Event(), threading.Event()

    def with_plan():
        with Skipper(watch.model, SkipPlan([1])):
            entered.set()
            assert seen.wait(30)
            assert not agrees(watch.run(), watch.plain)

    def without_plan():
        assert entered.wait(30)
        assert agrees(watch.run(), watch.plain)
        seen.set()

    run_all(with_plan, without_plan)
    watch.same()


def test_storm_of_enter_and_exit_leaves_nothing():
    """Threads enter, nest, fail and leave without pause, while a plain one keeps calling the model."""
    watch = Watch(BY_NAME["ltx"], batch=1)

    def storm(seed):
        def work():
            generator = torch.Generator().manual_seed(seed)
            for _ in range(200):
                first, second = torch.randint(4, (2,), generator=generator).tolist()
                try:
                    with Skipper(watch.model, SkipPlan([first])), Skipper(watch.model, SkipPlan([second], "attn")):
                        if first == second:
                            raise KeyError
                except KeyError:
                    pass

        return work

    def plain():
        for _ in range(60):
            assert agrees(watch.run(), watch.plain)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        run_all(plain, *(storm(seed) for seed in range(3)))
    finally:
        sys.setswitchinterval(interval)
    watch.same()


def test_a_call_on_its_way_through_a_gate_that_is_removed():
    """A thread has fetched the gated forward; the plan ends before it calls it."""
    watch = Watch(BY_NAME["ltx"])
    with Skipper(watch.model, SkipPlan([1])):
        fetched = watch.model.forward
    with torch.no_grad():
        assert agrees(fetched(**watch.inputs, return_dict=False)[0], watch.plain)
    watch.same()


def test_a_storm_of_passes_on_one_entered_plan():
    """The storm: a server's pool with the plan's context, batches of one to three rows, a plan for the last row."""
    watch = Watch(BY_NAME["ltx"], batch=3)
    plan = SkipPlan([1], rows=[-1]) | SkipPlan([2], "mlp")
    batches = [
        {k: v[-n:] if getattr(v, "shape", (0,))[0] == 3 else v for k, v in watch.inputs.items()} for n in (1, 2, 3)
    ]
    with torch.no_grad(), Skipper(watch.model, plan) as skipper:
        references = [watch.model(**batch, return_dict=False)[0] for batch in batches]
        once = {name: dict(getattr(skipper.stats, name)) for name in ("calls", "rows", "skips", "skipped_rows")}
        contexts = [contextvars.copy_context() for _ in range(3)]

        def work(n):
            for _ in range(10):
                assert agrees(watch.model(**batches[n], return_dict=False)[0], references[n])

        run_all(*(partial(contexts[n].run, torch.no_grad()(partial(work, n))) for n in range(3)))
    assert skipper.stats.passes == 33
    for name, counted in once.items():
        assert getattr(skipper.stats, name) == {key: 11 * value for key, value in counted.items()}, name
    watch.same()


# -- async ------------------------------------------------------------------------------------------------------------


def test_async_tasks_with_different_plans():
    watch = Watch(BY_NAME["ltx"])
    references = [expected(watch, plan) for plan in PLANS]

    async def task(plan, reference):
        for _ in range(4):
            if plan is None:
                await asyncio.sleep(0)
                assert agrees(watch.run(), reference)
                continue
            with Skipper(watch.model, plan):
                await asyncio.sleep(0)
                assert agrees(watch.run(), reference)
                await asyncio.sleep(0)
                assert agrees(watch.run(), reference)

    async def main():
        await asyncio.gather(*(task(plan, ref) for plan, ref in zip(PLANS, references, strict=True)))

    asyncio.run(main())
    watch.same()


def test_a_task_inherits_the_plan_and_loses_it_when_the_block_ends():
    """A task copies the context it was made in; it must not carry a plan beyond the `with` block."""
    watch = Watch(BY_NAME["ltx"])
    inside, other = SkipPlan([1]), SkipPlan([2])
    reference, second = expected(watch, inside), expected(watch, other)

    async def main():
        gone = asyncio.Event()

        async def task():
            assert agrees(watch.run(), reference)
            await gone.wait()
            assert agrees(watch.run(), watch.plain)
            with Skipper(watch.model, other):  # the gates are there again: the old plan must not come back
                assert agrees(watch.run(), second)

        with Skipper(watch.model, inside):
            running = asyncio.create_task(task())
            in_thread = await asyncio.to_thread(watch.run)
            assert agrees(in_thread, reference)
        gone.set()
        await running

    asyncio.run(main())
    watch.same()


def test_a_plan_entered_in_a_context_stays_in_it():
    watch = Watch(BY_NAME["ltx"])
    skipper = Skipper(watch.model, SkipPlan([1]))
    context = contextvars.copy_context()
    reference = expected(watch, skipper.plan)
    context.run(skipper.__enter__)
    assert agrees(watch.run(), watch.plain)
    assert agrees(context.run(watch.run), reference)
    context.run(skipper.__exit__)
    assert agrees(context.run(watch.run), watch.plain)
    watch.same()
