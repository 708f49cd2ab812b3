"""The limits of the house: no import circle, small files, dependencies that point one way, one place for the gates."""

import ast
import re

import pytest
from helpers.import_graph import ROOT, circles, import_graph, imports_by_string, library_files

FILES = library_files()
COMPARED = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)
LAYERS = {"skipguide.cli": 4, "skipguide.bench": 3, "skipguide.pipelines": 2, "skipguide.vision": 2, "skipguide.llm": 2}
SETS_BY_NAME = re.compile(r"^\S*(setattr|delattr)(__)?\([^,]+, ['\"]everywhere['\"]")


def layer(name: str) -> int:
    return next((level for prefix, level in LAYERS.items() if name == prefix or name.startswith(f"{prefix}.")), 1)


def test_no_file_imports_itself_in_a_circle():
    assert circles(import_graph(FILES)) == []


def test_nothing_is_imported_by_a_string():
    assert imports_by_string(FILES) == []


def test_a_circle_is_seen():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert circles(graph) == [["a", "b", "c"]]


def test_dependencies_point_one_way():
    for name, imported in import_graph(FILES).items():
        for other in imported:
            if name == "skipguide":
                continue
            assert layer(other) < layer(name) or other.split(".")[:2] == name.split(".")[:2] or layer(name) == 1, (
                f"{name} imports {other}"
            )
            if layer(name) == 1:
                assert layer(other) == 1, f"{name} is of the core and imports {other}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_are_small(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 350


def test_the_core_has_few_files_beside_its_folders():
    own = [path for path in (ROOT / "skipguide").iterdir() if path.is_file()]
    assert len(own) <= 30, sorted(path.name for path in own)


def test_formulas_are_data():
    """What a formula does is said in its entry of `pipelines/formulas.py`; nobody else asks which one it is."""
    found = []
    for name, path in FILES.items():
        if not name.startswith(("skipguide.pipelines", "skipguide.cli")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Compare) or not isinstance(node.ops[0], COMPARED):
                continue
            if any(re.search(r"\bformula['\"\]]*$", ast.unparse(side)) for side in (node.left, *node.comparators)):
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert len(found) <= 3, found


def changes(path):
    """The lines of a file that set what stands at a gate in all threads, its `everywhere`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        dotted = isinstance(node, ast.Attribute) and node.attr == "everywhere" and not isinstance(node.ctx, ast.Load)
        if dotted or (isinstance(node, ast.Call) and SETS_BY_NAME.search(ast.unparse(node))):
            yield node.lineno


def test_what_stands_at_a_gate_in_all_threads_is_changed_in_one_place():
    found = {name: len(list(changes(path))) for name, path in FILES.items()}
    assert {name: lines for name, lines in found.items() if lines} == {"skipguide.active": 1, "skipguide.gate": 1}


def test_language_models_have_no_engine_of_their_own():
    """They leave out by the interventions of the core; `LMFrame` was the second engine."""
    assert [name for name, path in FILES.items() if "LMFrame" in path.read_text(encoding="utf-8")] == []
