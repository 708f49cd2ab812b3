"""Make the first picture of README and those of its three doors.

    python -m demos.doors                    # all but the hero, to demos/media
    python -m demos.doors language vision    # some
    python -m demos.doors hero               # three panels of a clip: plain, with the layer left out, guided

`video` and `language` draw figures that are there (demos/benchmarks/stg_cost.json, demos/real/llm.json), `region` and
`vision` run the bundled classifier and UNet++, in seconds; `hero` makes 12 clips with the bundled model, in minutes. It
leads README once a stranger sees at arm's length what it is about: with the model of today its panels look alike.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from demos.doors import hero, language, region, video, vision
from skipguide.files import replacing

DOORS = {"region": region.draw, "video": video.draw, "language": language.draw, "vision": vision.draw}
BESIDE = {"hero": hero.draw}
COLOURS = 96  # a palette keeps the files small


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("doors", nargs="*", metavar="DOOR", help=f"of {', '.join(DOORS)} (default: these) or hero")
    parser.add_argument("--out", type=Path, default=Path("demos/media"), help="the folder (default: %(default)s)")
    args = parser.parse_args(argv)
    known = DOORS | BESIDE
    if unknown := {*args.doors} - {*known}:
        parser.error(f"expected doors out of {', '.join(known)}; got {', '.join(sorted(unknown))}")
    for name in args.doors or DOORS:
        picture = known[name]().convert("RGB").quantize(COLOURS, dither=0)
        path = args.out / f"door_{name}.png"
        with replacing(path) as (partial,):
            picture.save(partial, format="png", optimize=True)
        print(f"{path}: {picture.width} x {picture.height}")


if __name__ == "__main__":
    main()
