"""The table of formulas: every entry is what it says, and one more entry is all that a new formula takes."""

import argparse
import pickle

import pytest
import torch
from helpers.guider_calls import LAYER, predictions, step
from helpers.stg_reference import SCALES, Reference, close

from skipguide import SkipError
from skipguide.cli.arguments import add_guidance
from skipguide.pipelines import SkipGuider
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines.formulas import FORMULAS, Formula, find_formula
from zoo import BY_NAME
from zoo.pipes import BY_PIPE

pytestmark = pytest.mark.numerics

# what each adds to u + w (c - u), before its scale; None where k takes the place of u
DEFINITIONS = {
    "stg": lambda u, c, k, w: c - k,
    "segmented": lambda u, c, k, w: c - k,
    "wan": lambda u, c, k, w: u + w * (c - u) - k,
    "uncond": None,
}
MADE_UP = [
    Formula("made up", lambda u, c, k, w: 2 * (c - k) + 0.1 * c),
    Formula("made up, with w", lambda u, c, k, w: 0.5 * (u + w * (c - u)) - 0.5 * k, needs_cfg=True, needs_w=True),
    Formula("made up, on u's inputs", lambda u, c, k, w: u - k + 0.1 * c, place="uncond", needs_cfg=True),
    Formula("made up, in place of u", None, place="inside_uncond", needs_cfg=True),
]
PIPES = ["ltx", "wan"]  # CFG in one batch, and in two calls


@pytest.fixture(params=MADE_UP, ids=lambda formula: formula.name)
def formula(request, monkeypatch):
    monkeypatch.setitem(FORMULAS, request.param.name, request.param)
    return request.param


def by_hand(formula, u, c, k, w, s):
    """The guided prediction; k is computed where the formula says."""
    if formula.direction is None:
        return k + w * (c - k)
    return u + w * (c - u) + s * formula.direction(u, c, k, w)


class ByHand(Reference):
    """A formula of the table written out, delivered through the branch weights that the test knows."""

    def branches(self, u, c, weak_u, weak_c):
        formula = self.how["formula"]
        k = weak_c if formula.place == "cond" else weak_u
        y = by_hand(formula, u, c, k, self.w, self.s)
        return (y - self.w * c) / (1 - self.w), c


@pytest.mark.parametrize("name", FORMULAS)
def test_every_entry_is_its_definition(name):
    generator = torch.Generator().manual_seed(0)
    u, c, k = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    definition, found = DEFINITIONS[name], FORMULAS[name].direction
    assert FORMULAS[name].name == name
    if definition is None:
        assert found is None
        return
    torch.testing.assert_close(found(u, c, k, 3.0), definition(u, c, k, 3.0), atol=1e-14, rtol=0)
    assert torch.equal(found(None, c, k, 1.0), c - k), "without CFG"


@pytest.mark.parametrize("name", PIPES)
def test_a_made_up_entry_works_on_a_pipeline(name, formula):
    case = BY_PIPE[name]
    s = 1.0 if formula.direction is None else 0.7
    pipe = case.build()
    ByHand(pipe, case, w=SCALES[name], s=s, formula=formula)
    expected = case.run(pipe, 2)
    pipe, settings = case.build(), Stg([LAYER], scale=s, formula=formula.name)
    with settings.apply(pipe) as applied:
        close(case.run(pipe, 2), expected)
    assert applied.stats.blocks_run == 3 * settings.cost(pipe).blocks_per_step
    assert Stg.from_dict(settings.to_dict()) == settings


def test_a_made_up_entry_works_under_a_guider(formula):
    family = BY_NAME["ltx"]
    model, inputs = family.build(), family.inputs(2)
    s = 1.0 if formula.direction is None else 0.7
    out, kinds = step(SkipGuider([LAYER], scale=s, guidance_scale=3.0, formula=formula.name), model, inputs)
    c, u, k, ku = predictions(family, model, LAYER, inputs)
    close(out.pred.double(), by_hand(formula, u, c, k if formula.place == "cond" else ku, 3.0, s))
    pickle.loads(pickle.dumps(SkipGuider([LAYER], formula=formula.name, scale=s)))  # the name is what is kept
    wanted = {"cond": [True, True, False], "uncond": [True, False, False], "inside_uncond": [True, False]}
    assert kinds == wanted[formula.place]


def test_a_made_up_entry_is_refused_where_it_says(formula):
    if not formula.needs_cfg:
        return
    case = BY_PIPE["ltx"]
    pipe = case.build()
    with pytest.raises(SkipError, match="turn CFG on"), Stg([LAYER], formula=formula.name).apply(pipe):
        case.run(pipe, cfg=False)
    with pytest.raises(SkipError, match="is no CFG"):
        SkipGuider([LAYER], formula=formula.name, guidance_scale=1.0)


def test_a_made_up_entry_is_known_to_the_commands_and_limits_options(monkeypatch):
    limited = Formula("made up", lambda u, c, k, w: c - k, limits={"every": (1,)}, reason="renews at every step")
    monkeypatch.setitem(FORMULAS, limited.name, limited)
    parser = argparse.ArgumentParser()
    add_guidance(parser)
    assert parser.parse_args(["--formula", "made up"]).formula == "made up"
    assert Stg([1], formula="made up").rule is limited
    with pytest.raises(SkipError, match=r"formula='made up' renews at every step.*every \(1\); got every=2"):
        Stg([1], formula="made up", every=2)


@pytest.mark.parametrize("name", ["paper", None, ["stg"], 1])
def test_an_unknown_formula_is_refused(name):
    with pytest.raises(SkipError, match=r"unknown formula .* expected one of stg, uncond, wan, segmented"):
        find_formula(name)


def test_an_entry_that_cannot_be_followed_is_refused():
    with pytest.raises(SkipError, match="unknown place 'batch'"):
        Formula("made up", None, place="batch")
    for direction, place in ((None, "cond"), (FORMULAS["stg"].direction, "inside_uncond")):
        with pytest.raises(SkipError, match="a direction is computed unless"):
            Formula("made up", direction, place=place)


def test_segmented_is_stg_with_a_window():
    assert FORMULAS["segmented"].direction is FORMULAS["stg"].direction
    assert FORMULAS["segmented"].place == FORMULAS["stg"].place
    assert Stg([1], formula="segmented").cfg_interval == FORMULAS["segmented"].window
