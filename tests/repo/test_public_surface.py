"""What is called from outside: names, parameters, settings, commands and files of version 1, as they were pinned.

`python tests/repo/test_public_surface.py --write` pins what is there now; names may be added, none may go.
"""

import argparse
import dataclasses
import importlib
import inspect
import json
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "public_surface.json"
FILES = ROOT / "tests" / "golden" / "json_version_1"
PACKAGES = (
    "skipguide",
    "skipguide.pipelines",
    "skipguide.llm",
    "skipguide.vision",
    "skipguide.vision.layer_masking",
)
FURTHER = {
    "skipguide.families": ("FAMILIES",),
    "skipguide.vision.fixed_point": ("fixed_point",),
    "skipguide.vision.segmentation": ("bce_dice_loss",),
    "skipguide.assets": ("bundled",),
    "skipguide.errors": ("SkipError", "UnknownBlockError", "LostGateError", "NoEffectError"),
    "skipguide.cli": ("main",),
}
# what a handle or map is made with, and how it is annotated, may change; what a user calls on it may not
HANDLES = (
    *("AppliedGuidance", "AppliedGuide", "AppliedMask", "AppliedNag", "AppliedReuse", "AppliedSublayers"),
    "AppliedTangential",
    *("SublayerMap", "SublayerSite", "Watch"),
)
# old keyword -> new one: the old one is an alias that warns
RENAMED = {
    "Block": {"servants": "helper_modules"},
    "SublayerSite": {"serves": "helper_modules"},
    "SublayerMap": {"nothings": "none_outputs"},
    "Sublayer": {"nothings": "none_outputs", "serves": "helper_modules"},
    "BlockSpec": {"nothings": "none_outputs"},
}


def parameters(found: Any) -> list[list[str]] | None:
    """Name, kind and default of every parameter; None where there is no signature."""
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return None
    listed = []
    for each in signature.parameters.values():
        default = "" if each.default is each.empty else repr(each.default)
        listed.append([each.name, each.kind.name, default if " at 0x" not in default else "an object"])
    return listed


def members(cls: type) -> dict[str, Any]:
    """The public methods (with their parameters), properties and attributes of a class."""
    found: dict[str, Any] = {}
    for name in dir(cls):
        if name.startswith("_") or getattr(cls, "__module__", "").startswith("torch"):
            continue
        value = inspect.getattr_static(cls, name)
        owner = next((base for base in cls.__mro__ if name in base.__dict__), cls)
        if not owner.__module__.startswith("skipguide"):
            continue
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        found[name] = parameters(value) if inspect.isfunction(value) else "attribute"
    return found


def described(name: str, found: Any) -> dict[str, Any]:
    if inspect.isclass(found):
        entry: dict[str, Any] = {"kind": "class", "members": members(found)}
        if issubclass(found, Exception):
            entry["bases"] = [base.__name__ for base in found.__mro__[1:]]
        elif name not in HANDLES:
            entry["parameters"] = parameters(found)
        return entry
    if callable(found):
        return {"kind": "function", "parameters": parameters(found)}
    return {"kind": type(found).__name__, "keys": sorted(found) if isinstance(found, (dict, tuple, list)) else None}


def commands(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Every command: its flags with their defaults, and its positional arguments."""
    found: dict[str, Any] = {"flags": {}, "arguments": [], "commands": {}}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found["commands"] = {name: commands(sub) for name, sub in action.choices.items()}
        elif action.option_strings:
            for flag in action.option_strings:
                found["flags"][flag] = repr(action.default)
        else:
            found["arguments"].append(action.dest)
    return found


def surface() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        names[package] = {name: described(name, getattr(module, name)) for name in module.__all__}
    for package, wanted in FURTHER.items():
        module = importlib.import_module(package)
        names.setdefault(package, {}).update({name: described(name, getattr(module, name)) for name in wanted})
    from skipguide.assets import bundled
    from skipguide.cli import build_parser

    return {
        "names": names,
        "commands": commands(build_parser()),
        "bundled": sorted(path.name for path in bundled().parent.iterdir() if path.is_dir() and path.name[0] != "_"),
        "entry_point_groups": ["skipguide.blocks", "skipguide.pipelines"],
    }


PINNED = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {"names": {}}


def same_parameters(name: str, old: list[list[str]] | None, new: list[list[str]] | None) -> None:
    """The old ones are there, those without a name in the call in their places; new ones have defaults."""
    if old is None:
        return
    assert new is not None
    renamed = RENAMED.get(name, {})
    wanted = [[renamed.get(each[0], each[0]), *each[1:]] for each in old]
    by_name = {each[0]: each for each in new}
    for each in wanted:
        assert by_name.get(each[0]) == each, f"{name}: {each} was {by_name.get(each[0])}"
    added = [each for each in new if each[0] not in {w[0] for w in wanted}]
    assert all(each[2] or each[1].startswith("VAR") for each in added), f"{name}: {added} must have defaults"
    by_place = [each[0] for each in wanted if each[1] == "POSITIONAL_OR_KEYWORD"]
    assert [each[0] for each in new if each[1] == "POSITIONAL_OR_KEYWORD"][: len(by_place)] == by_place


@pytest.mark.parametrize("package", sorted(PINNED["names"]))
def test_names_and_parameters(package):
    module = importlib.import_module(package)
    for name, old in PINNED["names"][package].items():
        found = getattr(module, name)
        now = described(name, found)
        assert now["kind"] == old["kind"], name
        if old.get("keys"):
            assert set(old["keys"]) <= set(now["keys"]), name
        if "bases" in old:
            assert now["bases"] == old["bases"]
        same_parameters(name, old.get("parameters"), now.get("parameters"))
        renamed = RENAMED.get(name, {})
        for member, wanted in old.get("members", {}).items():
            here = renamed.get(member, member)
            assert here in now["members"] or hasattr(found, here), f"{name}.{member} is gone"
            if isinstance(wanted, list) and isinstance(now["members"].get(here), list):
                same_parameters(f"{name}.{member}", wanted, now["members"][here])


def same_commands(where: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    for flag, default in old["flags"].items():
        assert new["flags"].get(flag) == default, f"{where} {flag}"
    assert new["arguments"] == old["arguments"], where
    for name, sub in old["commands"].items():
        same_commands(f"{where} {name}", sub, new["commands"][name])


def test_commands_and_flags():
    from skipguide.cli import build_parser

    same_commands("skipguide", PINNED["commands"], commands(build_parser()))


def test_bundled_models():
    from skipguide.assets import bundled

    for name in PINNED["bundled"]:
        assert bundled(name).is_dir()


def test_entry_point_groups_are_read():
    tree = "\n".join(
        path.read_text(encoding="utf-8") for top in ("skipguide", "pipelines") for path in (ROOT / top).rglob("*.py")
    )
    for group in PINNED["entry_point_groups"]:
        assert f'_GROUP = "{group}"' in tree


def test_scripts_of_the_package():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"skipguide": "skipguide.cli:main"}
    assert importlib.util.find_spec("skipguide.cli.__main__") is not None


@pytest.mark.parametrize("old", ["nothings", "serves"])
def test_an_old_keyword_warns_and_works(old):
    import skipguide

    value = 1 if old == "nothings" else ("norm",)
    for cls in ("Sublayer", "BlockSpec"):
        names = RENAMED[cls]
        if old not in names:
            continue
        kind = getattr(skipguide, cls)
        with pytest.warns(FutureWarning, match=names[old]):
            made = kind("path", **{old: value})
        assert made == kind("path", **{names[old]: value})
        with pytest.warns(FutureWarning, match=names[old]):
            assert dataclasses.replace(made, **{old: value}) == made
        with pytest.warns(FutureWarning, match=names[old]):
            assert getattr(made, old) == value


@pytest.mark.parametrize("path", sorted(FILES.glob("*.json")), ids=lambda path: path.stem)
def test_files_of_version_1_are_read(path):
    held = json.loads(path.read_text(encoding="utf-8"))
    cls = getattr(importlib.import_module(held["package"]), held["class"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cls.from_dict(held["data"])
    again = found.to_dict()
    assert cls.from_dict(json.loads(json.dumps(again))) == found
    # a setting that was merged into another is read, and written in its new form
    for key, value in held.get("reads_as", held["data"]).items():
        assert json.loads(json.dumps(again))[key] == value, key


def write() -> None:
    GOLDEN.write_text(json.dumps(surface(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write()
