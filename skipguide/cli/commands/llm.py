"""`skipguide llm`: generate with sublayers left out, with the figures; `skipguide llm rank`: which ones do least."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skipguide.cli.arguments import DTYPES, examples, number, unicode_text
from skipguide.cli.llm_models import BUNDLED_LM

POLICIES = ("adaskip", "measured", "unified", "self-speculative", "none")
ACTIONS = ("generate", "rank")


def register(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "llm",
        help="generate text with sublayers of a language model left out, with the figures",
        description="Language models with attention and MLP sublayers left out: generate text (what is done if no\n"
        "action is named), or rank the sublayers.",
        epilog=examples(
            'skipguide llm "def main("',
            'skipguide llm "def main(" --policy self-speculative',
            'skipguide llm generate "import os" --policy unified --speedup 1.5 --phase both --json',
            "skipguide llm rank -o rank.png",
        ),
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    _register_generate(actions)
    _register_rank(actions)
    parser.set_defaults(run=run)
    # `skipguide llm PROMPT` is `skipguide llm generate PROMPT`
    parse = parser.parse_known_args
    parser.parse_known_args = functools.partial(_with_action, parse)  # type: ignore[method-assign]


def run(args: argparse.Namespace) -> None:
    """Do what the action says."""
    if args.action == "rank":
        from skipguide.cli.commands.llm_rank import run as action
    else:
        from skipguide.cli.commands.llm_generate import run as action
    action(args)


def _with_action(parse: Any, args: Sequence[str], namespace: Any = None) -> Any:
    words = list(args)
    if not words or words[0] not in (*ACTIONS, "-h", "--help"):
        words.insert(0, ACTIONS[0])
    return parse(words, namespace)


def _register_generate(actions: Any) -> None:
    parser: argparse.ArgumentParser = actions.add_parser(
        "generate",
        help="generate with a policy, beside plain decoding",
        description="Generate with a policy and without, in turns, and compare: tokens/s of decoding and the prompt's\n"
        "time, what was left out, bytes of the key-value cache saved, and agreement with the whole model.",
        epilog=examples(
            'skipguide llm "def main("',
            'skipguide llm "def main(" --policy adaskip --skip-ratio 0.25 --phase decode',
            'skipguide llm "What is a residual network?" --model SmolLM2-135M-Instruct.Q4_1.gguf --chat --stats s.json',
        ),
    )
    parser.add_argument("prompt", type=unicode_text, help="the beginning of the text, or with --chat a question")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    group = parser.add_argument_group("policy")
    group.add_argument("--policy", choices=POLICIES, default=POLICIES[0], help="default: %(default)s")
    group.add_argument(
        "--phase", choices=("prefill", "decode", "both"), help="when to skip (default: the policy's own)"
    )
    group.add_argument(
        "--skip-ratio",
        metavar="X",
        type=number(float, 0, 1),
        help="adaskip, measured: share of the sublayers (default: 0.05)",
    )
    group.add_argument(
        "--cost-aware", action="store_true", help="adaskip: by similarity per millisecond, measured here"
    )
    group.add_argument("--no-online", action="store_true", help="adaskip: without the online stage of decoding")
    group.add_argument(
        "--speedup", metavar="X", type=number(float, 1), help="unified: target of the layers' time (default: 2)"
    )
    group.add_argument("--mode", choices=("balanced", "reference"), help="unified: which layers (default: balanced)")
    group.add_argument(
        "--draft-skip",
        metavar="X",
        type=number(float, 0, 1, above=True),
        help="self-speculative: largest share of the time that a drafter leaves out (default: 0.5)",
    )
    group.add_argument(
        "--no-lookup", action="store_true", help="self-speculative: draft by the model alone, not from the text"
    )
    group.add_argument("--max-draft", metavar="N", type=number(int, 1), help="self-speculative: longest draft")
    _add_text(group, "what adaskip and self-speculative measure similarity on, and measured the loss")
    group = parser.add_argument_group("generation", "greedy, if nothing else is said")
    group.add_argument("--max-new-tokens", metavar="N", type=number(int, 2), default=96, help="default: %(default)s")
    group.add_argument("--sample", action="store_true", help="draw tokens instead of taking the most probable")
    group.add_argument("--temperature", metavar="X", type=number(float, 0, above=True), help="with --sample")
    group.add_argument("--seed", metavar="N", type=number(int, 0, 2**63 - 1), default=0, help="with --sample")
    group.add_argument(
        "--rounds", metavar="N", type=number(int, 1), default=3, help="timings of both, in turns (default: %(default)s)"
    )
    _add_model(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    group.add_argument("-o", "--output", metavar="FILE", type=Path, help="write the JSON to a file too")
    group.add_argument("--force", action="store_true", help="replace a file that exists")


def _register_rank(actions: Any) -> None:
    parser: argparse.ArgumentParser = actions.add_parser(
        "rank",
        help="how much every sublayer does, and what it costs",
        description="Rank the sublayers: similarity of the residual stream before and after each (1: it does\n"
        "nothing), growth of the stream's norm, milliseconds on this machine. A picture shows the same.",
        epilog=examples("skipguide llm rank", "skipguide llm rank --text notes.txt --context 256 -o rank.png"),
    )
    group = parser.add_argument_group("measurement")
    _add_text(group, "what similarity is measured on")
    group.add_argument("--tokens", metavar="N", type=number(int, 2), default=256, help="of a piece of the text")
    group.add_argument(
        "--pieces", metavar="N", type=number(int, 1), default=12, help="of the text (default: %(default)s)"
    )
    group.add_argument(
        "--context", metavar="N", type=number(int, 2), default=256, help="tokens at which time is measured"
    )
    group.add_argument(
        "--phase", choices=("prefill", "decode"), default="decode", help="of the time (default: %(default)s)"
    )
    _add_model(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    group.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="the picture, a .png (default: MODEL-rank.png)"
    )
    group.add_argument("--no-picture", action="store_true", help="print only")
    group.add_argument("--force", action="store_true", help="replace a file that exists")


def _add_text(group: Any, what: str) -> None:
    group.add_argument(
        "--text", metavar="FILE", type=Path, help=f"{what} (default: some modules of the standard library)"
    )
    group.add_argument(
        "--stats", metavar="FILE", type=Path, help="what is measured: read from this .json, or kept in it"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=BUNDLED_LM,
        help="a bundled model, a folder, a .gguf file, or a hub id such as Qwen/Qwen3-0.6B (default: %(default)s)",
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes the best there is")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="float32 on the CPU and for bundled models")
