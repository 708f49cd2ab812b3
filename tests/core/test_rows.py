"""Rows of the batch: those that stay run and no others, and a call's arguments are taken for them by name."""

from collections import namedtuple

import pytest
import torch
from helpers.dispatched import Dispatched
from torch import nn

from skipguide import SkipError
from skipguide.arguments import Arguments, row_index, take_rows
from skipguide.prefix import Prefix
from skipguide.rows import run_rows

# Rows that stay run and no others: in any number and layout, in place, and where a block returns another type.


@pytest.mark.parametrize("counts", [[0], [2, 3], [0, 1, 2, 3], []])
@pytest.mark.parametrize("projected", [False, True])
def test_run_rows_is_where_without_the_waste(counts, projected):
    torch.manual_seed(0)
    layer, short = nn.Linear(3, 3), nn.Linear(3, 3) if projected else None
    x, seen = torch.randn(4, 3, requires_grad=True), []

    def block(rows):
        seen.append(len(rows))
        return layer(rows)

    out = run_rows(block, x, torch.tensor(counts, dtype=torch.long), short)
    keep = torch.zeros(4, 1, dtype=torch.bool)
    keep[counts] = True
    wanted = torch.where(keep, layer(x), x if short is None else short(x))
    assert torch.allclose(out, wanted, atol=1e-6)
    assert sum(seen) == len(counts)
    grads = [torch.autograd.grad(o.square().sum(), x, retain_graph=True)[0] for o in (out, wanted)]
    assert torch.allclose(*grads, atol=1e-5)


@pytest.mark.parametrize("counts", [[0], [3], [1, 2], [0, 2, 3], [0, 1, 2, 3], []])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_rows_go_by_slices_and_keep_their_layout(counts, projected, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1).to(memory_format=layout)
    short = nn.Conv2d(16, 16, 1).to(memory_format=layout) if projected else None
    x, seen = torch.randn(4, 16, 16, 16).to(memory_format=layout), []

    def block(rows):
        assert rows.is_contiguous(memory_format=layout)
        seen.append(len(rows))
        return conv(rows)

    out = run_rows(block, x.requires_grad_(), counts, short)
    keep = torch.zeros(4, 1, 1, 1, dtype=torch.bool)
    keep[counts] = True
    wanted = torch.where(keep, conv(x), x if short is None else short(x))
    assert torch.allclose(out, wanted, atol=1e-5) and out.is_contiguous(memory_format=layout)
    assert sum(seen) == len(counts)
    (mine,) = torch.autograd.grad(out.square().sum(), x)
    (theirs,) = torch.autograd.grad(wanted.square().sum(), x)
    assert torch.allclose(mine, theirs, atol=1e-3)
    with torch.no_grad():
        half = run_rows(lambda rows: conv(rows).bfloat16(), x, torch.tensor(counts, dtype=torch.long), short)
    assert half.dtype is (torch.bfloat16 if counts else torch.float32), "as the block returns it"


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("width", [3, 8192], ids=["small", "large"])
@pytest.mark.parametrize("back", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_type_is_the_blocks_and_only_what_is_ours_is_written_to(width, projected, own, back):
    """Rows 0, 2 and 3 of five; autocast lets a block return another type than it was given."""
    torch.manual_seed(0)
    x = torch.randn(5, width)
    before, keep = x.clone(), torch.tensor([True, False, True, True, False])[:, None]
    short = (lambda rows: 3 * rows) if projected else None
    out = run_rows(lambda rows: (2 * rows).to(back), x, [0, 2, 3], short, own)
    assert torch.equal(out, torch.where(keep, 2 * before, before if short is None else 3 * before).to(back))
    assert out.dtype is back
    assert own or torch.equal(x, before)


@torch.no_grad()
def test_nothing_waits_for_the_device_to_know_the_rows():
    """On a GPU that is; a batch this small goes the same way on the CPU."""
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)
    for shortcut in (None, nn.Linear(3, 3)):
        with Dispatched() as ran:
            run_rows(layer, x, [1, 3], shortcut)
        assert "index_select" in ran.names and not ran.waits


# Arguments: the same call by name, with others in their place, and for some rows of the batch.


class Block(nn.Module):
    def forward(self, hidden_states, context=None, table=None, **kwargs):
        return hidden_states


def numbers(rows, *shape):
    """Every row holds its own number."""
    return torch.arange(rows).view(rows, *[1] * len(shape)).expand(rows, *shape).clone()


def test_read_and_replaced_wherever_they_are():
    block = Arguments(Block())
    x, y = torch.zeros(2, 1), torch.ones(2, 1)
    assert block.get("context", (x, y), {}) is y and block.get("context", (x,), {"context": y}) is y
    assert block.get("", (x, y), {}) is x and block.get("", (), {"hidden_states": y}) is y
    assert block.get("context", (x,), {}) is None and block.get("nothing", (x,), {}) is None
    args, kwargs = block.put({"context": 5, "table": 6, "more": 7}, (x, y), {"table": 1, "else": 2})
    assert args == (x, 5) and kwargs == {"table": 6, "else": 2}, "what was not passed is not added"
    args, _ = block.put({"hidden_states": 5}, (x, 1, 2, 3, 4), {})
    assert args == (5, 1, 2, 3, 4), "what the forward has no name for stays"
    with pytest.raises(SkipError, match="without a tensor"):
        block.get("", (1, torch.tensor(3.0)), {})


def test_a_description_of_other_arguments_is_refused():
    class Strict(nn.Module):
        def forward(self, x):
            return x

    Arguments(Block()).expect(Block(), "block", ["context", "anything", ""])  # it takes any name
    Arguments(Strict()).expect(Strict(), "block", ["x", ""])
    with pytest.raises(SkipError, match=r"block \(Strict\) is described with the arguments y, z, but .* takes x:"):
        Arguments(Strict()).expect(Strict(), "block", ["x", "y", "z"])


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([0, 2])], ids=["slice", "numbers"])
def test_rows_of_every_kind_of_argument(index):
    """Three rows of the batch; the first argument folds two frames into it, `text` folds five words into it."""
    kept = [0, 1, 2][index] if isinstance(index, slice) else index.tolist()
    x, text = numbers(6, 4) // 2, numbers(15, 4) // 5
    frames = slice(2, 6) if isinstance(index, slice) else row_index(kept, 3, x)
    (first, table), some = Arguments(Block()).rows(
        (x, numbers(6, 1)), {"text": text, "rope": numbers(6, 2), "scalar": torch.tensor(2.0), "none": None},
        frames, 6, ("rope",), (), ("text",), 3,
    )  # fmt: skip
    assert first[:, 0].tolist() == [row for row in kept for _ in range(2)]
    assert table.flatten().tolist() == [2 * row + frame for row in kept for frame in range(2)]
    assert some["text"][:, 0].tolist() == [row for row in kept for _ in range(5)]
    assert some["rope"].shape == (6, 2) and some["none"] is None and some["scalar"] == 2
    names, how = ["a", "b", "c"], {"shared": (), "listed": ("names", "pair"), "layered": ("layers",)}
    nested = {"deep": (numbers(3), ["kept"])}
    given = {"names": names, "pair": tuple(names), "layers": numbers(3, 4).T, "nested": nested}
    _, some = Arguments(Block()).rows((), given, index, 3, **how)
    assert list(some["names"]) == list(some["pair"]) == [names[row] for row in kept]
    assert some["layers"].shape == (4, 2) and some["layers"][0].tolist() == kept
    deep = some["nested"]["deep"]
    assert isinstance(deep, tuple) and deep[0].tolist() == kept and deep[1] == ["kept"]


def test_what_is_not_a_batch_stays_and_containers_keep_their_type():
    wide, scalar = numbers(5, 2), torch.tensor(1.0)
    found = take_rows([wide, scalar, (numbers(3),), {"a": numbers(3)}, "text"], slice(0, 1), 3)
    assert found[0] is wide and found[1] is scalar and found[4] == "text"
    assert isinstance(found, list) and isinstance(found[2], tuple)
    assert found[2][0].tolist() == found[3]["a"].tolist() == [0]


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_rows_of_a_folded_batch(fold):
    like = numbers(4 * fold, 2) // fold
    assert like[row_index([1, 3], 4, like)][:, 0].tolist() == [row for row in (1, 3) for _ in range(fold)]
    with pytest.raises(SkipError, match=f"batch of {4 * fold} is not a multiple of the model's batch of 7"):
        row_index([0], 7, like)


def test_sequences_keep_their_kind():
    Pair = namedtuple("Pair", "key values")
    taken = take_rows(Pair(numbers(3, 2), [numbers(3, 1), None]), torch.tensor([2, 0]), 3)
    assert type(taken) is Pair and taken.key[:, 0].tolist() == [2, 0] and type(taken.values) is list
    for index, wanted in ((torch.tensor([2, 0]), ("c", "a")), (slice(0, 2), ("a", "b"))):
        args, _ = Arguments(Block()).rows((numbers(3, 1), ("a", "b", "c")), {}, index, 3, (), ("context",))
        assert args[1] == wanted, "a tuple, however the rows are given"
    prefix = Prefix(1, {"hidden_states": numbers(4, 2)}, {"block": Pair(numbers(4, 1), None)})
    assert type(prefix.select(slice(2, 4), 4).kept["block"]) is Pair
