"""Layout graphs in pickles of networkx, read without running code that the file may hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from skipguide.errors import SkipError
from skipguide.vision.floorplan.graph import LayoutGraph

PLAIN = {"builtins": {"set", "frozenset", "complex", "slice", "range", "object"}, "collections": {"OrderedDict"}}
ARRAYS = {"_reconstruct", "scalar", "ndarray", "dtype", "_frombuffer"}
NETWORKS = {f"networkx.classes.{name}" for name in ("graph", "digraph", "multigraph", "multidigraph")}
VIEWS = {"networkx.classes.coreviews", "networkx.classes.reportviews"}


class _GraphUnpickler(pickle.Unpickler):
    """Loads networkx' classes, NumPy's arrays and plain data only, because a pickle could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)  # of protocols 0 to 2
        if (module, name) == ("copyreg", "_reconstructor"):
            return _empty
        if (module, name) == ("_codecs", "encode"):
            return _bytes
        if (
            name in PLAIN.get(module, ())
            or (module.split(".")[0] == "numpy" and name in ARRAYS)
            or (module in NETWORKS and name.endswith("Graph"))
            or (module in VIEWS and name.endswith("View"))
        ):
            return super().find_class(module, name)
        raise SkipError(f"the graph file wants {module}.{name}, which no layout graph needs: it was not loaded")


def _empty(kind: type, base: type, state: Any) -> Any:
    """An object without its attributes, as protocols 0 and 1 make them."""
    if base is not object or state is not None:
        raise SkipError(f"the graph file builds a {kind.__name__} on {base.__name__}, which no layout graph needs")
    return object.__new__(kind)


def _bytes(text: str, encoding: str) -> bytes:
    """Bytes, which protocols 0 to 2 write as text."""
    if encoding != "latin1":
        raise SkipError(f"the graph file has bytes as {encoding}, which no pickle writes")
    return text.encode("latin1")


def read_graph(path: str | Path) -> LayoutGraph:
    """A layout graph from a pickle of networkx, without running code that the file may hold.

    Raises:
        SkipError: if the file is damaged, holds something else, or a room or connection is not as described.
    """
    try:
        with Path(path).open("rb") as file:
            graph = _GraphUnpickler(file).load()
    except SkipError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise SkipError(f"{path} is not a pickled networkx graph: {error}") from error
    if not (hasattr(graph, "nodes") and hasattr(graph, "edges")):
        raise SkipError(f"{path} holds a {type(graph).__name__}; expected a networkx graph")
    try:
        return LayoutGraph.from_networkx(graph)
    except SkipError as error:
        raise SkipError(f"{path}: {error}") from error
    except Exception as error:  # what calls itself a graph can raise anything
        raise SkipError(f"{path} holds no layout graph: {type(error).__name__}") from error
