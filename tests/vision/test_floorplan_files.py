"""Files of the floor plan data set: read back as written, refused where damaged, and no code in them runs."""

import pickle

import networkx
import numpy as np
import pytest
import torch
from helpers.layout_graphs import TRIANGLE

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
    generate_plan,
    preprocess,
    save_submission,
    write_plan,
)
from skipguide.vision.floorplan.msd import read_graph, to_classes


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
        (np.zeros((0, 4)), r"structure \[H, W\] or \[H, W, C\]; got \(0, 4\)"),
        (np.zeros(3), r"structure \[H, W\] or \[H, W, C\]; got \(3,\)"),
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
