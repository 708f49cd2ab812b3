"""Listings: pages that are made of what is there: pictures, scripts, public names."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path

TITLES = {
    "demos/quality/confirm/results.md": "Does skip guidance help: the confirmation",
    "demos/quality/results.md": "Does skip guidance help: all rows",
    "demos/quality/parts/results.md": "Does skip guidance help: other parts and guiders",
    "demos/benchmarks/stg_cost.md": "What guidance costs",
    "demos/benchmarks/stg_tail.md": "One batch or separate passes",
    "demos/benchmarks/stg_every.md": "Using a direction again",
    "demos/benchmarks/native.md": "What the pipelines' own guidance costs",
    "demos/benchmarks/caches.md": "What guidance costs with a cache",
    "demos/benchmarks/llm_prefill.md": "Prefill time",
    "demos/benchmarks/llm_quality.md": "Quality of a thinned language model",
    "demos/benchmarks/skipnet_time.md": "SkipNet: the time",
    "demos/benchmarks/skip_tuning.md": "Skip Tuning: the time",
    "demos/skipnet/results.md": "SkipNet: the study",
    "demos/layer_masking/results.md": "Layer masking: the study",
    "demos/skip_tuning/study.md": "Skip Tuning: the study",
    "demos/unetpp/results.md": "UNet++: the study",
    "demos/floorplan/results.md": "Floor plans: the study",
    "demos/skip_deq/results.md": "Skip DEQ: the study",
}


def table_title(name: str) -> str:
    """What a table's page is called."""
    return TITLES.get(name, Path(name).stem)


def gallery(pictures: Mapping[str, str]) -> str:
    """Pictures side by side, each with its name."""
    cards = [f":::{{grid-item-card}} {name}\n![{name}]({place})\n:::" for name, place in pictures.items()]
    return "\n".join(["::::{grid} 1 1 2 3", ":gutter: 2", "", *cards, "::::"])


def scripts(places: Mapping[Path, str]) -> str:
    """Scripts, each under the first sentence of its docstring."""
    parts = []
    for path, place in places.items():
        about = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem).split("\n")[0]
        parts += [f"## {about.rstrip('.')}", f"```{{literalinclude}} {place}\n:language: python\n```"]
    return "\n\n".join(parts)


def api(package: str) -> str:
    """Every public name of a package, from its docstring."""
    module = importlib.import_module(package)
    names = [name for name in module.__all__ if not name.startswith("__")]
    lines = [f".. currentmodule:: {package}", "", ".. autosummary::", ""]
    above = package.rpartition(".")[0]
    summed = [f"~{above}.{name}" if _is_elsewhere(package, name) else name for name in names]
    lines += [f"   {each}" for each, name in zip(summed, names, strict=True) if _documented(getattr(module, name))]
    for name in names:
        if not _is_elsewhere(package, name):
            lines += ["", *_entry(package, name, getattr(module, name))]
    return "\n".join(["```{eval-rst}", *lines, "```"])


def commands(program: str) -> str:
    """Every command's help."""
    from skipguide.cli import build_parser

    parser = build_parser()
    (choices,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = [f"## {name}\n\n```text\n{each.format_help().rstrip()}\n```" for name, each in choices.items()]
    return "\n\n".join(parts)


def _is_elsewhere(package: str, name: str) -> bool:
    """Whether the package above has the name too, where it is described then."""
    above = importlib.import_module(package.rpartition(".")[0] or package)
    return above.__name__ != package and name in getattr(above, "__all__", ())


def _documented(found: object) -> bool:
    return inspect.isclass(found) or callable(found)


def _entry(package: str, name: str, found: object) -> list[str]:
    if inspect.isclass(found):
        return [f".. autoclass:: {package}.{name}", "   :members:", "   :show-inheritance:"]
    if callable(found):
        return [f".. autofunction:: {package}.{name}"]
    plain = (
        found
        if isinstance(found, (str, int, tuple))
        else sorted(found)
        if isinstance(found, (set, frozenset, dict))
        else ""
    )
    return [f".. py:data:: {package}.{name}", "", f"   ``{json.dumps(plain, default=str)}``"]
