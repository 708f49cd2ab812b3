"""Skipping in vision models: gates, masks, tuning, nested and implicit networks.

- `skipnet`, `SkipNet`: each image decides which blocks run.
- `LayerMask`, `masked_forward`: a region that is absent from every layer, not painted over.
- `SkipTuner`, `TuneConfig`, `ClassSkip`: CLIP adapted to a few images, without its first layers in the gradient.
- `UNetPlusPlus`: a segmentation network whose depth is chosen when it runs.
- `FloorPlanNet`, `LayoutGraph`, `GraphConv`: rooms from walls and a layout graph.
- `SkipDEQ`: an equilibrium, solved for from a learned guess.

`help(skipguide.vision.LayerMask)` and the like have the arguments, errors and an example.
"""

from typing import TYPE_CHECKING, Any

from skipguide.errors import no_such_name

if TYPE_CHECKING:
    from skipguide.vision.floorplan import FloorPlanNet, GraphConv, LayoutGraph
    from skipguide.vision.layer_masking import LayerMask, masked_forward
    from skipguide.vision.skip_deq.network import SkipDEQ
    from skipguide.vision.skip_tuning import ClassSkip, SkipTuner, TuneConfig
    from skipguide.vision.skipnet import SkipNet, skipnet
    from skipguide.vision.unetpp.network import UNetPlusPlus

__all__ = [
    "ClassSkip",
    "FloorPlanNet",
    "GraphConv",
    "LayerMask",
    "LayoutGraph",
    "SkipDEQ",
    "SkipNet",
    "SkipTuner",
    "TuneConfig",
    "UNetPlusPlus",
    "masked_forward",
    "skipnet",
]


def __getattr__(name: str) -> Any:
    """The systems are imported when they are asked for: each needs libraries that the others do without."""
    home: dict[str, Any]
    match name:
        case "ClassSkip" | "SkipTuner" | "TuneConfig":
            from skipguide.vision.skip_tuning import ClassSkip, SkipTuner, TuneConfig

            home = {"ClassSkip": ClassSkip, "SkipTuner": SkipTuner, "TuneConfig": TuneConfig}
        case "FloorPlanNet" | "GraphConv" | "LayoutGraph":
            from skipguide.vision.floorplan import FloorPlanNet, GraphConv, LayoutGraph

            home = {"FloorPlanNet": FloorPlanNet, "GraphConv": GraphConv, "LayoutGraph": LayoutGraph}
        case "LayerMask" | "masked_forward":
            from skipguide.vision.layer_masking import LayerMask, masked_forward

            home = {"LayerMask": LayerMask, "masked_forward": masked_forward}
        case "SkipDEQ":
            from skipguide.vision.skip_deq import SkipDEQ

            home = {"SkipDEQ": SkipDEQ}
        case "SkipNet" | "skipnet":
            from skipguide.vision.skipnet import SkipNet, skipnet

            home = {"SkipNet": SkipNet, "skipnet": skipnet}
        case "UNetPlusPlus":
            from skipguide.vision.unetpp import UNetPlusPlus

            home = {"UNetPlusPlus": UNetPlusPlus}
        case _:
            raise no_such_name(__name__, name, __all__)
    return home[name]


def __dir__() -> list[str]:
    return __all__


if __name__ != "skipguide.vision":
    raise ImportError(
        f"this folder is the package skipguide.vision and was imported as {__name__!r}; "
        "write `import skipguide.vision` (a second name would load every module twice)"
    )
