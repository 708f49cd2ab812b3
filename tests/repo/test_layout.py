"""The package list, the links, the import guards and what an import costs."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from helpers.versions import traced_plans

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
FOLDERS = {"skipguide": "skipguide", "skipguide.pipelines": "pipelines", "skipguide.vision": "vision"}
HEAVY = {"PIL", "accelerate", "diffusers", "matplotlib", "peft", "timm", "torchvision", "transformers"}


def packages_in_tree() -> set[str]:
    """Every folder with an `__init__.py`, by import name; the links themselves are not followed."""
    found = set()
    for package, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / folder).parts
            if folder == "skipguide" and inside[:1] in (("pipelines",), ("vision",)):
                continue  # seen through a link (rglob follows links before Python 3.13)
            found.add(".".join((package, *inside)))
    return found


def python(code: str, *args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )


def imported_at_module_level(path: Path) -> set[str]:
    """Top-level names of what a file imports when it is imported (not inside functions or TYPE_CHECKING)."""
    names: set[str] = set()
    todo = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
        todo += ast.iter_child_nodes(node)
    return names


def test_package_list_is_the_tree():
    assert set(SETUPTOOLS["packages"]) == packages_in_tree()
    assert SETUPTOOLS["package-dir"] == FOLDERS


@pytest.mark.parametrize("name", ["pipelines", "vision"])
def test_link_leads_to_the_folder(name):
    link = ROOT / "skipguide" / name
    if link.is_symlink():
        assert not link.readlink().is_absolute()
        assert link.resolve() == ROOT / name
    else:  # a clone without symlinks: the package mapping alone has to do
        module = importlib.import_module(f"skipguide.{name}")
        assert Path(module.__file__).resolve().parent == ROOT / name


@pytest.mark.parametrize("name", ["pipelines", "vision"])
def test_a_second_import_name_is_refused(name):
    right = python(f"import skipguide.{name} as m; print(m.__name__)")
    assert right.stdout.strip() == f"skipguide.{name}", right.stderr
    wrong = python(f"import {name}")
    assert wrong.returncode != 0
    assert f"import skipguide.{name}" in wrong.stderr


def test_guard_is_the_last_statement():
    for name in ("pipelines", "vision"):
        last = ast.parse((ROOT / name / "__init__.py").read_text(encoding="utf-8")).body[-1]
        assert isinstance(last, ast.If)
        assert ast.unparse(last.test) == f"__name__ != 'skipguide.{name}'"


@pytest.mark.parametrize("path", sorted((ROOT / "skipguide").glob("*.py")), ids=lambda p: p.name)
def test_core_imports_nothing_above_torch(path):
    names = imported_at_module_level(path)
    assert not {name for name in names if name.split(".")[0] in HEAVY}
    above = tuple(f"skipguide.{driver}" for driver in ("pipelines", "vision", "llm", "cli"))
    assert not {name for name in names if name.startswith(above)}, "drivers import the core, not the reverse"


@pytest.mark.parametrize("folder", ["skipguide", "pipelines", "vision"])
def test_imports_are_absolute(folder):
    for path in (ROOT / folder).rglob("*.py"):
        relative = {name for name in imported_at_module_level(path) if name.startswith(".")}
        assert not relative, f"{path.relative_to(ROOT)} imports {relative}: write the full name"


@traced_plans  # with an older torch its compiler is imported, to leave the gates out
def test_import_loads_torch_and_little_else():
    code = (
        "import json, sys, torch; before = set(sys.modules); import skipguide;"
        "print(json.dumps(sorted({n.split('.')[0] for n in set(sys.modules) - before})))"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    loaded = set(json.loads(result.stdout)) - {"skipguide"}
    assert not loaded & HEAVY
    third_party = {name for name in loaded if name not in sys.stdlib_module_names}
    assert not third_party, f"`import skipguide` also imports {sorted(third_party)}"


def test_checkers_are_pinned_in_one_place():
    test_extra = PYPROJECT["project"]["optional-dependencies"]["test"]
    assert [re.match(r"(ruff|mypy)==\d", entry) is not None for entry in test_extra[:2]] == [True, True]
    for path in (ROOT / ".pre-commit-config.yaml", ROOT / ".ci" / "run"):
        assert not re.search(r"\d+\.\d+\.\d+", path.read_text(encoding="utf-8")), path.name


@pytest.mark.slow
def test_wheel_holds_every_file(tmp_path):
    """What git tracks under the three folders is what a user gets."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\0"
    )
    source = tmp_path / "source"
    for name in filter(None, listed):
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and not name.startswith(("tests/", "demos/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, source / name)
    built = python(f"from setuptools import build_meta as b; b.build_wheel({str(tmp_path)!r})", cwd=source)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = set()
    for path in source.rglob("*"):
        name = path.relative_to(source)
        if path.is_file() and name.parts[0] in FOLDERS.values() and "build" not in name.parts:
            wanted.add(str(name) if name.parts[0] == "skipguide" else f"skipguide/{name}")
    assert wanted <= held, sorted(wanted - held)
    assert {name.split("/")[0].split("-")[0] for name in held} == {"skipguide"}, "nothing leaks to the top level"
