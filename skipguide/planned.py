"""Planned interventions: what happens at which module, from a plan, prefixes to capture and one to resume from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from weakref import ref

from torch import nn

from skipguide.active import Intervention
from skipguide.blocks import Block, BlockMap
from skipguide.errors import SkipError
from skipguide.interventions import LeaveOutKeys, Nested, OnRows, ReturnInput, SkipBlock, When
from skipguide.parts import PART_SPECS
from skipguide.perturbations.at_parts import AT_PARTS
from skipguide.plan import SkipPlan
from skipguide.prefix import Capture, Inject, Keep, Prefix, Replay
from skipguide.schedule import Schedule
from skipguide.stats import Stats


class PlannedInterventions:
    """Collects the interventions of a plan, module by module."""

    def __init__(self, blocks: BlockMap, stats: Stats) -> None:
        self.blocks = blocks
        self.stats = stats
        self.interventions: dict[int, Intervention] = {}
        self.windows: dict[str, Schedule] = {}
        # every block has a gate, for the ledger and to notice a lost one
        self.modules: dict[str, nn.Module] = {block.name: block.module for block in blocks}
        self.needs_grid = False  # whether something goes by where the tokens lie
        self.helpers: set[str] = set()  # of the modules, those that are not a part of the ledger

    def add(self, module: nn.Module, name: str, added: Intervention) -> None:
        """Put an intervention at a module, inside those that are there."""
        key = id(module)
        self.modules[name] = module
        before = self.interventions.get(key)
        self.interventions[key] = added if before is None else Nested(before, added)

    def capture(self, prefix: Prefix) -> None:
        """Fill a prefix with what enters its block, and with what the model reads again of the blocks before."""
        block = self.blocks.select([prefix.layer])[0]
        refuse_shared(self.blocks, [block])
        prefix.source = ref(self.blocks.model)
        done = self._done(block, prefix)
        for name, module in done.items():
            self.add(module, name, Keep(name, prefix))
        for before in self._between(block, done):
            if before.spec.kept or before.index in prefix.heard:
                self.add(before.module, before.name, Keep(before.name, prefix))
        self.add(block.module, block.name, Capture(block, prefix))
        for name, module in common_sublayers(block, prefix):
            self.add(module, name, Keep(name, prefix))

    def resume(self, prefix: Prefix, plan: SkipPlan) -> None:
        """Start from a prefix: the blocks before it do not run, and its block gets what was captured.

        Raises:
            SkipError: if the plan skips one of them, or the prefix is another model's.
        """
        block = self.blocks.select([prefix.layer])[0]
        refuse_shared(self.blocks, self.blocks.blocks[: block.index])
        refuse_shared(self.blocks, [block])
        if prefix.source is not None and prefix.source() is not self.blocks.model:
            raise SkipError(
                f"the prefix was captured from another {type(self.blocks.model).__name__} than the one resumed: "
                f"run capture(model, prefix) on this one"
            )
        for term in plan.terms:
            for earlier in self.blocks.select(term.layers, term.part, term.stack):
                if earlier.index < block.index:
                    raise SkipError(
                        f"the plan skips block {earlier.index}, which does not run when resuming from block "
                        f"{block.index}"
                    )
        done = self._done(block, prefix)
        for name, module in done.items():
            self.add(module, name, Replay(name, module, prefix))
        for before in self._between(block, done):
            instead: Intervention = SkipBlock(before, counted=0)
            if before.spec.kept or before.index in prefix.heard:
                padded = before.spec.streams[0] if before.spec.padded else None
                instead = Replay(before.name, before.module, prefix, padded)
            if before.spec.cached:
                refusal = "the blocks before the one to resume from do not run, and make no keys"
                instead = LeaveOutKeys(instead, before.module, before.index, len(self.blocks), refusal)
            self.add(before.module, before.name, instead)
        self.add(block.module, block.name, Inject(block, prefix))
        for name, module in common_sublayers(block, prefix):
            self.add(module, name, Replay(name, module, prefix))

    def _done(self, block: Block, prefix: Prefix) -> dict[str, nn.Module]:
        """The stages that are over before a block, whose results stand for them when a pass resumes there.

        Where something hears the blocks in front of it, only blocks are left out.
        """
        done = {} if prefix.heard else self.blocks.done_before(block)
        self.helpers |= done.keys() - {each.name for each in self.blocks}
        return done

    def _between(self, block: Block, done: Collection[str]) -> list[Block]:
        """The blocks before one that lie in none of the modules that are done."""
        inside = tuple(f"{name}." for name in done)
        before = self.blocks.blocks[: block.index]
        return [each for each in before if each.name not in done and not each.name.startswith(inside)]

    def skip(self, term: SkipPlan) -> None:
        """Leave out or weaken what one term of a plan names."""
        chosen = self.blocks.select(term.layers, term.part, term.stack)
        refuse_shared(self.blocks, chosen, term.part)
        if term.strength == 0:  # the plain block
            return
        self.needs_grid |= "grid" in PART_SPECS[term.part].needs
        for layer, block in zip(term.layers, chosen, strict=True):
            how = term.perturbation.at(layer)
            runs = how.runs
            helpers = [] if runs else block.helper_modules(term.part)
            placed = AT_PARTS[term.part](block, how)
            named = {block.name, *(name for name, _, _ in block.sublayers(term.part))}
            self.helpers |= {name for name in (*dict(helpers), *(each[0] for each in placed)) if name not in named}
            for name, module, found in [
                *placed,
                *((*helper, ReturnInput()) for helper in helpers),
            ]:
                added = found
                if block.spec.cached and not runs and not isinstance(found, ReturnInput):
                    added = self._with_keys(block, module, added, term)
                if term.rows is not None:
                    added = OnRows(added, term.rows, block, module)
                if (term.start, term.stop) != (0.0, 1.0):
                    added = self._in_window(added, term.schedule)
                self.add(module, name, added)
            calls = [s.calls for part in ("attn", "cross_attn", "mlp") for _, _, s in block.sublayers(part)]
            self.stats.weights |= {name: 1 / sum(calls) for name, _, _ in block.sublayers(term.part)}

    def _in_window(self, intervention: Intervention, window: Schedule) -> When:
        """The intervention in a window of the steps only."""
        # decided when the progress is set: a compiled pass depends on this flag alone, not on the step's number
        condition = f"steps {window.start} to {window.stop}"
        self.windows[condition] = window
        return When(
            condition,
            intervention,
            f"the plan holds for the steps from {window.start} to {window.stop}, but which step this is was not said: "
            f"set skipper.progress = step / steps before each pass",
        )

    def _with_keys(self, block: Block, module: nn.Module, intervention: Intervention, term: SkipPlan) -> Intervention:
        """The intervention at the attention of a language model: its keys are left out of the KV cache too."""
        if term.part == "mlp" or not (attention := block.sublayers("attn")):
            return intervention
        name, found, sublayer = attention[0]
        if sublayer.shares and getattr(found, sublayer.shares, False):
            raise SkipError(f"{name} cannot be left out: later blocks read its keys and values (shared KV cache)")
        index = getattr(found, "layer_idx", None)
        refusal = "" if term.rows is None else "a plan for some batch rows cannot leave keys out of the others"
        return LeaveOutKeys(intervention, module, block.index if index is None else index, len(self.blocks), refusal)


def common_sublayers(block: Block, prefix: Prefix) -> list[tuple[str, nn.Module]]:
    """Name and module of the sublayers whose results a prefix holds.

    Raises:
        SkipError: for one that the block does not have.
    """
    found = {path: block.submodule(path) for path in prefix.sublayers}
    if missing := [path for path, module in found.items() if module is None]:
        raise SkipError(f"{block.name} ({type(block.module).__name__}) has no sublayer {', '.join(missing)}")
    return [(f"{block.name}.{path}", module) for path, module in found.items() if module is not None]


def refuse_shared(blocks: BlockMap, chosen: Sequence[Block], part: str = "block") -> None:
    """Refuse some places of a module that stands at others too: nobody can tell its calls apart.

    Raises:
        SkipError: naming the places.
    """

    def modules(block: Block) -> list[nn.Module]:
        return [module for _, module, _ in block.sublayers(part)] if PART_SPECS[part].sublayers else [block.module]

    places: dict[int, list[int]] = {}
    for block in blocks:
        for module in modules(block):
            places.setdefault(id(module), []).append(block.index)
    asked = {block.index for block in chosen}
    for block in chosen:
        for module in modules(block):
            if not (all_ := set(places[id(module)])) <= asked:
                raise SkipError(
                    f"{f'the {part} of ' if PART_SPECS[part].sublayers else ''}{block.name} is one module with layers "
                    f"{', '.join(map(str, sorted(all_)))} of {type(blocks.model).__name__} (shared weights), and its "
                    f"calls cannot be told apart: name all of these layers, or give each a module of its own"
                )
