"""App: the page with its tabs, and the server for it, which nobody but this machine reaches and which asks nobody."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Before gradio is imported: it reads them then, and its libraries as well.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio
import huggingface_hub.constants

from skipguide.cli.studio import clips, language, region, video
from skipguide.cli.studio.guarded import HOST, Guarded
from skipguide.cli.studio.run import Runs
from skipguide.cli.studio.shelf import Shelf

huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # where another library imported it before
LARGEST_UPLOAD = 20_000_000  # bytes
FONTS = ("system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")


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
