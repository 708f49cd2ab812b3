"""Prompts from a file: one clip per line, a plain prompt or a JSON object with settings of its own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NoReturn

from skipguide.cli.arguments import GUIDANCE_FLAGS, OneLineParser, add_guidance, add_sampling, unicode_text
from skipguide.errors import SkipError
from skipguide.files import parse_json


class _LineParser(OneLineParser):
    """Reads the settings of one line like arguments; what argparse says of them becomes a SkipError."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the line."""
        raise SkipError(message.replace("argument --", "").replace("--", ""))


def read_prompts(path: Path, args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of every clip that a file asks for.

    A line is a prompt, or a JSON object with `prompt` and any of the sampling and skip guidance settings, named as on
    the command line: `{"prompt": "a red circle", "seed": 3, "scale": 2, "layers": [5, 7]}`. What a line does not say
    holds as it was given on the command line. Empty lines, and lines that begin with #, are passed over: a prompt that
    begins so is written as an object.

    Args:
        path: the file, UTF-8.
        args: the parsed command line.

    Returns:
        A namespace per clip, in the order of the file.

    Raises:
        SkipError: for a file that cannot be read, has no prompt, or has a line that cannot be understood.
    """
    try:
        # lines end where text editors end them: splitlines would split at a form feed or U+2028 inside a prompt too
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SkipError(f"cannot read the prompts in {path}: {error}") from error
    parser = _LineParser(add_help=False)
    add_sampling(parser)
    add_guidance(parser)
    parser.add_argument("--no-guidance", action="store_true")
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                found.append(_arguments(line.strip(), parser, args))
            except SkipError as error:
                raise SkipError(f"{path}, line {number}: {error}") from error
    if not found:
        raise SkipError(f"{path} has no prompts: expected one on each line")
    return found


def _is_json(line: str) -> bool:
    try:
        parse_json(line, "the line")
    except SkipError as error:
        if isinstance(error.__cause__, ValueError):
            return False
        raise  # JSON that is nested too deep
    return True


def _check_type(action: argparse.Action, value: Any) -> None:
    """Refuse a text where a number is expected, and the other way round: as text, argparse would take either."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, (str, int, float)) and not isinstance(each, bool) for each in values):
        raise SkipError(f"{action.dest} is a text, a number or a list; got {value!r}")
    if action.dest == "layers":  # block numbers, or texts such as "5-7"
        return
    wanted: Any = str if action.type in (None, Path, unicode_text) else (int, float)
    if not all(isinstance(each, wanted) for each in values):
        raise SkipError(f"{action.dest} is a {'text' if wanted is str else 'number'}; got {value!r}")


def _arguments(line: str, parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    own: Any = {"prompt": line}
    if line.startswith("{"):
        try:
            own = parse_json(line, "the line")
        except SkipError as error:
            raise SkipError(f"a line that begins with {{ is a JSON object; this one is not: {error}") from error
    elif line.startswith(("[", '"')) and _is_json(line):
        raise SkipError(f"expected a prompt in words, or a JSON object with one; got the JSON {line}")
    prompt = own.pop("prompt", None)
    if not (isinstance(prompt, str) and prompt.strip()):
        raise SkipError(f"expected a prompt in words; got {prompt!r}")
    known = {action.dest: action for action in parser._actions if action.option_strings}
    if unknown := sorted(set(own) - set(known)):
        raise SkipError(f"no setting {', '.join(unknown)}; expected prompt or {', '.join(known)}")
    words = []
    for name, value in own.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "no_guidance":
            if not isinstance(value, bool):
                raise SkipError(f"no_guidance is true or false; got {value!r}")
            words += [flag] if value else []
        elif name == "part_options" and isinstance(value, dict):
            words += [flag, *(f"{key}={json.dumps(each)}" for key, each in value.items())]
        else:
            _check_type(known[name], value)
            words += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    base = argparse.Namespace(**vars(args))
    guided = [name for name in GUIDANCE_FLAGS if name in own]
    if own.get("no_guidance"):  # the line's own word wins over the command line's, either way
        if guided:
            raise SkipError(f"no_guidance leaves nothing for {guided[0]} to do: give one of them")
        for name in GUIDANCE_FLAGS:
            setattr(base, name, None)
    elif guided:
        base.no_guidance = False
    return parser.parse_args([*words, "--", prompt], namespace=base)
