"""The arguments that several commands share, and what their values may be."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from skipguide.errors import SkipError
from skipguide.parts import PARTS
from skipguide.pipelines.formulas import FORMULAS
from skipguide.pipelines.pass_schedule import PassSchedule

BUNDLED = "tiny-t2v"
CHOSEN = ("auto", "stochastic")
DTYPES = ("auto", "float32", "bfloat16", "float16")
PRESETS = ("frugal",)  # skipguide.pipelines.presets.NAMED, without its imports
TAILS = ("separate", "batched", "auto")
GUIDANCE_FLAGS = (
    *("layers", "scale", "part", "strength", "heads", "part_options", "formula", "rescale"),
    *("start", "stop", "every", "cfg_interval", "cfg_every", "schedule", "tail", "preset"),
)


class OneLineParser(argparse.ArgumentParser):
    """A parser that keeps the line breaks of its examples, and complains in one line with exit status 2."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage, and leave."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}{self._meant(message)}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The same; a flag that is not known is answered by the command that does not know it."""
        found, left = self.parse_known_args(args, namespace)
        if left:
            self._command(found).error(f"unrecognized arguments: {' '.join(left)}")
        return found

    def _command(self, found: argparse.Namespace) -> OneLineParser:
        """The parser of the command that was typed, and of its action."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and (typed := getattr(found, action.dest, None)):
                inner = action.choices[typed]
                return inner._command(found) if isinstance(inner, OneLineParser) else self
        return self

    def _meant(self, message: str) -> str:
        """What is like what was typed, if it is a flag or a command that is not known."""
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)|argument COMMAND: invalid choice: '(\S+)'", message)
        if unknown is None:
            return ""
        flags = [flag for action in self._actions for flag in action.option_strings]
        commands = [name for action in self._actions if action.dest == "command" for name in action.choices or ()]
        typed = (unknown[1] or "").lstrip("-").replace("-", "_")
        for action in self._actions:
            if typed and not action.option_strings and action.dest in (typed, f"{typed}s"):
                return f": the {typed} is given without a flag; see {self.prog} --help"
        near = difflib.get_close_matches(unknown[1] or unknown[2], flags if unknown[1] else commands, n=1)
        return f": did you mean {near[0]}?" if near else f"; see {self.prog} --help"


def examples(*lines: str) -> str:
    """The end of a help text."""
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


class Default(int):
    """A number that nobody typed: the same one, typed, is meant."""


def number(
    kind: type[int] | type[float], low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> Callable[[str], Any]:
    """A type for argparse: an int or a finite float, at least `low` (or `above` it) and at most `high`."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and (low < value if above else low <= value) and value <= high:
            return value
        what = "a whole number" if kind is int else "a number"
        bounds = [f"above {low:g}" if above else f"at least {low:g}"] if low > -math.inf else []
        bounds += [f"at most {high:g}"] if high < math.inf else []
        raise argparse.ArgumentTypeError(f"expected {' '.join([what, ' and '.join(bounds)]).strip()}; got {text!r}")

    return parse


def unicode_text(text: str) -> str:
    """A type for argparse: a text that UTF-8 can hold; bytes of another encoding arrive as halves of pairs.

    Example:
        >>> unicode_text("a red circle")
        'a red circle'
    """
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise argparse.ArgumentTypeError(f"expected words; got {text!r}, of which a half (a surrogate) is missing")
    return text


def layer_numbers(text: str) -> list[int]:
    """Read `5`, `5,7` or `5-7`."""
    layers: list[int] = []
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(
                f"expected block numbers such as 5, 5,7 or 5-7; got {text!r} (put the prompt before --layers)"
            )
        layers += range(int(first), int(last if dash else first) + 1)
    return layers


def layers_or_choice(text: str) -> list[int] | str:
    """Read block numbers, or how they are chosen: `auto`, `stochastic`."""
    return text if text in CHOSEN else layer_numbers(text)


def scale_or_scales(text: str) -> float | dict[str, float]:
    """Read `1.5`, or a scale for each of what a model predicts: `video=1,audio=0.5`.

    Example:
        >>> scale_or_scales("1.5"), scale_or_scales("video=1,audio=0.5")
        (1.5, {'video': 1.0, 'audio': 0.5})
    """
    scale = number(float)
    if "=" not in text:
        return float(scale(text))
    pairs = [item.strip().partition("=") for item in text.split(",")]
    if not all(name and equals for name, equals, _ in pairs) or len({name for name, *_ in pairs}) < len(pairs):
        raise argparse.ArgumentTypeError(f"expected a number, or video=1,audio=0.5; got {text!r}")
    return {name: scale(value) for name, _, value in pairs}


class Layers(argparse.Action):
    """Collects `--layers 5 7` and `--layers 5,7` into one list, each number once; `auto` stands alone."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        """Store the flat list, or the word."""
        if any(isinstance(group, str) for group in values):
            if len(values) > 1:
                parser.error(f"argument {option}: {' and '.join(CHOSEN)} stand alone")
            setattr(namespace, self.dest, values[0])
            return
        setattr(namespace, self.dest, list(dict.fromkeys(layer for group in values for layer in group)))


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--device`, `--dtype`."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=BUNDLED,
        help="a bundled model, a folder, or a hub id such as Lightricks/LTX-Video (default: %(default)s)",
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes the best there is")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="auto is bfloat16 on cuda, float16 on mps, float32 on the CPU and for bundled models",
    )


def add_sampling(parser: argparse.ArgumentParser, *, optional_prompt: bool = False) -> None:
    """Add the prompt and what the pipeline is called with."""
    if optional_prompt:
        parser.add_argument("prompt", nargs="?", type=unicode_text, help="what to show")
    else:
        parser.add_argument("prompt", type=unicode_text, help="what to show")
    group = parser.add_argument_group("sampling", "what is not given is the model's own default")
    group.add_argument("--steps", metavar="N", type=number(int, 1), help="denoising steps")
    group.add_argument(
        "--seed",
        metavar="N",
        type=number(int, 0, 2**63 - 1),
        default=0,
        help="of a CPU generator (default: %(default)s)",
    )
    group.add_argument("--guidance-scale", metavar="X", type=number(float), help="classifier-free guidance")
    group.add_argument("--negative-prompt", metavar="TEXT", type=unicode_text, help="what to steer away from")
    group.add_argument("--height", metavar="N", type=number(int, 1), help="in pixels")
    group.add_argument("--width", metavar="N", type=number(int, 1), help="in pixels")
    group.add_argument("--frames", metavar="N", type=number(int, 1), help="length of the clip")
    group.add_argument("--image", metavar="FILE", type=Path, help="the picture to start from (image-to-video models)")


def add_guidance(parser: argparse.ArgumentParser, *, layers: bool = True) -> None:
    """Add skip guidance; without `layers` for a command that has its own `--layers` and scales."""
    silent = "what is not given: whole blocks, formula stg"
    if layers:
        silent = (
            "without --layers, what is not given is the model's preset (skipguide describe), scale and part included; "
            "with --layers: scale 1, whole blocks, formula stg"
        )
    group = parser.add_argument_group("skip guidance", silent)
    if layers:
        group.add_argument("--preset", choices=PRESETS, help="settings that were measured to win; others change them")
        group.add_argument(
            "--layers",
            metavar="N",
            nargs="+",
            type=layers_or_choice,
            action=Layers,
            help="blocks to leave out: 5 7, or 5,7, or 5-7; auto (by `skipguide rank`), or stochastic",
        )
        group.add_argument(
            "--scale",
            metavar="X",
            type=scale_or_scales,
            help="strength; 0 is no skip guidance; video=1,audio=0.5 for a model that makes both",
        )
    group.add_argument("--part", choices=PARTS, help="what of a block is left out or weakened")
    group.add_argument(
        "--strength", metavar="X", type=number(float, 0, 1), help="how far the part is weakened, 0 to 1 (default: 1)"
    )
    group.add_argument(
        "--heads",
        metavar="N",
        nargs="+",
        type=layer_numbers,
        action=Layers,
        help="of the attention, from 0 on: only these (default: all)",
    )
    group.add_argument(
        "--part-options",
        metavar="NAME=VALUE",
        nargs="+",
        type=name_and_value,
        action=Options,
        help="what else the part can be told: sigma=2 of attn_blur, window=4 of window_time, ratio=0.2 of self_swap",
    )
    group.add_argument("--formula", choices=tuple(FORMULAS), help="how the skipped pass is used")
    group.add_argument(
        "--rescale", metavar="X", type=number(float, 0, 1), help="pull the contrast back, 0 to 1 (default: 0)"
    )
    group.add_argument("--start", metavar="X", type=number(float, 0, 1), help="first step, as a fraction (default: 0)")
    group.add_argument(
        "--stop", metavar="X", type=number(float, 0, 1), help="step to stop before, as a fraction (default: 1)"
    )
    group.add_argument(
        "--every", metavar="N", type=number(int, 1), help="renew the guidance every so many steps (default: 1)"
    )
    group.add_argument(
        "--tail", choices=TAILS, help="run the skipped rows apart, or in one batch with the others (default: separate)"
    )
    group.add_argument(
        "--cfg-interval",
        nargs=2,
        metavar=("X", "Y"),
        type=number(float, 0, 1),
        help="classifier-free guidance in these steps only, as fractions; elsewhere one pass instead of two",
    )
    group.add_argument(
        "--cfg-every",
        metavar="N",
        type=number(int, 1),
        help="run the unconditional pass every so many steps, and use its last difference in between (default: 1)",
    )
    group.add_argument(
        "--schedule",
        metavar="FILE",
        type=schedule_file,
        help="what runs at each step, as `skipguide tune` writes it; also says how many steps there are",
    )


def schedule_file(text: str) -> dict[str, Any]:
    """A type for argparse: the `PassSchedule` in a file, as plain data."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    try:
        return PassSchedule.load_json(text).to_dict()
    except SkipError as error:  # which argparse would take for a word of its own
        raise argparse.ArgumentTypeError(str(error)) from error


def name_and_value(text: str) -> tuple[str, Any]:
    """A type for argparse: NAME=VALUE, where the value is JSON or else a word."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE; got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


class Options(argparse.Action):
    """Several NAME=VALUE as one mapping."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Keep the mapping."""
        setattr(namespace, self.dest, dict(values))


def add_output(parser: argparse.ArgumentParser, what: str, *, clip: bool = True) -> None:
    """Add `-o` and `--force`, and for a clip how it is played."""
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="FILE", type=Path, help=what)
    group.add_argument("--force", action="store_true", help="replace a file that exists")
    if clip:
        group.add_argument("--fps", metavar="X", type=number(float, 0, above=True), help="frames per second")
        group.add_argument(
            "--zoom",
            metavar="N",
            type=number(int, 1),
            help="enlarge so many times (default: until 256 pixels high or more)",
        )


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of the named arguments that were given."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}
