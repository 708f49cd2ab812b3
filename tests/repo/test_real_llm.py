"""The study of a language model that others trained: its texts, its jobs on a tiny model, its tables."""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers.llm_zoo import BY_NAME, VOCAB

from demos.benchmarks.measure import write_json
from demos.real import llm, llm_report, masking, masking_report, pictures, texts
from demos.real.llm_tuning import fine_tuned
from demos.real.weights import NotInstalledError
from demos.study import Cells
from skipguide.cli.llm_models import LanguageModel
from skipguide.llm import AdaSkip, MeasuredSkip
from skipguide.llm.cost import SublayerCosts

FORM = llm.Form(
    tokens=16, english=2, code=2, chat=2, calibration=2, samples=2, search=1, seeds=1, decoded=(2, 3), counts=(2, 4),
    written=3, rounds=2, few=(2,), without=("late attention",), tuned=(1, 3, 1),
)  # fmt: skip


class Letters:
    """A tokenizer of letters."""

    chat_template = None

    def __call__(self, text, return_tensors=None, verbose=True):
        return {"input_ids": torch.tensor([[3 + ord(letter) % (VOCAB - 3) for letter in text]])}

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids.tolist()))


@pytest.fixture(scope="module")
def study():
    torch.manual_seed(0)
    model = BY_NAME["llama"].build().eval()
    lm = LanguageModel("tiny", model, Letters(), "cpu", "float32")
    g = torch.Generator().manual_seed(1)
    rows = {kind: torch.randint(3, VOCAB, (2, 16), generator=g) for kind in llm_report.KINDS}
    samples = [torch.randint(3, VOCAB, (2, 16), generator=g) for _ in range(2)]
    stats = [AdaSkip.calibrate(model, list(sample)) for sample in samples]
    order = MeasuredSkip.calibrate(model, [samples[0][:1]], most=4)
    return llm.Study(FORM, lm, samples, rows, stats, order, SublayerCosts((1.0,) * 4, (2.0,) * 4, 1.0, 16))


@pytest.fixture(scope="module")
def data(study):
    rows = []
    for jobs in (llm.prefill, llm.decode, llm.times, llm.speculation, llm.automatic, llm.tuning, llm.other_samples):
        made = list(jobs(study))
        assert len({name for name, _ in made}) == len(made), "every job has a name of its own"
        for name, job in made:
            rows.append(job())
            assert llm.name_of(rows[-1]) == name, "a result says by itself which measurement it is"
    example = {"part": "example", "prompt": "<chat>Why?", "method": "AdaSkip", "share": 0.05, "text": "be\ncause"}
    return json.loads(
        json.dumps({
            "form": "short",
            "settings": {"counts": [2, 4]},
            "model": {"name": "tiny", "layers": 4},
            "tokens": dict.fromkeys(llm_report.KINDS, 32),
            "calibration": {"tokens": 32, "cpu_seconds": [1.0, 2.0], "rankings": []},
            "search": study.order.to_dict() | {"cpu_seconds": 5.0},
            "rows": [*rows, example],
        })
    )  # fmt: skip


@pytest.mark.slow
def test_a_measurement_is_that_of_an_edited_copy(study, data):
    """The loss of one method at one count, by hand: output projections that are zero, and no scale."""
    (row,) = llm_report.rows_of(data, "prefill", text="code", method="measured search", count=2)
    which = study.order.first(2)
    edited = BY_NAME["llama"].zeroed(study.lm.model, which.attn, which.mlp)
    losses = []
    for ids in study.test["code"]:
        with torch.no_grad():
            logits = edited(input_ids=ids[None], use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:]))
    assert row["perplexity"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-3)


@pytest.mark.slow
def test_what_is_compared(data):
    english = llm_report.rows_of(data, "prefill", text="english")
    methods = {row["method"] for row in english}
    assert {"AdaSkip", "measured search", "measured damage", "late layers", "block influence", "whole model"} <= methods
    assert "late attention" not in methods, "left to llm_quality by this form"
    assert {row["count"] for row in english} == {0, 2, 4}
    assert {row["compensate"] for row in english if row["method"] == "AdaSkip"} == {True, False}
    assert {row["method"] for row in llm_report.rows_of(data, "prefill", text="chat")} == {"whole model", *llm.SHORTER}
    whole = next(row for row in english if row["method"] == "whole model")
    assert whole["agreement"] == 1 and whole["loss_rise"] == 0
    assert all(0 <= row["acceptance"] <= 1 for row in llm_report.rows_of(data, "speculation"))


def test_the_prompt_is_read_by_the_whole_model_in_decoding(study):
    assert {plan.phase for plan in llm.decoding_plans(study, 2).values()} == {"decode"}


@pytest.mark.slow
def test_going_on_from_a_json(data, tmp_path):
    """What it has is taken; what tells too little to be told apart is measured again; other settings are refused."""
    settings = json.loads(json.dumps(asdict(FORM)))
    given = data | {"settings": settings, "costs": SublayerCosts((1.0,) * 4, (2.0,) * 4, 1.0, 16).to_dict()}
    given["rows"] = [
        {k: v for k, v in row.items() if (row["part"], k) != ("time", "method")} for row in data["rows"]
    ]  # fmt: skip
    out = tmp_path / "llm.json"
    write_json(out, given)
    llm.adopt(FORM, tmp_path, out)
    cells = Cells(tmp_path / "cells", settings)
    for row in data["rows"]:
        assert (llm.name_of(row) in cells) is (row["part"] != "time")
    assert cells("order", dict)["cpu_seconds"] == 5.0
    write_json(out, given | {"settings": settings | {"tokens": 17}})
    with pytest.raises(SystemExit, match="other settings \\(tokens\\)"):
        llm.adopt(FORM, tmp_path, out)
    with pytest.raises(SystemExit, match="to go on from"):
        llm.main(["--form", "try", "--go-on", "--out", str(tmp_path / "none.json")])


def test_fine_tuning_lowers_the_loss_of_what_it_is_for(study):
    tuned = copy.deepcopy(study.lm.model)
    rows = study.test["english"]
    found = fine_tuned(tuned, [rows], rows, 1, 60, 2)
    assert found["after"]["skipped"] < found["before"]["skipped"]
    assert found["count"] == 2 and found["tokens"] == 60 * 2 * 16
    assert all(not name.startswith("_skipguide") for name in tuned.__dict__)


@pytest.mark.slow
def test_tables_and_figure(data, tmp_path):
    path = tmp_path / "llm.json"
    path.write_text(json.dumps(data))
    text = llm_report.publish(path)
    for words in (
        "MeasuredSkip (search)", "AdaSkip + scales", "| decoding;", "sublayers that stay", "be cause", "4 of 8",
        "tuned for minutes", "from the model alone",
    ):  # fmt: skip
        assert words in text, words
    assert path.with_suffix(".md").read_text() == text and path.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_study_that_was_stopped_early_has_tables_too(data):
    few = data | {"rows": [row for row in data["rows"] if row["part"] == "prefill" and row["text"] == "english"][:4]}
    text = llm_report.tables(few)
    assert "English" in text and "Decoding" not in text


def test_wikitext_is_made_readable():
    given = " \n = Gold @-@ dust = \n \n ( It 's 1 @,@ 000 , or more . ) He said : \" Do n't ! \" \n"
    assert texts.readable(given) == "= Gold-dust =\n\n(It's 1,000, or more.) He said: \"Don't!\""


def test_windows_are_whole_and_evenly_taken(study):
    pieces = texts.windows(study.lm, ["a" * 40, " ", "b" * 16], 16)
    assert [len(piece) for piece in pieces] == [16, 16, 16]
    numbered = [torch.tensor([n]) for n in range(9)]
    assert texts.spaced(numbered, 3).flatten().tolist() == [0, 4, 8]
    assert texts.spaced(numbered, 99).shape == (9, 1)


def test_texts_that_are_not_there_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr("demos.real.pictures.DATA", tmp_path)
    with pytest.raises(NotInstalledError, match=r"wikitext2/test\.txt"):
        texts.english("test")


@pytest.mark.parametrize(("report", "name"), [(llm_report, "llm"), (masking_report, "masking")])
def test_committed_tables_follow_from_the_json(report, name):
    path = Path(report.__file__).with_name(f"{name}.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["form"] in ("short", "full")
    assert path.with_suffix(".md").read_text(encoding="utf-8") == report.tables(data)
    assert path.with_suffix(".png").is_file()


def test_the_committed_figures_of_masking_follow_from_what_is_kept_of_every_photo(tmp_path):
    """So that another machine can go on: the form is the committed one, and no photo is measured again."""
    data = json.loads(masking.OUT.read_text(encoding="utf-8"))
    masking.adopt(masking.FORMS[data["form"]], tmp_path, masking.OUT)
    kept = {"removal": [], "attribution": []}
    for part, cells in kept.items():
        files = sorted((tmp_path / "cells").glob(f"{part}-*.json"), key=lambda file: int(file.stem.split("-")[1]))
        cells += [json.loads(file.read_text(encoding="utf-8")) for file in files]
        assert len(cells) == data["photos"][part]
    for key, rows in masking_report.summary(*kept.values(), pictures.ANIMALS, pictures.HOOFED).items():
        assert len(rows) == len(data[key])
        for row, other in zip(rows, data[key], strict=True):
            assert row.keys() == other.keys(), key
            for name, value in row.items():  # rounded to four places, and another processor may round the other way
                assert value == (pytest.approx(other[name], abs=2e-4) if isinstance(value, dict) else other[name]), key
