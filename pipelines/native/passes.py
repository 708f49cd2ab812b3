"""Passes: one denoiser's forwards that keep activations, start from kept ones, or share the beginning of some rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from skipguide.active import Call
from skipguide.arguments import batch_size
from skipguide.blocks import find_blocks
from skipguide.hosts.diffusers_caches import Reach
from skipguide.pipelines.native.stats import ReuseStats, enter_pass
from skipguide.pipelines.native.variants import Place
from skipguide.pipelines.sampling.missing_blocks import BlockCount
from skipguide.pipelines.sampling.standing import Standing
from skipguide.plan import SkipPlan
from skipguide.prefix import Prefix
from skipguide.skipper import Skipper

KEPT = 16  # passes that stay ready


class ReusePasses:
    """The forwards of one denoiser in one thread: what they hold of a pass is no other thread's.

    Args:
        model: the denoiser.
        stats: the ledger.
    """

    def __init__(self, model: nn.Module, stats: ReuseStats) -> None:
        self.model = model
        self.stats = stats
        self.map = find_blocks(model)
        self.count = BlockCount(model, [block.name for block in self.map])
        self.bare = Skipper(model, SkipPlan())
        self.reach = Reach()  # of the cache on the model
        self._ready: OrderedDict[Any, tuple[Skipper, tuple[Prefix, ...]]] = OrderedDict()
        self._standing = Standing()
        self._over = False  # taken away, maybe by another thread in the middle of a pass

    # -- installation -------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the gates in place."""
        self._over = False
        self._standing.install(self.bare)

    def remove(self) -> None:
        """Take everything away again; a pass that is running in another thread takes away its own at its end."""
        self._over = True
        self._standing.remove()
        self._ready.clear()

    def move_in_front(self, model: nn.Module) -> None:
        """Put the gates in front of what came since, and look anew whether blocks run inside a compiled graph.

        Args:
            model: the pipeline's denoiser as it is now.
        """
        self.count.renew(model)
        self.bare.move_in_front()

    def _kept_ready(self, key: Any, make: Any) -> tuple[Skipper, tuple[Prefix, ...]]:
        if key not in self._ready:
            made = make()
            self._standing.install(made[0])
            self._ready[key] = made
            if len(self._ready) > KEPT:
                _, (old, _) = self._ready.popitem(last=False)
                self._standing.remove(old)
        self._ready.move_to_end(key)
        return self._ready[key]

    # -- passes -------------------------------------------------------------------------------------------------

    def whole(self, call: Call, args: Any, kwargs: Any, left_out: frozenset[int] = frozenset()) -> Any:
        """A pass as the pipeline makes it.

        Args:
            call: the denoiser.
            args: of the call.
            kwargs: of the call.
            left_out: blocks that the denoiser itself leaves out.
        """
        plain = (len(self.map) - len(left_out)) * batch_size(args, kwargs)
        return self._pass(self.bare, call, args, kwargs, plain, plain)[0]

    def keeping(self, places: Sequence[Place], call: Call, args: Any, kwargs: Any) -> tuple[Any, dict[Place, Prefix]]:
        """A plain pass, and the activations at some places; none where the blocks were not all called.

        Where a cache answered behind the blocks that it goes by, a pass can start from behind those.
        """
        first = self.reach.first

        def make() -> tuple[Skipper, tuple[Prefix, ...]]:
            prefixes = tuple(
                Prefix(place.layer, sublayers=place.common, heard=self._heard(place.layer)) for place in places
            )
            return Skipper(self.model, SkipPlan(), capture=prefixes), prefixes

        skipper, prefixes = self._kept_ready(("keep", tuple(places), first), make)
        plain = len(self.map) * batch_size(args, kwargs)
        try:
            out, ran = self._pass(skipper, call, args, kwargs, plain, plain)
            if ran < plain:  # something answers in place of blocks
                behind = zip(places, prefixes, strict=True) if first else ()
                return out, {
                    place: Prefix(first, {}, dict(prefix.kept), prefix.source, (), prefix.heard)
                    for place, prefix in behind
                    if prefix.heard and prefix.kept
                }
            taken = {
                place: Prefix(
                    place.layer, dict(prefix.streams), dict(prefix.kept), prefix.source, prefix.sublayers, prefix.heard
                )
                for place, prefix in zip(places, prefixes, strict=True)
            }
            return out, taken
        finally:
            for prefix in prefixes:
                prefix.clear()

    def _heard(self, layer: int) -> tuple[int, ...]:
        first = self.reach.first
        return (first - 1,) if 0 < first <= layer else ()

    def resumed(self, prefix: Prefix, layer: int, left_out: frozenset[int], call: Call, args: Any, kwargs: Any) -> Any:
        """A pass from kept activations on.

        Args:
            prefix: the activations of the rows of this call.
            layer: the first block that runs with them.
            left_out: blocks that the denoiser itself leaves out.
            call: the denoiser.
            args: of the call.
            kwargs: of the call.

        Raises:
            SkipError: if another number of blocks ran.
        """
        layer = layer if prefix.streams else prefix.layer

        def make() -> tuple[Skipper, tuple[Prefix, ...]]:
            own = Prefix(layer, source=prefix.source, sublayers=prefix.sublayers, heard=prefix.heard)
            return Skipper(self.model, SkipPlan(), resume=own), (own,)

        skipper, (own,) = self._kept_ready(("resume", layer, prefix.sublayers, prefix.heard), make)
        rows, blocks = batch_size(args, kwargs), len(self.map)
        planned = (blocks - layer - sum(each >= layer for each in left_out)) * rows
        own.clear()
        own.fill(prefix)
        try:
            plain = (blocks - len(left_out)) * rows
            return self._pass(skipper, call, args, kwargs, planned, plain, len(prefix.sublayers), check=True)[0]
        finally:
            own.clear()

    def sharing(self, start: int, sources: Mapping[int, int], call: Call, args: Any, kwargs: Any) -> Any:
        """A pass in which some rows get what others got, before a block.

        Args:
            start: that block.
            sources: row -> the row whose results it gets.
            call: the denoiser.
            args: of the call.
            kwargs: of the call.

        Raises:
            SkipError: if another number of blocks ran.
        """
        batch = batch_size(args, kwargs)
        rows = tuple(sources.get(row, row) for row in range(batch))

        def make() -> tuple[Skipper, tuple[Prefix, ...]]:
            return Skipper(self.model, SkipPlan(), share=dict.fromkeys(range(start), rows)), ()

        skipper, _ = self._kept_ready(("share", start, rows), make)
        plain = len(self.map) * batch
        return self._pass(skipper, call, args, kwargs, plain - start * len(sources), plain, check=True)[0]

    def _pass(
        self,
        skipper: Skipper,
        call: Call,
        args: Any,
        kwargs: Any,
        planned: int,
        plain: int,
        sublayers: int = 0,
        check: bool = False,
    ) -> tuple[Any, int]:
        """A pass under a plan, entered in the ledger: what the denoiser gave, and how many blocks ran."""
        before = self._rows(skipper)
        try:
            with skipper.running():
                out = call(*args, **kwargs)
        finally:
            if self._over:
                skipper.remove()
        ran = self._rows(skipper) - before
        if check and ran != planned and not (self.reach.blocks and ran < planned):  # fewer: a cache has answered
            self.count.refuse(ran, planned, "a pass that starts from activations of an earlier one")
        ran = planned if self.count.unseen else ran
        enter_pass(self.stats, ran, plain, sublayers, planned - ran if self.reach.blocks else 0)
        return out, ran

    def _rows(self, skipper: Skipper) -> int:
        rows = skipper.stats.rows
        return sum(rows.get(name, 0) for name in self.count.names)
