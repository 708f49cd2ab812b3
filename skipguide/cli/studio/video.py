"""Video: the tab that compares a clip without and with skip guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gradio

from skipguide.cli.studio import clips
from skipguide.cli.studio.run import Run, Runs, Stopped
from skipguide.cli.studio.setting import MOST_STEPS, Setting
from skipguide.cli.studio.shelf import Shelf
from skipguide.cli.studio.told import told
from skipguide.errors import SkipError
from skipguide.media import pictures
from skipguide.parts import PARTS

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_FAVOURITES = 24
SAFE = ["download", "fullscreen"]  # not "share", which is to another server


@dataclass
class Pair:
    """What a visitor made last: the two clips of a setting, and the program that makes the guided one."""

    setting: Setting | None = None
    plain: list[Image] = field(default_factory=list)
    guided: list[Image] = field(default_factory=list)
    python: str = ""

    def frame(self, number: int) -> tuple[Image | None, Image | None]:
        """The same frame of both."""
        if not self.plain:
            return None, None
        at = min(max(int(number), 0), len(self.plain) - 1)
        return self.plain[at], self.guided[at]


class VideoTab:
    """The handlers of the tab.

    Args:
        shelf: of pipelines.
        runs: of all visitors.
        files: makes a new path for a file that the page shows.
    """

    def __init__(self, shelf: Shelf[clips.StudioPipeline], runs: Runs, files: Callable[[str], str]) -> None:
        self.shelf, self.runs, self.files = shelf, runs, files

    @told
    def choose(self, model: str, chosen: str) -> tuple[Any, ...]:
        """A model was named: what its controls may be set to, unless it is the one that they are already of."""
        if model.strip() == chosen:
            return (gradio.skip(),) * 7
        with self.shelf.using(model.strip()) as loaded:
            found = clips.controls(loaded)
        preset = found.preset or {
            "layers": [found.layers[len(found.layers) * 3 // 4][1]],
            "scale": 1.0,
            "part": "block",
        }
        return (
            gradio.update(choices=found.layers, value=preset["layers"]),
            preset["scale"],
            gradio.update(choices=found.parts, value=preset["part"]),
            found.guidance_scale,
            found.steps,
            found.words,
            model.strip(),
        )

    @told
    def compare(
        self,
        model: str,
        prompt: str,
        layers: list[int],
        scale: float,
        part: str,
        start: float,
        stop: float,
        guidance_scale: float,
        steps: int,
        seed: int,
        request: gradio.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Both clips of a setting, with what is said on the way."""
        if not layers:
            raise SkipError("choose a layer at least: without one there is nothing to compare")
        setting = Setting(
            model.strip(), prompt, sorted(layers), scale, part, start, stop, guidance_scale, int(steps), int(seed)
        )
        session = request.session_hash or ""
        stage = ["loading the model"]

        def work(tell: clips.Tell) -> tuple[Pair, str, str]:
            with self.shelf.using(setting.model, waiting=lambda: tell(0, setting.steps)) as loaded:
                stage[0] = "without skip guidance"
                plain = clips.make(loaded, setting, tell, guided=False)
                stage[0] = "with skip guidance"
                guided = clips.make(loaded, setting, tell, guided=True)
                program = loaded.python(setting)
            blocks = guided.stats["blocks_plain"]
            pair = Pair(setting, clips.shown(plain.images), clips.shown(guided.images), program)
            return pair, clips.cost(plain, blocks), clips.cost(guided, blocks)

        run = self.runs.start(session, Run(work))
        same = gradio.skip()
        try:
            yield (f"{stage[0]} ...", same, same, same, same, same, same, same)
            for done, total in run.steps():
                yield (f"{stage[0]}: step {done} of {total}", same, same, same, same, same, same, same)
        except Stopped:
            yield ("stopped", same, same, same, same, same, same, same)
            return
        finally:
            self.runs.end(session, run)
        pair, plain_cost, guided_cost = run.result
        last = len(pair.plain) - 1
        middle = last // 2
        change = pictures.difference(pair.plain, pair.guided)
        scrub = gradio.update(maximum=max(last, 1), value=middle, visible=last > 0)
        images = [
            (picture, words) for picture, words in zip(pair.frame(middle), (plain_cost, guided_cost), strict=True)
        ]
        yield (
            f"done: the two differ by {pictures.in_levels(change)} on average",
            pair,
            gradio.update(value=images[0][0], label="without skip guidance"),
            gradio.update(value=images[1][0], label="with skip guidance"),
            plain_cost,
            guided_cost,
            scrub,
            self._moving(pair),
        )

    def stop(self, request: gradio.Request) -> str:
        """The button was pressed."""
        return "stopping ..." if self.runs.stop(request.session_hash or "") else "nothing runs"

    def leave(self, request: gradio.Request) -> None:
        """The page was closed."""
        self.runs.stop(request.session_hash or "")

    @told
    def scrub(self, pair: Pair, frame: int) -> tuple[Any, Any]:
        """The same frame of both clips."""
        return pair.frame(frame)

    @told
    def export(self, pair: Pair) -> tuple[str, str]:
        """The program and the data of the clip that is shown."""
        if pair.setting is None:
            raise SkipError("make a clip first: its program and its settings are shown here then")
        return pair.python, pair.setting.to_json()

    @told
    def keep(self, pair: Pair, kept: list[tuple[Any, str]]) -> tuple[list[tuple[Any, str]], list[tuple[Any, str]]]:
        """The clip that is shown becomes a favourite."""
        if pair.setting is None:
            raise SkipError("make a clip first: there is nothing to keep yet")
        if len(kept) >= MOST_FAVOURITES:
            raise SkipError(f"{MOST_FAVOURITES} favourites are kept: reload the page to begin anew")
        same = pair.setting
        words = f"{same.prompt}; layers {list(same.layers)}, {same.part}, s {same.scale:g}, w {same.guidance_scale:g}"
        kept = [*kept, (pair.frame(len(pair.plain) // 2)[1], f"{words}, seed {same.seed}")]
        return kept, kept

    def _moving(self, pair: Pair) -> str | None:
        """Both clips side by side as a gif, and where they differ; None for single pictures."""
        if len(pair.plain) < 2:
            return None
        path = self.files(".gif")
        apart, factor = pictures.amplified_difference(pair.plain, pair.guided)
        labels = ["without skip guidance", "with skip guidance", f"where they differ, x {factor}"]
        frames = pictures.side_by_side([pair.plain, pair.guided, apart], labels)
        pictures.save_gif(frames, path, fps=8)
        return path


def build(tab: VideoTab, page: gradio.Blocks, model: str) -> None:
    """Lay out the tab, inside the page.

    Args:
        tab: the handlers.
        page: what it is a part of.
        model: that is chosen at first.
    """
    pair, kept, chosen = gradio.State(Pair()), gradio.State([]), gradio.State("")
    with gradio.Row():
        with gradio.Column(scale=1, min_width=320):
            name = gradio.Textbox(model, label="model: a bundled name, a folder, or a hub id", elem_id="model")
            words = gradio.Markdown("", elem_id="model-words")
            prompt = gradio.Textbox("a large green star moving right", label="prompt", elem_id="prompt")
            layers = gradio.Dropdown([], multiselect=True, label="layers to leave out", elem_id="layers")
            part = gradio.Dropdown(list(PARTS), value="block", label="part of them")
            scale = gradio.Slider(0, 8, 1, step=0.25, label="scale of skip guidance, s")
            start = gradio.Slider(0, 1, 0, step=0.05, label="guide from this share of the steps")
            stop = gradio.Slider(0, 1, 1, step=0.05, label="to this one")
            guidance_scale = gradio.Slider(1, 15, 4, step=0.5, label="scale of CFG, w")
            with gradio.Row():
                steps = gradio.Slider(1, MOST_STEPS, 20, step=1, label="steps", scale=2)
                seed = gradio.Number(0, precision=0, minimum=0, label="seed", scale=1, min_width=80)
            with gradio.Row():
                go = gradio.Button("Compare", variant="primary", elem_id="compare")
                end = gradio.Button("Stop", variant="stop", elem_id="stop")
            said = gradio.Markdown("", elem_id="said")
        with gradio.Column(scale=2):
            with gradio.Row():
                with gradio.Column():
                    left = gradio.Image(
                        label="without skip guidance", elem_id="plain", interactive=False, format="png", buttons=SAFE
                    )
                    left_cost = gradio.Markdown("", elem_id="plain-cost")
                with gradio.Column():
                    right = gradio.Image(
                        label="with skip guidance", elem_id="guided", interactive=False, format="png", buttons=SAFE
                    )
                    right_cost = gradio.Markdown("", elem_id="guided-cost")
            frame = gradio.Slider(0, 1, 0, step=1, label="frame", visible=False, elem_id="frame")
            moving = gradio.Image(type="filepath", show_label=False, interactive=False, elem_id="moving", buttons=SAFE)
            with gradio.Row():
                star = gradio.Button("Keep as a favourite", elem_id="keep")
                give = gradio.Button("Show as Python and JSON", elem_id="export")
            favourites = gradio.Gallery(
                label="favourites",
                columns=4,
                fit_columns=False,
                object_fit="contain",
                height=220,
                elem_id="favourites",
                format="png",
                buttons=SAFE,
            )
            python = gradio.Code(language="python", label="Python", elem_id="python", interactive=False)
            data = gradio.Code(language="json", label="JSON", elem_id="json", interactive=False)
    controls, named = [layers, scale, part, guidance_scale, steps, words, chosen], [name, chosen]
    page.load(tab.choose, named, controls, api_name="choose_first", api_visibility="private")
    name.submit(tab.choose, named, controls, api_name="choose")
    name.blur(tab.choose, named, controls, api_name="choose_again", api_visibility="private")
    settings = [name, prompt, layers, scale, part, start, stop, guidance_scale, steps, seed]
    outputs = [said, pair, left, right, left_cost, right_cost, frame, moving]
    go.click(tab.compare, settings, outputs, api_name="compare", concurrency_limit=4, show_progress="minimal")
    end.click(tab.stop, None, said, api_name="stop", queue=False)
    frame.change(tab.scrub, [pair, frame], [left, right], api_name="scrub", show_progress="hidden")
    give.click(tab.export, pair, [python, data], api_name="export")
    star.click(tab.keep, [pair, kept], [kept, favourites], api_name="keep")
