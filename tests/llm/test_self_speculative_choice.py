"""What is drafted, by whom and when: from the text first, behind it by the model, and not where it cannot pay."""

import random

import pytest
import torch
from helpers import drafting
from helpers.drafting import FAMILIES, SETS, VOCABULARY, prompt

from skipguide.llm import SelfSpeculative, SpeculationStats
from skipguide.llm.speculative.chooser import Budget, Chooser, VerifyCost
from skipguide.llm.speculative.lookup import Record, Text
from skipguide.llm.speculative.verify import accept_sampled

models, llama = drafting.models, drafting.llama
REPEATING = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])


def text(*tokens):
    found = Text()
    found.extend(tokens)
    return found


def test_the_longest_match_and_the_latest_place():
    assert text(1, 2, 3, 9, 1, 2, 4, 8, 1, 2).following(2) == (2, [4, 8]), "not the 3 of before"
    assert text(7, 2, 3, 5, 1, 2, 3, 6, 7, 2, 3).following(1) == (3, [5]), "three tokens say more than two"
    assert text(1, 2, 3).following(3) == (0, []) and text().following(3) == (0, [])
    assert text(4, 4).following(4) == (1, [4, 4, 4, 4])
    assert text(*range(20), *range(20)).following(3) == (16, [0, 1, 2])
    assert text(1, 2, 1, 2).following(5) == (2, [1, 2, 1, 2, 1]), "a loop is read on"
    assert text(1, 2, 3, 1).following(0) == (1, [])


def test_a_match_is_worth_what_it_was_worth():
    record = Record()
    assert sorted(record.chance(size) for size in range(1, 17)) == [record.chance(size) for size in range(1, 17)]
    for _ in range(30):
        record.enter(3, 0, 1)
        record.enter(9, 4, 4)
    assert record.chance(3) < 0.1 and record.chance(9) > 0.95 and record.chance(4) == Record().chance(4)
    before = record.chance(3)
    for _ in range(300):
        record.step()
    assert before < record.chance(3) < Record().chance(3), "what is long ago counts less"


def test_the_line_through_what_verifying_cost():
    cost = VerifyCost()
    assert 1 < cost.of(1) < cost.of(10) < 1.5
    for _ in range(30):
        cost.enter(1, 1.3)
        cost.enter(5, 1.3)
    assert cost.of(3) == pytest.approx(1.3, abs=0.03) and cost.of(10) == pytest.approx(1.3, abs=0.15)
    for _ in range(30):
        cost.enter(1, 0.8)  # faster than a plain step: noise
    assert cost.of(1) >= 1


class Machine:
    """Decoding in simulated time: what a pass costs, and what is accepted of whose drafts."""

    def __init__(self, chooser, acceptance, draft_cost, verify=lambda k: 1.1 + 0.05 * k, tokens=None, seed=0):
        self.chooser, self.acceptance, self.draft_cost, self.verify = chooser, acceptance, draft_cost, verify
        self.random = random.Random(seed)
        self.tokens = tokens or (lambda place: self.random.randrange(10**6))
        self.seconds, self.place, self.looked_up, self.own = 0.0, 0, 0, [0] * len(draft_cost)
        chooser.expect(draft_cost)

    def emit(self, count):
        self.chooser.read([self.tokens(self.place + i) for i in range(count)])
        self.place += count

    def run(self, length):
        while self.place < length:
            room = length - self.place - 1
            size, found = self.chooser.looked_up(room)
            if found:
                right = [self.tokens(self.place + i) == token for i, token in enumerate(found)]
                accepted = [*right, False].index(False)
                taken = self.verify(len(found))
                self.chooser.looked_up_round(size, len(found), accepted, taken)
                self.looked_up += 1
            elif (drafts := self.chooser.own_length(room)) > 0:
                number = self.chooser.drafter
                accepted = 0
                while accepted < drafts and self.random.random() < self.acceptance[number]:
                    accepted += 1
                draft, verify = drafts * self.draft_cost[number], self.verify(drafts)
                self.chooser.own_round([0.9] * drafts, accepted, draft, verify)
                taken = draft + verify
                self.own[number] += 1
            else:
                accepted, taken = 0, 1.0
                self.chooser.plain_step(1.0)
            self.seconds += taken
            self.emit(accepted + 1)
        return self.place / self.seconds


def chooser(drafters=3, **settings):
    return Chooser(**{"max_draft": 10, "adaptive": True, "confidence_exit": True, "lookup": True} | settings,
                   drafters=drafters)  # fmt: skip


@pytest.mark.parametrize("length", [64, 200, 1000])
@pytest.mark.parametrize("acceptance", [(0.0, 0.0, 0.0), (0.1, 0.4, 0.6)], ids=str)
@pytest.mark.parametrize("cost", [(0.55, 0.68, 0.82), (0.3, 0.5, 0.7)], ids=str)
@pytest.mark.parametrize("distinct", [8, 10**6], ids=["matches that are worth nothing", "no matches"])
def test_where_nothing_pays_hardly_anything_is_lost(length, acceptance, cost, distinct):
    speeds = []
    for seed in range(5):
        machine = Machine(chooser(), acceptance, cost, seed=seed)
        tokens = [machine.random.randrange(distinct) for _ in range(length)]
        machine.tokens = tokens.__getitem__
        speeds.append(machine.run(length))
    mean, least = (0.975, 0.96) if length == 64 else (0.984, 0.98)
    assert sum(speeds) / 5 > mean and min(speeds) > least


@pytest.mark.parametrize("cost", [0.2, 0.4])
def test_a_drafter_that_pays_drafts(cost):
    machine = Machine(chooser(), (0.97, 0.97, 0.97), (cost, 0.6, 0.8))
    assert machine.run(300) > (1.8 if cost == 0.2 else 1.3)
    assert machine.own[0] > 20 and machine.own[1:] == [0, 0]


def test_a_smaller_share_is_tried_where_the_larger_one_is_not_accepted():
    machine = Machine(chooser(), (0.0, 0.97, 0.97), (0.2, 0.3, 0.8))
    assert machine.run(600) > 1.2
    assert machine.own[0] < 10 < machine.own[1] and machine.own[2] == 0


def test_a_share_that_could_never_pay_is_not_tried():
    machine = Machine(chooser(), (1.0, 1.0, 1.0), (0.85, 0.9, 0.95), verify=lambda k: 1.3)
    assert machine.run(300) == 1 and machine.own == [0, 0, 0] and not machine.chooser.wants_drafters


def test_drafters_are_tried_anew_in_a_text_that_has_become_easier():
    found = chooser()
    machine = Machine(found, (0.0, 0.0, 0.0), (0.2, 0.3, 0.4))
    machine.run(300)
    machine.acceptance = (0.98, 0.98, 0.98)
    begun = machine.seconds, machine.place
    machine.chooser = found.again()
    machine.run(3000)
    assert (machine.place - begun[1]) / (machine.seconds - begun[0]) > 1.3


def test_a_text_that_repeats_itself_is_looked_up_and_the_match_is_learned_in_plain_steps():
    machine = Machine(chooser(drafters=1), (0.0,), (0.9,), tokens=lambda place: place % 17)
    assert machine.run(200) > 3
    assert machine.looked_up > 10
    found = chooser(drafters=1)
    for place in range(60):
        found.read([place % 17])
        assert found.looked_up(5) == (0, []), "what a plain step costs is not known yet"
    assert found.record.chance(16) > 0.9 > 0.8 >= Record().chance(16)


def test_a_budget_is_a_share_of_what_was_decoded():
    budget = Budget()
    for _ in range(100):
        budget.plain()
    assert budget.left == pytest.approx(0.75)
    budget.round(3, 2.0)
    assert budget.left == pytest.approx(1.765)
    for _ in range(10):
        budget.round(10, 1.0)
    assert budget.left == budget.cap


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_from_the_text_change_nothing(models, family, adaptive):
    model = models[family]
    for ids in (REPEATING, prompt(3)):
        plain = model.generate(ids, max_new_tokens=40, do_sample=False)
        spec = SelfSpeculative(plan=SETS["scattered"], adaptive=adaptive, max_draft=4)
        with spec.apply(model) as applied:
            assert torch.equal(model.generate(ids, max_new_tokens=40, do_sample=False), plain)
        stats = applied.stats
        assert stats.tokens == 39 and stats.lookup_accepted <= stats.lookup_drafted <= stats.drafted
        if not adaptive:
            assert 0 < stats.lookup_rounds < stats.rounds, "what cannot be looked up the model drafts"


def test_without_the_text_and_with_several_rows_the_model_drafts_alone(llama):
    ids = REPEATING.expand(2, -1)
    for spec, given in (
        (SelfSpeculative(plan=SETS["first"], adaptive=False, lookup=False), REPEATING),
        (SelfSpeculative(plan=SETS["first"], adaptive=False), ids),
    ):
        with spec.apply(llama) as applied:
            got = llama.generate(given, max_new_tokens=12, do_sample=False)
        assert applied.stats.rounds and not applied.stats.lookup_rounds
        assert torch.equal(got, llama.generate(given, max_new_tokens=12, do_sample=False))


def test_a_token_that_was_looked_up_is_sampled_all_the_same():
    """Its drafter could have said nothing else: exact in distribution, by the frequencies of 40,000 seeded rounds."""
    p, count = torch.tensor([0.5, 0.3, 0.15, 0.05]), 40_000
    generator = torch.Generator().manual_seed(0)
    drafted = torch.full((count, 1), 2)
    q = torch.nn.functional.one_hot(drafted, 4).float()
    found = accept_sampled(drafted, q, p.expand(count, 2, 4), generator).tokens[:, 0].bincount(minlength=4)
    assert float(((found - p * count) ** 2 / (p * count)).sum()) < 16.3  # 99.9 % of chi-square, 3 degrees


def test_sampling_with_drafts_from_the_text(llama):
    spec = SelfSpeculative(plan=SETS["first"], adaptive=False, max_draft=3)
    torch.manual_seed(0)
    with spec.apply(llama) as applied:
        first = llama.generate(REPEATING, max_new_tokens=20, do_sample=True, top_k=3)
    torch.manual_seed(0)
    assert torch.equal(spec.generate(llama, REPEATING, max_new_tokens=20, do_sample=True, top_k=3), first)
    assert applied.stats.lookup_rounds and int(first.max()) < VOCABULARY


def test_looking_up_is_no_cost_of_drafting():
    stats = SpeculationStats(
        rounds=3, drafted=10, draft_seconds=1.0, plain_steps=4, plain_seconds=4.0, lookup_rounds=1, lookup_drafted=8
    )
    assert stats.draft_cost == 0.5
