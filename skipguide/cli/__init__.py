"""The command line: `skipguide COMMAND`, one file per command in `commands/`."""

from skipguide.cli.program import COMMANDS, build_parser, main

__all__ = ["COMMANDS", "build_parser", "main"]
