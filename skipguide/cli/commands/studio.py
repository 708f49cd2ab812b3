"""`skipguide studio`: a page in the browser to compare settings in."""

from __future__ import annotations

import argparse
import importlib.util
import threading
from typing import Any

from skipguide.cli.arguments import BUNDLED, examples, number
from skipguide.errors import SkipError


def register(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "studio",
        help="a page in the browser to compare settings in",
        description="Compare a clip without and with skip guidance in the browser, leave a painted region out of a "
        "classifier, and rank a language model's sublayers. Nobody but this machine reaches the page, and nothing is "
        "sent anywhere; a model that is named by its hub id is downloaded.",
        epilog=examples("skipguide studio", "skipguide studio --model Lightricks/LTX-Video --port 7870"),
    )
    parser.add_argument("--model", default=BUNDLED, help="the pipeline that is chosen at first (default: %(default)s)")
    parser.add_argument(
        "--port", type=number(int, 1, 65535), metavar="N", help="default: the first one that is free from 7860 on"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        SkipError: without gradio.
    """
    if importlib.util.find_spec("gradio") is None:
        raise SkipError('the studio needs gradio: pip install -e ".[studio]"')
    from skipguide.cli.studio.app import served

    with served(args.model, args.port) as address:
        print(f"skipguide studio: {address} (Ctrl-C ends it)", flush=True)
        if args.open:
            import webbrowser

            webbrowser.open(address)
        threading.Event().wait()
