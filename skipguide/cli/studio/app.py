"""App: the page with its tabs, and the server for it, which nobody but this machine reaches and which asks nobody."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before gradio is imported: it reads them then, and its libraries as well.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio

from skipguide.cli.studio import clips, language, region, video
from skipguide.cli.studio.run import Runs
from skipguide.cli.studio.shelf import Shelf

HOST = "127.0.0.1"
LARGEST_UPLOAD = 20_000_000  # bytes
# Whatever a library's page would load from elsewhere, the browser refuses.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
FONTS = ("system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class Guarded:
    """A layer around the server: pages may load from here only, and other names for this machine are not answered.

    A page of somebody else's that resolves its own name to this machine would otherwise be of the same origin.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and _host(scope) not in (HOST, "localhost"):
            await send({"type": "http.response.start", "status": 421, "headers": []})
            await send({"type": "http.response.body", "body": b"the studio answers to 127.0.0.1 only"})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        await self.app(scope, receive, guarded)


def _host(scope: Message) -> str:
    named = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
    return named.rsplit(":", 1)[0]


def build(files: Path, model: str = "tiny-t2v") -> gradio.Blocks:
    """The page.

    Args:
        files: the folder for what it shows.
        model: the pipeline that is chosen at first.
    """
    runs = Runs()

    def new_file(suffix: str) -> str:
        return str(files / f"{uuid.uuid4().hex}{suffix}")

    with gradio.Blocks(title="skipguide studio", analytics_enabled=False) as page:
        gradio.Markdown("# skipguide studio\nLeave layers out, and look.")
        with gradio.Tab("Guidance", id="guidance"):
            tab = video.VideoTab(Shelf(clips.load), runs, new_file)
            video.build(tab, page, model)
        with gradio.Tab("Region", id="region"):
            region.build(region.RegionTab(Shelf(region.load)))
        with gradio.Tab("Language model", id="language"):
            language.build(language.LanguageTab(Shelf(language.load)))
        page.unload(tab.leave)
    return page


@contextmanager
def served(model: str = "tiny-t2v", port: int | None = None) -> Iterator[str]:
    """The studio's address while it runs; afterwards its folder is gone.

    Args:
        model: the pipeline that is chosen at first.
        port: of this machine; None takes a free one from 7860 on.

    Raises:
        OSError: if the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="skipguide-studio-") as folder:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            page = build(Path(folder), model)
            page.queue(max_size=32)
            try:
                yield _launch(page, port)
            finally:
                page.close(verbose=False)
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def _launch(page: gradio.Blocks, port: int | None) -> str:
    from starlette.middleware import Middleware

    _, address, _ = page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        strict_cors=True,
        max_file_size=LARGEST_UPLOAD,
        footer_links=[],
        theme=gradio.themes.Base(font=list(FONTS), font_mono=list(MONO)),
        app_kwargs={"middleware": [Middleware(Guarded)]},
    )
    return str(address)
