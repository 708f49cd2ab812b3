"""The parser of the command line: help, examples, wrong arguments."""

import shlex
import subprocess
import sys

import pytest
import torch
from helpers.cli_stub import one_line

from skipguide.cli import COMMANDS, build_parser, main


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(command, capsys):
    name = command.__name__.rpartition(".")[2]
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    lines = [line.strip() for line in text.partition("examples:\n")[2].splitlines()]
    assert len(lines) >= 2
    for line in lines:
        words = shlex.split(line.partition("    (")[0])
        assert words[:2] == ["skipguide", name]
        assert build_parser().parse_args(words[1:]).run is command.run


def test_help_and_a_wrong_argument_load_neither_diffusers_nor_pillow():
    code = (
        "import sys; from skipguide.cli import main; main(['--help']); main(['nope']);"
        "sys.exit(str({'diffusers', 'transformers', 'PIL'} & set(sys.modules) or '') or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_version(capsys):
    assert main(["--version"]) == 0
    assert f"torch {torch.__version__.partition('+')[0]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "no command"),
        (["nope"], "invalid choice: 'nope'"),
        (["generate"], "required: prompt"),
        (["generate", "p", "--nope"], "--nope"),
        (["generate", "p", "--layers", "x"], "expected block numbers such as 5, 5,7 or 5-7; got 'x'"),
        (["generate", "p", "--layers", "-3"], "--layers"),
        (["generate", "--layers", "5", "a prompt"], "put the prompt before --layers"),
        (["generate", "p", "--scale", "nan"], "expected a number; got 'nan'"),
        (["generate", "p", "--steps", "0"], "expected a whole number at least 1; got '0'"),
        (["generate", "p", "--stop", "1.5"], "expected a number at least 0 and at most 1; got '1.5'"),
        (["generate", "p", "--fps", "0"], "expected a number above 0; got '0'"),
        (["generate", "p", "--part", "head"], "invalid choice: 'head'"),
        (["generate", "p", "--formula", "magic"], "invalid choice: 'magic'"),
        (["generate", "p", "--seed", "-1"], "whole number at least 0"),
        (["generate", "p", "--seed", "1.5"], "whole number"),
        (["sweep", "p", "--scales", "a"], "expected a number; got 'a'"),
        (["compare", "p", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_arguments_give_one_line_and_status_2(argv, expected, capsys):
    one_line(capsys, 2, expected, *argv)


@pytest.mark.parametrize(
    ("words", "layers"),
    [(["5", "7"], [5, 7]), (["5,7"], [5, 7]), (["5-7", "1"], [5, 6, 7, 1]), (["2", "2,2"], [2])],
)
def test_layers_are_read_in_every_form(words, layers):
    assert build_parser().parse_args(["generate", "p", "--layers", *words]).layers == layers
