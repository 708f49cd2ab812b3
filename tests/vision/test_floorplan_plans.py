"""Floor plans: files of the data set, made-up plans, regions by flood fill, and pictures."""

import pickle
import sys

import networkx
import numpy as np
import pytest
import torch
from helpers.layout_graphs import TRIANGLE
from hypothesis import given, settings
from hypothesis import strategies as st

from skipguide.errors import SkipError
from skipguide.vision.floorplan import (
    BACKGROUND,
    CLASSES,
    IGNORE,
    STRUCTURE,
    ZONES,
    LayoutGraph,
    MSDFolder,
    Plan,
    collate,
    draw_plan,
    generate_plan,
    preprocess,
    save_submission,
    submission_image,
    write_plan,
)
from skipguide.vision.floorplan.generate import PROGRAMMES
from skipguide.vision.floorplan.msd import read_graph, to_classes
from skipguide.vision.floorplan.regions import grow, innermost, outside, regions


def test_preprocess_channels():
    walls = np.full((8, 8, 3), 255, dtype=np.uint8)
    walls[2:6, 2:6, 0] = 0
    walls[3:5, 3:5, 0] = 255
    image = preprocess(walls)
    assert image.shape == (3, 8, 8)
    assert image[:, 0, 0].tolist() == [1, 1, 1]  # outside
    assert image[:, 2, 2].tolist() == [pytest.approx(128 / 255), 0, 0]  # wall
    assert image[:, 3, 3].tolist() == [0, 0, 1]  # inside
    for bad, message in (
        (np.zeros((0, 4)), r"structure of numbers \[H, W\] or \[H, W, C\]; got float64 \(0, 4\)"),
        (np.zeros(3), r"structure of numbers \[H, W\] or \[H, W, C\]; got float64 \(3,\)"),
        (np.full((3, 3), -1), r"0 \(wall\) to 255; got -1.* to -1"),
        (np.full((3, 3), np.nan), r"0 \(wall\) to 255; got nan to nan"),
        (np.full((3, 3), 300), r"0 \(wall\) to 255; got 300.* to 300"),
        (1 - np.eye(3), r"255 where there is no wall; got values up to 1"),
    ):
        with pytest.raises(SkipError, match=message):
            preprocess(bad)
    with pytest.raises(SkipError, match="gap of at least 0; got -1"):
        preprocess(walls, gap=-1)


def test_class_mapping():
    values = np.arange(14).reshape(1, 14)
    assert to_classes(values)[0].tolist() == [*range(10), IGNORE, IGNORE, IGNORE, BACKGROUND]
    with pytest.raises(SkipError, match=r"0\.\.13"):
        to_classes(np.array([[14]]))
    assert sorted(c for zone in ZONES for c in zone) == list(range(STRUCTURE))
    assert len(CLASSES) == 11


def test_folder_round_trip(tmp_path):
    plans = [generate_plan(seed, 32) for seed in range(3)]
    plans = [Plan(plan.image, plan.graph, plan.target, str(9 + at)) for at, plan in enumerate(plans)]
    for plan in plans:
        write_plan(plan, tmp_path)
    folder = MSDFolder(tmp_path)
    assert folder.ids == ["9", "10", "11"]  # by number, not by letter
    for plan, read in zip(plans, folder, strict=False):
        assert torch.equal(read.image, plan.image)
        assert torch.equal(read.target, plan.target)
        assert torch.equal(read.graph.edges, plan.graph.edges)
    small = MSDFolder(tmp_path, size=16)[0]
    assert small.image.shape == (3, 16, 16)
    assert torch.equal(small.target, plans[0].target[::2, ::2])
    loader = torch.utils.data.DataLoader(MSDFolder(tmp_path), batch_size=3, collate_fn=collate)
    images, graphs, targets = next(iter(loader))
    assert images.shape == (3, 3, 32, 32)
    assert graphs.size == 3
    assert targets.shape == (3, 32, 32)
    for path in (tmp_path / "full_out").iterdir():
        path.unlink()
    assert MSDFolder(tmp_path)[1].target is None  # the test set
    assert collate([MSDFolder(tmp_path)[0]])[2] is None


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(SkipError, match="found none"):
        MSDFolder(tmp_path)
    with pytest.raises(SkipError, match="size of at least 1"):
        MSDFolder(tmp_path, size=0)
    plan = generate_plan(0)
    write_plan(plan, tmp_path)
    with pytest.raises(SkipError, match="name and a target"):
        write_plan(Plan(plan.image, plan.graph), tmp_path)
    name = plan.name
    (tmp_path / "struct_in" / "other.npy").write_bytes(b"")
    with pytest.raises(SkipError, match=r"lack their struct_in or graph_in, such as \['other'\]"):
        MSDFolder(tmp_path)
    (tmp_path / "struct_in" / "other.npy").unlink()
    (tmp_path / "full_out" / f"{name}.npy").rename(tmp_path / "full_out" / "other.npy")
    with pytest.raises(SkipError, match="lack their full_out"):
        MSDFolder(tmp_path)
    np.save(tmp_path / "full_out" / f"{name}.npy", np.zeros((4, 4)))
    with pytest.raises(SkipError, match="differ"):
        MSDFolder(tmp_path)[0]
    (tmp_path / "full_out" / f"{name}.npy").write_bytes(b"nothing")
    with pytest.raises(SkipError, match="not a readable array"):
        MSDFolder(tmp_path)[0]


def test_a_plan_is_written_whole_and_replaces_nothing_unasked(tmp_path):
    plan = generate_plan(0, 24)
    write_plan(plan, tmp_path)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    other = generate_plan(1, 24)
    other = Plan(other.image, other.graph, other.target, plan.name)
    with pytest.raises(SkipError, match="exists already"):
        write_plan(other, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == kept
    write_plan(other, tmp_path, overwrite=True)
    assert torch.equal(MSDFolder(tmp_path)[0].target, other.target)
    unknown = Plan(plan.image, LayoutGraph([0, 1], [[0], [1]], [7]), plan.target, "unknown")
    with pytest.raises(SkipError, match="got number 7"):
        write_plan(unknown, tmp_path)
    assert len(list(tmp_path.rglob("*.*"))) == 3, "nothing half-written"


class Malicious:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_graph_file_runs_no_code(tmp_path, capsys):
    path = tmp_path / "graph.pickle"
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(SkipError, match=r"builtins\.print"):
        read_graph(path)
    assert "code ran" not in capsys.readouterr().out
    for content, message in (
        (b"", "not a pickled"),
        (b"garbage", "not a pickled"),
        (b"Igarbage\n.", "not a pickled"),  # a ValueError of pickle
        (pickle.dumps([1]), "holds a list"),
        (pickle.dumps(networkx.Graph()), "at least one room"),
    ):
        path.write_bytes(content)
        with pytest.raises(SkipError, match=message):
            read_graph(path)
    graph = TRIANGLE.to_networkx()
    graph.nodes[0]["zoning_type"] = np.int64(3)
    path.write_bytes(pickle.dumps(graph))
    assert read_graph(path).zones.tolist() == [3, 1, 2]


def deep():
    made = []
    for _ in range(3000):
        made = [made]
    return made


@pytest.mark.parametrize(
    ("zone", "connection"),
    [(True, "door"), (10**30, "door"), (1e30, "door"), (float("nan"), "door"), ("Zone" + "9" * 30, "door"),
     (deep(), "door"), (0, ["door"]), (0, deep()), (0, None), (b"Zone1", "door")],
    ids=lambda value: repr(value)[:12] if not isinstance(value, list) else "list",
)  # fmt: skip
def test_graph_files_with_wrong_types(zone, connection, tmp_path):
    graph = networkx.Graph()
    graph.add_node("a", zoning_type=zone)
    graph.add_node("b", zoning_type=1)
    graph.add_edge("a", "b", connectivity=connection)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)
    try:
        (tmp_path / "g.pickle").write_bytes(pickle.dumps(graph))
    finally:
        sys.setrecursionlimit(limit)
    with pytest.raises(SkipError, match=r"g\.pickle") as error:
        read_graph(tmp_path / "g.pickle")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("values", [[True, False], np.array([True]), [1 + 0j], deep(), [10**30]], ids=range(5))
def test_zones_of_another_kind(values):
    with pytest.raises(SkipError, match="expected zones as whole numbers"):
        LayoutGraph(values)


@pytest.mark.parametrize("dtype", ["complex64", "U1", "bool", "M8[s]", [("x", "f4")]], ids=str)
@pytest.mark.parametrize("read", [preprocess, to_classes])
def test_arrays_of_another_kind(read, dtype):
    with pytest.raises(SkipError, match="numbers"):
        read(np.zeros((4, 4), dtype))
    for shape in ((4, 4, 0), (0, 4), (4,), (1, 4, 4, 3)):
        with pytest.raises(SkipError, match=r"\[H, W\]"):
            read(np.zeros(shape))


def test_submission(tmp_path):
    from PIL import Image

    classes = torch.tensor([[0, 9], [10, 8]])
    path = save_submission(classes, tmp_path / "out", "42")
    assert path.name == "42.png"
    image = Image.open(path)
    assert image.mode == "L"
    assert np.asarray(image).tolist() == [[0, 9], [13, 8]]
    logits = torch.nn.functional.one_hot(classes, 11).permute(2, 0, 1).float()
    assert np.asarray(Image.open(save_submission(logits, tmp_path, "43"))).tolist() == [[0, 9], [13, 8]]
    for bad in (torch.tensor([[11]]), torch.rand(3, 3), torch.zeros(3, dtype=torch.long), classes[None]):
        with pytest.raises(SkipError, match="expected classes"):
            save_submission(bad, tmp_path, "44")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(24, 70))
def test_made_up_plans_keep_their_rules(seed, size):
    plan = generate_plan(seed, size)
    target = plan.target.numpy()
    graph = plan.graph.to_networkx()
    assert networkx.is_connected(graph)
    rooms = regions(target)
    areas = {}
    for number in np.unique(rooms):
        kind = int(target.ravel()[number])
        if kind < STRUCTURE:
            areas[number] = (int((rooms == number).sum()), kind)
    assert len(areas) == len(plan.graph) >= 2
    # zones go by rank in size, in the order of the programme
    order = PROGRAMMES[plan.name.split("-")[0]]
    ranked = sorted(areas.values(), reverse=True)
    assert sorted(plan.graph.zones.tolist()) == sorted(order[: len(ranked)])
    sizes = [area for area, _ in ranked]
    for rank, (area, kind) in enumerate(ranked):
        if sizes.count(area) == 1:
            assert kind in ZONES[order[rank]]
    # what a room is within its zone goes by the number of its connections
    kinds = sorted(kind for _, kind in areas.values())
    table = {0: (0, 0, 0, 0), 1: (2, 3, 1, 4), 2: (7, 6, 5, 5), 3: (8, 8, 8, 8)}
    zones = plan.graph.zones.tolist()
    assert kinds == sorted(table[zones[r]][min(graph.degree[r], 4) - 1] for r in graph.nodes)
    # the image: the outside is exactly the background
    assert torch.equal(plan.image[1] == 1, plan.target == BACKGROUND)


def test_plans_are_repeatable_and_differ():
    one, two, other = generate_plan(5), generate_plan(5), generate_plan(6)
    assert torch.equal(one.image, two.image)
    assert torch.equal(one.target, two.target)
    assert torch.equal(one.graph.edges, two.graph.edges)
    assert not torch.equal(one.target, other.target)
    named = [generate_plan(7, programme=name) for name in PROGRAMMES]
    assert len({tuple(plan.target.flatten().tolist()) for plan in named}) == 3
    # nothing in the image tells the programme
    assert len({tuple(plan.image[1].flatten().tolist()) for plan in named}) == 1
    whole = generate_plan(7, keep_walls=1.0)
    assert torch.equal(whole.image[2] == 0, whole.target == STRUCTURE)
    for arguments, message in (
        ({"size": 8}, "24"),
        ({"rooms": (1, 4)}, "2 to 8"),
        ({"rooms": (5, 4)}, "2 to 8"),
        ({"keep_walls": 2.0}, "keep_walls"),
        ({"programme": "castle"}, "family"),
    ):
        with pytest.raises(SkipError, match=message):
            generate_plan(0, **arguments)
    with pytest.raises(SkipError, match="one size"):
        collate([generate_plan(0, 24), generate_plan(0, 32)])


def slow_regions(values):
    height, width = values.shape
    labels = -np.ones(values.shape, dtype=int)
    for start in range(values.size):
        todo = [divmod(start, width)]
        while todo:
            y, x = todo.pop()
            if labels[y, x] < 0 and values[y, x] == values.flat[start]:
                labels[y, x] = start
                near = ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
                todo += [(a, b) for a, b in near if 0 <= a < height and 0 <= b < width]
    return labels


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_regions_equal_a_plain_flood_fill(height, width, seed):
    values = np.random.default_rng(seed).integers(0, 3, (height, width))
    assert np.array_equal(regions(values), slow_regions(values))


def test_outside_and_gaps():
    walls = np.zeros((12, 12), dtype=bool)
    walls[2:10, 2] = walls[2:10, 9] = walls[2, 2:10] = walls[9, 2:10] = True
    closed = outside(walls)
    assert closed[0, 0]
    assert not closed[5, 5]
    assert closed.sum() == 144 - 64
    walls[2, 5:7] = False  # a door of two pixels
    assert outside(walls)[5, 5]
    kept = outside(walls, gap=1)
    assert kept[0, 0]
    assert not kept[5, 5]
    assert not (kept & walls).any()
    touching = np.ones((4, 4), dtype=bool)  # walls on the border leave no outside
    touching[1:3, 1:3] = False
    assert not outside(touching).any()


def test_innermost_is_deep_inside():
    mask = np.zeros((20, 20), dtype=bool)
    mask[2:9, 3:18] = True
    mask[9:19, 3:5] = True
    row, column = innermost(mask)
    assert not (~mask & grow(np.pad(np.ones((1, 1), bool), ((row, 19 - row), (column, 19 - column))), 3)).any()
    assert innermost(np.eye(3, dtype=bool)) == (1, 1)


def test_picture_has_rooms_names_and_legend():
    plan = generate_plan(3, 64)
    bare = draw_plan(plan.target, labels=False, legend=False)
    assert bare.height == bare.width == 384
    named = draw_plan(plan.target, legend=False)
    assert named.size == bare.size
    assert named.tobytes() != bare.tobytes()
    zoom = bare.height // 64
    walls = (plan.target == STRUCTURE).numpy().repeat(zoom, 0).repeat(zoom, 1)
    assert np.array_equal(np.asarray(named)[walls], np.asarray(bare)[walls]), "a name leaves its room"
    full = draw_plan(plan.target, title="A made-up plan")
    assert full.width > bare.width
    assert full.height > bare.height
    logits = torch.nn.functional.one_hot(plan.target, 11).permute(2, 0, 1).float()
    assert draw_plan(logits).tobytes() == draw_plan(plan.target).tobytes()
    draw_plan(torch.full((3, 3), IGNORE))
    with pytest.raises(SkipError, match="expected classes"):
        draw_plan(torch.rand(3, 3))
    with pytest.raises(SkipError, match="expected classes"):
        draw_plan(plan.target[None])  # classes of a batch are no logits


def test_nan_is_not_drawn_as_bedrooms():
    logits = torch.full((11, 8, 8), torch.nan)
    for draw in (submission_image, draw_plan):
        with pytest.raises(SkipError, match="finite logits; got NaN"):
            draw(logits)


def test_inverted_walls_are_noticed():
    structure = np.full((32, 32), 255)
    structure[4:28, 4:28] = 0
    structure[5:27, 5:27] = 255
    assert preprocess(structure)[1].mean() > 0.3, "the outside is found"
    with pytest.raises(SkipError, match=r"9\d % is wall.*255 - structure"):
        preprocess(255 - structure)
    assert preprocess(structure[4:28, 4:28]).shape == (3, 24, 24), "cut along its outer walls"
