"""The figures, the tables and the plot of masking.json."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from demos.benchmarks.measure import write_text
from demos.real.fills import FILLS, NAMES
from demos.real.intervals import interval
from demos.study import canvas, save_figure, table

Rows = list[dict[str, Any]]
ENOUGH = 5  # photos whose maps are worth a table
COLOURS = {
    "neighbours": "#d1495b",
    "black": "#222222",
    "grey": "#8a8a8a",
    "mean": "#2e8b57",
    "blur": "#1b6ca8",
    "inpaint": "#8e6bbf",
    "mcal": "#e08e2b",
}
KINDS = {"patches": "patches (14×14)", "superpixels": "superpixels (60)", "box": "one box"}


# -- from photos to figures


def summary(removal: Rows, attribution: Rows, animals: Container[int], hoofed: Container[int]) -> dict[str, Rows]:
    """Means over photos, with intervals: flat rows."""
    return {
        "whole": whole(removal, animals),
        "removal": removed(removal),
        "all_shares": all_shares(removal),
        "outline": outlined(removal, animals, hoofed),
        "attribution": judged(attribution),
        "maps": against_layer_masking(attribution),
    }


def whole(photos: Rows, animals: Container[int]) -> Rows:
    """What the model says of the whole photos."""
    return [
        {
            "right": interval([float(p["target"] == p["label"]) for p in photos]),
            "probability": interval([p["probability"] for p in photos]),
            "no_animals": sum(p["target"] not in animals for p in photos),
        }
    ]


def removed(photos: Rows) -> Rows:
    """Share of photos whose answer stays, by what is hidden, how much, and how it is filled."""
    found = []
    first = photos[0]["rows"] if photos else []
    for what, share in dict.fromkeys((r["what"], r["share"]) for r in first if r["what"] in KINDS):
        kept = {fill: per_photo(photos, what, share, fill, stays) for fill in FILLS}
        found += [
            {"what": what, "share": share, "fill": fill, "kept": interval(kept[fill])}
            | ({} if fill == "neighbours" else {"layer_masking_keeps_more_by": paired(kept["neighbours"], kept[fill])})
            for fill in FILLS
        ]
    return found


def all_shares(photos: Rows) -> Rows:
    """The mean over all shares that are hidden, and the difference to layer masking's on the same holes."""
    found = []
    for what in KINDS if photos else ():
        kept = {fill: per_photo(photos, what, None, fill, stays) for fill in FILLS}
        found += [
            {"what": what, "fill": fill, "kept": interval(kept[fill])}
            | ({} if fill == "neighbours" else {"more_than_layer_masking": paired(kept[fill], kept["neighbours"])})
            for fill in FILLS
        ]
    return found


def paired(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """The mean difference on the same photos, with its interval: photos differ much more than fills and maps do."""
    return interval([own - other for own, other in zip(ours, theirs, strict=True)])


def outlined(photos: Rows, animals: Container[int], hoofed: Container[int]) -> Rows:
    """What a hole's outline adds to the answer."""
    found = []
    others = [p for p in photos if p["target"] not in animals]
    for what in ("horse", "ellipse"):
        found += [
            {
                "what": what,
                "fill": fill,
                "kept": interval(per_photo(photos, what, None, fill, stays)),
                "became_an_animal": interval(per_photo(others, what, None, fill, lambda p, r: r["answer"] in animals)),
                "became_hoofed": interval(per_photo(others, what, None, fill, lambda p, r: r["answer"] in hoofed)),
            }
            for fill in FILLS
        ]
    return found


def stays(photo: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether the answer is that of the whole photo."""
    return bool(row["answer"] == photo["target"])


def per_photo(
    photos: Rows, what: str, share: float | None, fill: str, counts: Callable[[dict[str, Any], dict[str, Any]], bool]
) -> list[float]:
    """Of each photo the mean over the seeds of its masks, and over shares where none is given."""
    return [
        fmean(
            counts(photo, row)
            for row in photo["rows"]
            if row["what"] == what and row["fill"] == fill and share in (None, row["share"])
        )
        for photo in photos
    ]


def judged(photos: Rows) -> Rows:
    """Deletion and insertion of every map under every fill, and how much better than a random order."""
    values: dict[tuple[str, str, str], Rows] = defaultdict(list)
    for photo in photos:
        for row in photo["rows"]:
            values[row["method"], row["map"], row["judge"]].append(row)
    found = []
    for (method, name, judge), rows in values.items():
        random = values[method, "random", judge]
        gain = [
            (row["insertion"] - row["deletion"]) - (other["insertion"] - other["deletion"])
            for row, other in zip(rows, random, strict=True)
        ]
        found.append(
            {"method": method, "map": name, "judge": judge}
            | {key: interval([row[key] for row in rows]) for key in ("deletion", "insertion")}
            | {"better_than_random_by": interval(gain)}
        )
    return found


def against_layer_masking(photos: Rows) -> Rows:
    """How much better a map is than that of layer masking on the same photo, by the mean of all judges."""
    gains: dict[tuple[str, str], list[float]] = defaultdict(list)
    for photo in photos:
        own: dict[tuple[str, str], list[float]] = defaultdict(list)
        for row in photo["rows"]:
            own[row["method"], row["map"]].append(row["insertion"] - row["deletion"])
        for which, values in own.items():
            gains[which].append(fmean(values))
    return [
        {"method": method, "map": name, "better_than_layer_masking_by": paired(values, gains[method, "neighbours"])}
        for (method, name), values in gains.items()
        if name != "neighbours"
    ]


# -- words


def percent(value: dict[str, Any]) -> str:
    """`89 (84–93)`."""
    return "–" if value["mean"] is None else f"{value['mean']:.0%} ({value['low']:.0%}–{value['high']:.0%})"


def tables(data: dict[str, Any]) -> str:
    """All tables, Markdown."""
    about, mcal = data["settings"], data["mcal"]
    whole = data["whole"][0]
    lines = [
        f"# {data['model']['name']} with ImageNet weights, {data['photos']['removal']} photos\n",
        f"Made by `python -m demos.real.masking --form {data['form']}`. The model is right on "
        f"{percent(whole['right'])} of the whole photos. In brackets: 95 % intervals over the photos. "
        f"Mask seeds for each photo: {about['seeds']}.\n",
        "## The answer stays that of the whole photo\n",
        "Last column: the mean less layer masking's, in points, and the interval of this difference on the same "
        "holes.\n",
    ]
    for what, name in KINDS.items():
        rows = [row for row in data["removal"] if row["what"] == what]
        more = {row["fill"]: mean_and_more(row) for row in data["all_shares"] if row["what"] == what}
        shares = list(dict.fromkeys(row["share"] for row in rows))
        lines.append(
            table(
                [f"hidden: {name}", *(f"{share:.0%}" for share in shares), "mean", "less layer masking's"],
                ([NAMES[fill], *cells(rows, fill, shares), *more[fill]] for fill in FILLS),
            )
        )
    lines += ["## A hole in the shape of a horse\n", outline_table(data["outline"], whole["no_animals"])]
    if data["photos"]["attribution"] < ENOUGH:
        lines.append(
            f"LIME and RISE: {data['photos']['attribution']} photos are done (in the JSON), too few to say anything.\n"
        )
    for method in ("lime", "rise") if data["photos"]["attribution"] >= ENOUGH else ():
        masks, rows = about[method], [row for row in data["attribution"] if row["method"] == method]
        against = {row["map"]: row["better_than_layer_masking_by"] for row in data["maps"] if row["method"] == method}
        if rows:
            lines += [
                f"## {method.upper()} with {masks} masks, {data['photos']['attribution']} photos\n",
                "Insertion less deletion (probability of the class with only the first parts shown, less that with "
                "them hidden), less the same of a random order. Rows: what the map was made with; columns: what it "
                "is judged under. In bold what no other map beats in the column. Last column: the mean of all judges, "
                "less that of layer masking's map of the same photo, and its 95 % interval over the photos.\n",
                attribution_table(rows, against),
            ]
    lines.append(
        f"MCal's head (a million numbers) was fitted on {mcal['copies']} grey copies of "
        f"{mcal['pictures']} other photos, none of a class that is tested: that is very little. On copies of those of "
        f"them that were kept from the fit it changes the answers that stay from {mcal['kept_before_held_out']:.0%} to "
        f"{mcal['kept_after_held_out']:.0%}, on those it was fitted on from {mcal['kept_before_fitted_pictures']:.0%} "
        f"to {mcal['kept_after_fitted_pictures']:.0%}.\n"
    )
    return "\n".join(lines)


def cells(rows: Rows, fill: str, shares: Iterable[float]) -> list[str]:
    """One fill's row: every share."""
    own = {row["share"]: row["kept"] for row in rows if row["fill"] == fill}
    return [percent(own[share]) for share in shares]


def mean_and_more(row: dict[str, Any]) -> tuple[str, str]:
    """The mean over the shares, and the difference to layer masking in points."""
    more = row.get("more_than_layer_masking")
    return f"{row['kept']['mean']:.1%}", "–" if more is None else signed(more, 100, 1)


def outline_table(rows: Rows, others: int) -> str:
    """Horse and ellipse side by side."""
    by = {(row["what"], row["fill"]): row for row in rows}
    lines = [
        [
            NAMES[fill],
            *(percent(by[what, fill]["kept"]) for what in ("horse", "ellipse")),
            *(percent(by[what, fill]["became_an_animal"]) for what in ("horse", "ellipse")),
            percent(by["horse", fill]["became_hoofed"]),
        ]
        for fill in FILLS
    ]
    head = ["filled with", "kept, horse", "kept, ellipse", "becomes an animal, horse", "…, ellipse", "hoofed, horse"]
    return table(head, lines) + f'\n"Becomes" is of the {others} photos whose whole answer is no animal.\n'


def attribution_table(rows: Rows, against: dict[str, dict[str, Any]]) -> str:
    """Maps by judges, and all judges against layer masking's map."""
    by = {(row["map"], row["judge"]): row["better_than_random_by"] for row in rows}
    names = [name for name in dict.fromkeys(row["map"] for row in rows) if name != "random"]
    best = {judge: max(by[name, judge]["mean"] for name in names) for judge in FILLS}
    lines = []
    for name in names:
        shown = [
            f"{'**' if by[name, judge]['mean'] == best[judge] else ''}{by[name, judge]['mean']:+.3f}"
            f"{'**' if by[name, judge]['mean'] == best[judge] else ''}"
            for judge in FILLS
        ]
        label = NAMES.get(name, "from the middle outwards")
        less = signed(against[name]) if name in against else "–"
        lines.append([label, *shown, f"{fmean(by[name, judge]['mean'] for judge in FILLS):+.3f}", less])
    head = ["map \\ judge", *(NAMES[fill].split(" (")[0] for fill in FILLS), "mean", "less layer masking's"]
    return table(head, lines)


def signed(value: dict[str, Any], factor: float = 1.0, digits: int = 3) -> str:
    """`+0.012 (−0.004 to +0.028)`."""
    mean, low, high = (f"{factor * value[key]:+.{digits}f}".replace("-", "−") for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


# -- pictures


def figure(data: dict[str, Any]) -> Any:
    """Kept against the share that is hidden; what a horse's outline does; maps against judges."""
    with_maps = data["photos"]["attribution"] >= ENOUGH
    plots, axes = canvas(2 if with_maps else 1, 3 if with_maps else 4, width=4.4, height=3.5)
    for axis, (what, name) in zip(axes[0], KINDS.items(), strict=False):
        for fill in FILLS:
            rows = [row for row in data["removal"] if row["what"] == what and row["fill"] == fill]
            x = [100 * row["share"] for row in rows]
            low, mean, high = ([100 * row["kept"][key] for row in rows] for key in ("low", "mean", "high"))
            own = fill == "neighbours"
            axis.plot(x, mean, "o-", ms=3, lw=2.4 if own else 1.2, color=COLOURS[fill], label=NAMES[fill])
            if fill in ("neighbours", "grey"):
                axis.fill_between(x, low, high, color=COLOURS[fill], alpha=0.15, lw=0)
        axis.set(title=name, xlabel="% of the photo hidden", ylim=(0, 101), xlim=(5, 95))
        axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("% of the answers that stay")
    plots.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False, fontsize=8
    )
    _bars(axes[1, 0] if with_maps else axes[0, 3], data["outline"])
    for axis, method in zip(axes[1, 1:], ("lime", "rise"), strict=True) if with_maps else ():
        _matrix(axis, [row for row in data["attribution"] if row["method"] == method], method.upper())
    plots.suptitle(
        f"{data['model']['name']} (ImageNet): {data['photos']['removal']} photos"
        + (f"; maps: {data['photos']['attribution']} photos" if with_maps else "")
        + "; bands and whiskers: 95 % over photos",
        fontsize=11,
    )
    return plots


def _bars(axis: Any, rows: Rows) -> None:
    by = {(row["what"], row["fill"]): row["became_an_animal"] for row in rows}
    for shift, what, alpha in ((-0.2, "horse", 1.0), (0.2, "ellipse", 0.4)):
        found = [by[what, fill] for fill in FILLS]
        mean = [100 * row["mean"] for row in found]
        ends = [
            [100 * (row["mean"] - row["low"]) for row in found],
            [100 * (row["high"] - row["mean"]) for row in found],
        ]
        axis.bar(
            [place + shift for place in range(len(FILLS))], mean, 0.38, yerr=ends, alpha=alpha,
            color=[COLOURS[fill] for fill in FILLS], error_kw={"lw": 0.8},
        )  # fmt: skip
    names = [NAMES[fill].split(" (")[0].replace(" ", "\n", 1) for fill in FILLS]
    axis.set_xticks(range(len(FILLS)), names, fontsize=6.5)
    axis.set(title="photos of no animal that become one:\nhole like a horse (full), an ellipse (pale)", ylabel="%")


def _matrix(axis: Any, rows: Rows, title: str) -> None:
    if not rows:
        axis.set_axis_off()
        return
    by = {(row["map"], row["judge"]): row["better_than_random_by"]["mean"] for row in rows}
    names = [name for name in dict.fromkeys(row["map"] for row in rows) if name != "random"]
    values = [[by[name, judge] for judge in FILLS] for name in names]
    top = max(abs(value) for line in values for value in line)
    axis.imshow(values, cmap="RdBu", vmin=-top, vmax=top, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            colour = "white" if abs(value) > 0.7 * top else "black"  # legible on the darkest cells, too
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    short = {**{fill: NAMES[fill].split(" (")[0] for fill in FILLS}, "middle": "from the middle"}
    axis.set_xticks(range(len(FILLS)), [short[fill] for fill in FILLS], rotation=35, ha="right", fontsize=7)
    axis.set_yticks(range(len(names)), [short[name] for name in names], fontsize=7)
    axis.set(title=f"{title}: insertion less deletion,\nabove a random order", xlabel="judged under")
    axis.spines[["left", "bottom"]].set_visible(False)


def publish(path: Path) -> str:
    """Write the figure and the Markdown next to the JSON; returns the tables."""
    data = json.loads(path.read_text(encoding="utf-8"))
    text = tables(data)
    write_text(path.with_suffix(".md"), text)
    save_figure(figure(data), path.with_suffix(".png"))
    return text
