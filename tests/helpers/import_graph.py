"""Which file of the library imports which, read from the sources: imports in functions and under TYPE_CHECKING too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "skipguide": ROOT / "skipguide",
    "skipguide.pipelines": ROOT / "pipelines",
    "skipguide.vision": ROOT / "vision",
}
Graph = dict[str, set[str]]


def library_files() -> dict[str, Path]:
    """Dotted name -> file; a package is its `__init__`. The two links are followed by their names."""
    found: dict[str, Path] = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if package == "skipguide" and inside.parts[0] in ("pipelines", "vision"):
                continue  # seen through a link (rglob follows links before Python 3.13)
            parts = [package, *inside.with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _holds_code(tree: ast.Module) -> bool:
    """Whether an `__init__` does more than to name, import and refuse."""
    return any(isinstance(node, ast.ClassDef | ast.FunctionDef) for node in tree.body if not _is_lazy(node))


def _is_lazy(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")


def _named(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Module and name of every import, wherever it stands; the name is empty for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def import_graph(files: dict[str, Path] | None = None) -> Graph:
    """File -> the files of the library that it imports."""
    files = files or library_files()
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    code = {name for name, tree in trees.items() if files[name].name == "__init__.py" and _holds_code(tree)}
    graph: Graph = {name: set() for name in files}
    for name, tree in trees.items():
        for module, item in _named(tree):
            target = f"{module}.{item}" if f"{module}.{item}" in files else module
            if target not in files:
                continue
            graph[name].add(target)
            # importing a module runs the packages around it; one that holds code is a file like any other
            steps = target.split(".")
            around = {".".join(steps[:n]) for n in range(1, len(steps))}
            graph[name] |= (around & code) - {name}
    return graph


def imports_by_string(files: dict[str, Path] | None = None) -> list[str]:
    """Places where a module of the library is imported by a string."""
    return [
        f"{name}:{node.lineno}"
        for name, path in (files or library_files()).items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__"))
    ]


def circles(graph: Graph) -> list[list[str]]:
    """The strongly connected components of more than one file (Tarjan), largest first."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph[node]:
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            component = [stack.pop()]
            while component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1 or node in graph[node]:
                found.append(sorted(component))

    for node in graph:
        if node not in order:
            visit(node)
    return sorted(found, key=len, reverse=True)
