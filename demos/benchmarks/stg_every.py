"""`every=k`: what running the skipped pass on every k-th step only saves, and how far its result is off.

    python -m demos.benchmarks.stg_every                     # four minutes on one CPU core
    python -m demos.benchmarks.stg_every --quick --out /tmp/stg_every.json

Writes stg_every.json and stg_every.md. Per model: plain, and guided with every=1, 2, 3, 4, interleaved. The error is
that of the reused direction when it is renewed (`stats.reuse_error`: an upper end, since it is k steps old then), and
that of the final latents, relative to what the guidance changes in them. The bundled model is trained; the others have
the released architectures with random weights, so that their times say something and their errors do not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from demos.benchmarks.command import parse, parser_of, write_as_it_grows
from demos.benchmarks.measure import Clocks, Ratio, interleaved, machine
from demos.benchmarks.stg_models import BY_NAME, run
from demos.benchmarks.stg_tail import shallow
from skipguide.pipelines import SpatiotemporalSkipGuidance, bundled_pipeline
from skipguide.pipelines.presets import find_preset

HERE = Path(__file__).parent
EVERY = (1, 2, 3, 4)
BUNDLED = "tiny-t2v"
PROMPTS = ("a red circle moving right", "a blue square moving left", "a large green star circling on black")
MODELS = ("ltx", "wan", "mochi")
DEPTH = 4  # blocks per stack of the models with random weights
LAYER = 1

Call = Callable[[int], torch.Tensor]


class Subject:
    """One model: how to call it for a clip, and what was found."""

    def __init__(self, name: str, pipe: Any, call: Call, clips: int, layers: list[int], **about: Any) -> None:
        self.name = name
        self.pipe = pipe
        self.call = call
        self.clips = clips
        self.layers = layers
        self.about = about
        self.rounds: list[dict[str, Clocks]] = []

    @property
    def variants(self) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
        def guided(every: int) -> Callable[[], AbstractContextManager[Any]]:
            return lambda: SpatiotemporalSkipGuidance(layers=self.layers, every=every).apply(self.pipe)

        return {"plain": nullcontext} | {f"every_{k}": guided(k) for k in EVERY}

    def inspect(self, progress: Callable[[], object]) -> dict[str, dict[str, Any]]:
        """The errors, per variant; also the warm-up."""
        found: dict[str, dict[str, Any]] = {f"every_{k}": {} for k in EVERY}
        latents: dict[str, list[torch.Tensor]] = {}
        for name, context in self.variants.items():
            for clip in range(self.clips):
                with context() as applied:
                    latents.setdefault(name, []).append(self.call(clip).float())
                progress()
                if applied is not None:
                    stats = applied.stats
                    found[name]["blocks_to_plain"] = round(stats.blocks_run / stats.blocks_plain, 4)
                    if stats.reuse_error is not None:
                        found[name].setdefault("direction", []).append(round(stats.reuse_error, 4))
        for name, row in found.items():
            triples = zip(latents[name], latents["every_1"], latents["plain"], strict=True)
            row["latents"] = [
                round(float((x - exact).norm() / (exact - plain).norm()), 4) for x, exact, plain in triples
            ]
            pairs = zip(latents[name], latents["every_1"], strict=True)
            row["latents_absolute"] = [round(float((x - exact).norm() / exact.norm()), 4) for x, exact in pairs]
        return found

    def time(self, progress: Callable[[str], object]) -> None:
        """Two rounds more, on the first clip."""
        self.rounds += interleaved(self.variants, lambda: self.call(0), rounds=2, progress=progress)

    def report(self, found: dict[str, dict[str, Any]], clock: str) -> dict[str, Any]:
        seconds = {name: [clocks[name][clock == "process"] for clocks in self.rounds] for name in self.variants}
        rows = {
            name: {
                "time_to_plain": Ratio.of(seconds[name], seconds["plain"]).to_dict(),
                "time_to_every_1": Ratio.of(seconds[name], seconds["every_1"]).to_dict(),
                **row,
            }
            for name, row in found.items()
        }
        return {"name": self.name, "clips": self.clips, "layers": self.layers, **self.about, "variants": rows}


def bundled(device: str, steps: int) -> Subject:
    """The small trained model that ships."""
    pipe, own = bundled_pipeline(BUNDLED)
    pipe.to(device).set_progress_bar_config(disable=True)
    arguments = own | {"num_inference_steps": steps, "output_type": "latent"}

    def call(clip: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(clip)
        frames: torch.Tensor = pipe(PROMPTS[clip % len(PROMPTS)], generator=generator, **arguments).frames
        return frames

    preset = find_preset(pipe.transformer)
    return Subject(
        BUNDLED, pipe, call, len(PROMPTS), list(preset.layers), title="bundled model", trained=True, steps=steps
    )


def random_weights(name: str, size: str, how: dict[str, Any], steps: int) -> Subject:
    """A released architecture with random weights and a few blocks."""
    case = BY_NAME[name]
    pipe = shallow(case.build(size, **how), DEPTH)
    arguments = case.call(size, steps, **how)
    title = f"{case.title} architecture"
    return Subject(name, pipe, lambda clip: run(pipe, arguments), 1, [LAYER], title=title, trained=False, steps=steps)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the results so far after every second round."""
    cuda = args.device == "cuda"
    size = "quick" if args.quick else "cuda" if cuda else "cpu"
    how = {"device": args.device, "dtype": torch.bfloat16 if cuda else torch.float32}
    torch.set_num_threads(args.threads)
    subjects = [bundled(args.device, 4 if args.quick else args.steps)]
    models = [name for name in MODELS if size in BY_NAME[name].sizes]
    subjects += [random_weights(name, size, how, 4 if args.quick else 8) for name in models]
    total = sum(subject.clips for subject in subjects) * (1 + len(EVERY))
    with tqdm(desc="inspect", total=total, file=sys.stderr) as bar:
        found = [subject.inspect(bar.update) for subject in subjects]
    clock = "wall" if cuda or args.threads > 1 else "process"
    start = machine()
    settings = {"size": size, "device": args.device, "dtype": str(how["dtype"]).removeprefix("torch."), "clock": clock}
    with tqdm(desc="time", total=len(subjects) * (1 + len(EVERY)) * args.rounds, file=sys.stderr) as bar:
        for done in range(2, args.rounds + 1, 2):
            for subject in subjects:
                subject.time(lambda name: bar.update())
            yield {
                "benchmark": "stg_every",
                "machine": start,
                "settings": settings | {"rounds": done, "depth": DEPTH},
                "models": [subject.report(row, clock) for subject, row in zip(subjects, found, strict=True)],
            }


def spread(values: list[float]) -> str:
    """Mean and standard deviation, in per cent."""
    mean = statistics.mean(values)
    return f"{mean:.0%} ± {statistics.stdev(values):.0%}" if values[1:] else f"{mean:.0%}"


def table(data: dict[str, Any]) -> str:
    """The table, from the JSON alone."""
    head = "| model | every | time to plain | time to every=1 | blocks to plain | direction off | latents off |"
    lines = [head, "|---|" + "---:|" * (head.count("|") - 2)]
    for entry in data["models"]:
        for every in EVERY:
            row = entry["variants"][f"every_{every}"]
            cells = [
                entry["title"] if every == 1 else "",
                every,
                f"{row['time_to_plain']['median']:.2f}",
                f"{row['time_to_every_1']['median']:.2f}",
                f"{row['blocks_to_plain']:.2f}",
                spread(row["direction"]) if "direction" in row else "",
                spread(row["latents"]) if every > 1 else "",
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    where, settings = data["machine"], data["settings"]
    device = where["gpu"] if settings["device"] == "cuda" else f"{where['threads']} thread(s) of {where['cpu']}"
    trained = next(entry for entry in data["models"] if entry["trained"])
    note = (
        f"Medians of {settings['rounds']} interleaved rounds ({settings['clock']} time); {device}, "
        f"{settings['dtype']}. "
        f"Direction off: how far the difference that was used again is from the new one when it is renewed, relative "
        f"to its norm. Latents off: distance of the final latents from those with every=1, relative to what the "
        f"guidance changes in them; mean ± standard deviation over {trained['clips']} clips of {trained['steps']} "
        f"steps. Only the bundled model is trained. The others have the released architectures ({settings['depth']} "
        f"blocks per stack, layer {LAYER}) with random weights: their times count, their errors are those of "
        f"random functions."
    )
    return "\n".join([*lines, "", note]) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, measure, write."""
    parser = parser_of(__doc__, HERE / "stg_every.json", rounds=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20, help="of the bundled model (default 20)")
    args = parse(parser, argv)
    write_as_it_grows(args.out, measure(args), table)


if __name__ == "__main__":
    main()
