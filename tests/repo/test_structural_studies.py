"""The three structural studies: each runs at the smallest size, goes on where it stopped, and its results hold."""

import importlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from skipguide.errors import SkipError
from skipguide.vision import FloorPlanNet, UNetPlusPlus
from skipguide.vision.floorplan import LayoutGraph, generate_plan, write_plan

ROOT = Path(__file__).resolve().parents[2]
study = importlib.import_module("demos.study")
training = importlib.import_module("demos.training")
unetpp = importlib.import_module("demos.unetpp.study")
unetpp_data = importlib.import_module("demos.unetpp.data")
unetpp_train = importlib.import_module("demos.unetpp.train")
floorplan = importlib.import_module("demos.floorplan.study")
floorplan_data = importlib.import_module("demos.floorplan.data")
floorplan_train = importlib.import_module("demos.floorplan.train")
skip_deq = importlib.import_module("demos.skip_deq.study")
tasks = importlib.import_module("demos.skip_deq.tasks")

STUDIES = {"unetpp": unetpp, "floorplan": floorplan, "skip_deq": skip_deq}
TINY = {
    "unetpp": unetpp.Settings(
        seeds=(0,),
        rates=(3e-3,),
        steps=2,
        tuning_steps=1,
        batch=2,
        size=16,
        train=4,
        validation=2,
        test=2,
        rounds=1,
        widths=(2, 3, 4, 5, 6),
        wide=(2, 3, 4, 5, 7),
        tolerances=(0.05,),
    ),
    "floorplan": floorplan.Settings(
        seeds=(0,), rates=(3e-3,), steps=2, tuning_steps=1, batch=2, train=4, validation=2, test=4, widths=(2, 3, 4)
    ),
    "skip_deq": skip_deq.Settings(
        seeds=(0,),
        digits_rates=(3e-3,),
        memory_rates=(1e-2,),
        tuning_share=0.01,
        digits_steps=3,
        digits_batch=4,
        pretraining=1,
        memory_steps=2,
        memory_batch=2,
        length=10,
        test_length=20,
        test=4,
        single=2,
        budget=30,
    ),
}


# every study, from nothing to its three files


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_study_runs_and_goes_on(name, tmp_path, monkeypatch, capsys):
    module = STUDIES[name]
    monkeypatch.setattr(module, "QUICK", TINY[name])
    words = ["--quick", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    module.main(words)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "results.md", "results.png"]
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (tmp_path / "out" / "results.md").read_text() == module.text(result)
    with Image.open(tmp_path / "out" / "results.png") as picture:
        assert picture.width > 500
    with pytest.raises(SystemExit):
        module.main(words)
    assert "--force" in capsys.readouterr().err
    # A second run computes nothing: everything that could is broken.
    monkeypatch.setattr(module, "fit" if hasattr(module, "fit") else "train", None)
    module.main([*words, "--force"])
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {k: v for k, v in again.items() if k != "machine"} == {k: v for k, v in result.items() if k != "machine"}
    monkeypatch.setattr(module, "QUICK", replace(TINY[name], seeds=(1,)))
    with pytest.raises(SkipError, match="other settings"):
        module.main([*words, "--force"])


# the committed results


def committed(name):
    path = ROOT / "demos" / name / "results.json"
    return json.loads(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("name", STUDIES)
def test_committed_results_are_of_the_full_study(name):
    result, path = committed(name)
    module = STUDIES[name]
    assert result["settings"] == json.loads(json.dumps(asdict(module.FULL)))
    assert len(result["settings"]["seeds"]) >= 3
    assert path.with_suffix(".md").read_text(encoding="utf-8") == module.text(result)
    assert path.with_suffix(".png").stat().st_size > 10_000
    again = json.loads(json.dumps(module.summary(result)))
    for key in ("models", "nets", "tasks"):
        assert again.get(key) == result.get(key), "means follow from the runs"


def test_committed_unetpp():
    result, _ = committed("unetpp")
    assert set(result["runs"]) == set(unetpp.MODELS)
    deep = result["runs"][unetpp.DEEP]
    for run in deep:
        best = max(run["validation"], key=lambda head: run["validation"][head]["iou"])
        assert run["chosen"] == best, "chosen on validation pictures, not on test pictures"
    times = [result["times"][f"L{level}"] for level in (1, 2, 3, 4)]
    assert all(entry["bit_equal"] for entry in times)
    for key in ("parameters", "nodes"):
        assert [entry[key] for entry in times] == sorted(entry[key] for entry in times)
    medians = [entry["time_to_last"]["median"] for entry in times]
    assert medians == sorted(medians) and medians[-1] == 1
    wide, nested = (result["models"][name]["parameters"] for name in ("wide U-Net", "UNet++"))
    assert abs(wide / nested - 1) < 0.01, "the wide U-Net is of equal size"


def test_committed_floorplan():
    nets = committed("floorplan")[0]["nets"]
    assert set(nets) == set(floorplan.NETS)
    alone = nets["image alone"]
    assert alone["miou"] == alone["exchanged"]["miou"]
    for name in ("graph map", "attention to rooms", "graph as one vector"):
        gain = nets[name]["miou"]["mean"] - alone["miou"]["mean"]
        lost = nets[name]["miou"]["mean"] - nets[name]["exchanged"]["miou"]["mean"]
        assert gain > 0.03 and lost > 0.03, "the graph helps, and another plan's graph does not"
    assert nets["graph map, no skips"]["miou"]["mean"] < alone["miou"]["mean"]


def test_committed_skip_deq():
    tasks_of = committed("skip_deq")[0]["tasks"]
    assert {task: set(found) for task, found in tasks_of.items()} == {
        task: set(variants) for task, variants in skip_deq.VARIANTS.items()
    }
    digits, memory = tasks_of["digits"], tasks_of["memory"]
    assert digits["guess alone"]["accuracy"]["mean"] > digits["plain"]["accuracy"]["mean"] - 0.02
    for name in ("plain", "Skip", "Skip-Reg"):
        assert digits[name]["accuracy"]["mean"] > 0.96 and digits[name]["unfinished_solves"]["mean"] < 1, name
    assert digits["plain, 5 unrolled"]["unfinished_solves"]["mean"] > 1, "what too short a pretraining does"
    far = {name: entry["far_accuracy"]["mean"] for name, entry in memory.items()}
    assert far["guess alone"] < 0.4 < 0.8 < far["plain"], "beyond the window the guess is at chance"


# the shared parts


def test_spread_and_table():
    found = study.spread([0.5, 0.7])
    assert found["mean"] == 0.6 and study.shown(found, 100) == "60.0 ± 14.1"
    assert study.spread([1])["sd"] == 0
    assert study.table(["a", "b"], [(1, 2)]) == "| a | b |\n|---|---:|\n| 1 | 2 |\n"


def test_rows_of_a_step_go_round_and_are_shared_out():
    for count, batch in ((7, 3), (2, 5), (10, 10)):
        seen = torch.cat([training.rows_of_step(count, batch, step, 0) for step in range(count)])
        assert torch.bincount(seen).tolist() == [batch] * count
    one = training.rows_of_step(12, 4, 0, 3)
    two = torch.cat([training.rows_of_step(12, 2, 0, 3, rank, 2) for rank in (0, 1)])
    assert torch.equal(one, two)


def test_rate_goes_up_and_down():
    rates = [training.rate(step, 100) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == 1 and rates[-1] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)


# training


def test_unetpp_training_resumes_to_the_bit(tmp_path, capsys):
    words = [
        "--cpu",
        "--crop",
        "16",
        "--steps",
        "4",
        "--batch",
        "2",
        "--widths",
        "2",
        "3",
        "--data",
        str(tmp_path / "d"),
    ]
    for kind in ("images", "masks"):
        (tmp_path / "d" / kind).mkdir(parents=True)
    for at, size in enumerate(((20, 24), (16, 16), (30, 12))):
        Image.new("RGB", size, (80 * at, 10, 90)).save(tmp_path / "d" / "images" / f"{at}.png")
        Image.new("L", size, 255 * (at % 2)).save(tmp_path / "d" / "masks" / f"{at}.png")
    unetpp_train.main([*words, "--out", str(tmp_path / "whole")])
    assert "best head on validation" in capsys.readouterr().out
    unetpp_train.main([*words, "--out", str(tmp_path / "parts"), "--stop-after", "3"])
    assert not (tmp_path / "parts" / "model").exists()
    unetpp_train.main([*words, "--out", str(tmp_path / "parts")])
    whole, parts = (UNetPlusPlus.from_pretrained(tmp_path / name / "model") for name in ("whole", "parts"))
    for (name, one), other in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(SystemExit):
        unetpp_train.main([*words, "--out", str(tmp_path / "parts"), "--lr", "1"])
    assert "other settings" in capsys.readouterr().err


def test_floorplan_training_on_files_resumes_to_the_bit(tmp_path, capsys):
    for seed in range(3):
        write_plan(generate_plan(seed), tmp_path / "d")
    words = ["--cpu", "--data", str(tmp_path / "d"), "--side", "24", "--steps", "4", "--batch", "2"]
    words += ["--widths", "2", "3"]
    floorplan_train.main([*words, "--out", str(tmp_path / "whole"), "--submit", str(tmp_path / "d")])
    assert len(list((tmp_path / "whole" / "submission").iterdir())) == 3
    floorplan_train.main([*words, "--out", str(tmp_path / "parts"), "--stop-after", "2"])
    floorplan_train.main([*words, "--out", str(tmp_path / "parts")])
    whole, parts = (FloorPlanNet.from_pretrained(tmp_path / name / "model") for name in ("whole", "parts"))
    for (name, one), other in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        floorplan_train.main(["--data", str(tmp_path / "empty"), "--out", str(tmp_path / "x")])
    assert "struct_in" in capsys.readouterr().err


def test_bfloat16_is_taken_where_the_machine_multiplies_in_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for found, wanted in (({}, "no"), ({"avx2": True, "avx512_bf16": False}, "no"), ({"avx512_bf16": True}, "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert training.fast_precision() == wanted
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
        assert training.fast_precision() == "no" and training.fast_precision(cpu=True) == "bf16"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert training.fast_precision() == "no", "an older torch cannot say"


def test_masks_are_measured_inside_and_outside():
    class Bright(torch.nn.Linear):
        classes, levels = 1, [1]

        def forward(self, images, head):
            return images[:, :1] - 0.5

    image, mask = torch.zeros(3, 4, 4), torch.zeros(1, 4, 4)
    image[:, 0], mask[:, 0, :2], mask[:, 1, :2] = 1, 1, 1  # two of four are found, and two of six are true
    data = unetpp_data.Pictures([image], [mask], ["one"])
    found = unetpp_train.measure(Bright(1, 1), data)["1"]
    assert found == pytest.approx({"iou": 2 / 6, "dice": 0.5, "mean_iou": (2 / 6 + 10 / 14) / 2})


def test_mixed_precision_does_not_stay_on_the_model():
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        model = torch.nn.Linear(3, 1)
        seen = []

        def loss(wrapped, step, device):
            seen.append(wrapped.forward)
            return wrapped(torch.ones(2, 3)).square().mean()

        training.fit(model, loss, training.Recipe(2, 0.1, precision="bf16"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert "forward" not in model.__dict__ and seen[0] != model.forward
    assert model(torch.ones(2, 3)).dtype is torch.float32


def test_training_refuses_a_loss_that_is_not_finite():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(SkipError, match="the loss is nan"):
        training.fit(model, lambda net, step, device: net.weight.sum() * torch.nan, training.Recipe(2, 1e-3))
    with pytest.raises(SkipError, match="at least one step"):
        training.Recipe(0, 1e-3)


def test_folders_of_pictures_are_checked(tmp_path):
    with pytest.raises(SkipError, match="expected pictures in"):
        unetpp_data.Pictures.of_folder(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    with pytest.raises(SkipError, match="lack a mask"):
        unetpp_data.Pictures.of_folder(tmp_path)
    (tmp_path / "masks").mkdir()
    Image.new("L", (9, 8)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(SkipError, match="its mask"):
        unetpp_data.Pictures.of_folder(tmp_path)
    Image.new("L", (8, 8)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(SkipError, match="at least two"):
        unetpp_data.Pictures.of_folder(tmp_path).split(0.2, 0)


def test_crops_keep_picture_and_mask_together():
    data = unetpp_data.Pictures([torch.rand(1, 20, 30).expand(3, -1, -1)], [], ["x"])
    data = unetpp_data.Pictures(data.images, [(data.images[0][:1] > 0.5).float()], ["x"])
    for step in range(6):
        images, masks = data.batch(2, 12, step, seed=0)
        assert torch.equal((images[:, :1] > 0.5).float(), masks)
    assert torch.equal(data.batch(2, 12, 3, 0)[0], data.batch(2, 12, 3, 0)[0])


def test_turned_plans_keep_image_and_target_together():
    plans = floorplan_data.made_up(0, 3, 32)
    images, graphs, targets = floorplan_data.batch(plans, 6, 0, seed=1)
    assert graphs.size == 6
    # channel 1 is the outside: it is the background of the target wherever the outer walls are closed
    assert torch.equal(images[:, 1] > 0.5, targets == 10)


def test_controls_change_what_they_name():
    plans = floorplan_data.made_up(0, 3, 32)
    others = floorplan_train.with_graphs_of_others(plans)
    assert [plan.graph for plan in others] == [plans[1].graph, plans[2].graph, plans[0].graph]
    assert all(torch.equal(a.image, b.image) for a, b in zip(plans, others, strict=True))
    assert all(
        isinstance(p.graph, LayoutGraph) and p.graph.edges.numel() == 0 for p in floorplan_train.without_edges(plans)
    )


def test_memory_task_says_the_last_mark():
    data = tasks.sequences(20, 15, 0.2, seed=0)
    for row in range(20):
        last, far = None, 0
        for place in range(15):
            kind = int(data.inputs[row, place].argmax())
            last, far = (kind, 0) if kind < tasks.MARKS else (last, far + 1)
            assert (int(data.classes[row, place]), int(data.distance[row, place])) == (last, far)


def test_memory_equilibrium_is_what_a_recurrent_network_finds():
    net = tasks.build("memory", "plain", 1e-6, 50, seed=0).eval()
    data = tasks.sequences(2, 12, 0.2, seed=1)
    with torch.no_grad():
        _, z, info = net(data.inputs)
        x, state = net.encoder(data.inputs), torch.zeros(2, 1, 16)
        for place in range(12):
            step = torch.cat([state, torch.zeros(2, 1, 16)], 1)  # the cell reads its left neighbour
            state = net.deq.f(step, x[:, place : place + 1].expand(-1, 2, -1))[:, 1:]
            assert torch.allclose(state[:, 0], z[:, place], atol=1e-5), place
    assert info.converged and info.evaluations <= 14


@pytest.mark.filterwarnings("ignore::skipguide.vision.skip_deq.network.ConvergenceWarning")
def test_digits_pretraining_leaves_a_cell_that_can_be_solved():
    """Unrolled near to the equilibrium, every solve that follows ends; five steps train a transient instead."""
    settings = replace(skip_deq.FULL, digits_steps=50)
    names = ("plain", "plain, 5 unrolled")
    good, short = (skip_deq.train("digits", name, 0, 1e-2, settings.digits_steps, settings)[1] for name in names)
    assert good["unfinished_solves"] <= 1 and good["train_evaluations"] < 30
    assert short["unfinished_solves"] >= 5 and short["train_evaluations"] > 2 * good["train_evaluations"]


def test_window_guess_sees_no_further():
    net = tasks.build("memory", "guess alone", 1e-2, 50, seed=0).eval()
    first = tasks.sequences(1, 20, 0.2, seed=0).inputs
    second = first.clone()
    second[:, 0] = second[:, 0].flip(-1)
    with torch.no_grad():
        one, other = net(first)[0], net(second)[0]
    assert not torch.allclose(one[:, 0], other[:, 0])
    assert torch.equal(one[:, 8:], other[:, 8:])
