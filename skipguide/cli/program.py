"""The command line: `skipguide COMMAND`, one file per command.

A command is a module with `register(subparsers)`, which adds its parser and sets `run` to a function of the
parsed arguments. Importing any of them costs little: diffusers is imported when a command runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from skipguide.cli.arguments import OneLineParser, examples
from skipguide.cli.commands import (
    bench,
    clip,
    compare,
    describe,
    explain,
    floorplan,
    generate,
    llm,
    rank,
    segment,
    studio,
    sweep,
    tune,
)
from skipguide.errors import SkipError

COMMANDS = (describe, generate, compare, sweep, rank, tune, bench, llm, segment, floorplan, explain, clip, studio)


def build_parser() -> OneLineParser:
    """The parser of the whole command line."""
    parser = OneLineParser(
        prog="skipguide",
        description="Leave layers out of a residual network. "
        "Spatiotemporal Skip Guidance on stock diffusers pipelines.",
        epilog=examples(
            'skipguide generate "a red circle moving right"',
            "skipguide generate --help",
        ),
    )
    parser.add_argument("--version", action="store_true", help="print the versions that matter and stop")
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for command in COMMANDS:
        command.register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name; None takes them from `sys.argv`.

    Returns:
        The exit status: 0; 2 for an argument or a skip that cannot be done (one line on stderr); 1 if the
        machine did not play along (files, memory); 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in arguments
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that it cannot show must not fail finished work
    try:
        return _run(arguments)
    except SystemExit as stop:  # argparse leaves this way, after its one line or its help
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt as stop:
        return _complain(f"interrupted{f': {stop}' if str(stop) else ''}", 130)
    except BrokenPipeError:  # `skipguide describe ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SkipError as error:
        if traceback:
            raise
        return _complain(str(error), 2)
    except (OSError, MemoryError) as error:
        if traceback:
            raise
        return _complain(str(error) or type(error).__name__, 1)
    except RuntimeError as error:
        if traceback or type(error).__name__ != "OutOfMemoryError":
            raise
        return _complain(f"out of memory: try fewer --frames, a smaller --height and --width, or --dtype ({error})", 1)


def _run(arguments: list[str]) -> int:
    parser = build_parser()
    args = parser.parse_args([argument for argument in arguments if argument != "--traceback"])
    if args.version:
        from skipguide.cli.outputs import versions

        print(" ".join(f"{name} {version}" for name, version in versions().items()))
        return 0
    if args.command is None:
        parser.error("no command given; see skipguide --help")
    status: int | None = args.run(args)
    return status or 0


def _complain(message: str, status: int) -> int:
    print(f"skipguide: {' '.join(message.split())}", file=sys.stderr)
    return status
