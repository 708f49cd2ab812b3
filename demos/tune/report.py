"""Report: the table and the figure of what was compared, at equal blocks that ran."""

from __future__ import annotations

from typing import Any

from demos.study import canvas, table
from demos.tune.settings import ways


def text(result: dict[str, Any]) -> str:
    """The rows in Markdown, with what can be said of tuning against `frugal`."""
    plan = result["plan"]
    rows = [_row(way) for way in sorted(result["ways"], key=lambda way: way.get("frechet", float("inf")))]
    head = ("way", "blocks", "Fréchet ↓", "all right, %", "s a clip", "against", "difference (95 %)")
    searches = [_search(start, found) for start, found in result["searched"].items()]
    return "\n".join(
        [
            table(head, rows),
            f"{plan['prompts']} captions, a clip each, other captions and noise than those of the search "
            f"({plan['calls']} runs). Blocks: those that ran, relative to plain CFG of 12 steps. Difference: to "
            "`frugal` with as many steps as come nearest to these blocks, the same captions and noise, bootstrap over "
            "clips; below 0 is better.",
            "",
            *searches,
            "",
            *verdict(result["ways"]),
            *_missing(result["ways"]),
            "",
        ]
    )


def _row(way: dict[str, Any]) -> tuple[str, ...]:
    if "not_offered" in way:
        return (way["name"], "", "", "", "", "not offered", way["not_offered"].replace("|", "\\|"))
    apart = ""
    if "difference" in way:
        low, high = way["interval"]
        apart = f"{way['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
    numbers = f"{way['cost']:.3f}", f"{way['frechet']:.1f}", f"{100 * way['right']:.0f}"
    return (way["name"], *numbers, f"{way['seconds_per_clip']:.2f}", way.get("against", ""), apart)


def _search(start: str, found: dict[str, Any]) -> str:
    last = found["path"][-1]
    return (
        f"Search from `{start}`: {found['runs']} runs, {found['seconds']:.0f} processor seconds, down to "
        f"{last['share']:.2f} of plain CFG's blocks, where the latents are {100 * last['error']:.0f} % off."
    )


def _missing(found: list[dict[str, Any]]) -> list[str]:
    """What was left out of this run, in words."""
    names = [way.name for way in ways() if way.name not in {each["name"] for each in found}]
    return [f"\nNot run (yet): {', '.join(names)}."] if names else []


def verdict(ways: list[dict[str, Any]]) -> list[str]:
    """Whether a tuned schedule beats `frugal` with fewer steps, said as it is."""
    tuned = [way for way in ways if way.get("start") and "interval" in way]
    words = []
    for way in tuned:
        low, high = way["interval"]
        said = "beats" if high < 0 else "is worse than" if low > 0 else "cannot be told from"
        words.append(
            f"- `{way['name']}` {said} `{way['against']}`: {way['difference']:+.1f} ({low:+.1f} to {high:+.1f})."
        )
    if tuned and not any(way["interval"][1] < 0 for way in tuned):
        words.append(
            "\nA negative result: no searched schedule is better than `frugal` with fewer steps at equal blocks."
        )
    return words


def figure(result: dict[str, Any]) -> Any:
    """Fréchet distance against the blocks that ran, one line a family."""
    drawn, axes = canvas(1, 1, width=7.5, height=4.8)
    axis = axes[0][0]
    families: dict[str, list[dict[str, Any]]] = {}
    for way in result["ways"]:
        if "frechet" in way:
            families.setdefault(way["family"], []).append(way)
    for family, members in families.items():
        points = sorted((way["cost"], way["frechet"]) for way in members)
        strong = "frugal" in family or "tuned" in family
        axis.plot(*zip(*points, strict=True), "o-", ms=5, lw=2 if strong else 1, label=family)
    every = sorted(way["frechet"] for members in families.values() for way in members)
    top = 2 * every[len(every) // 2]
    if every[-1] > top:  # one that broke down would press all others into a line
        axis.set_ylim(top=max(1.05 * value for value in every if value <= top))
        for way in (way for members in families.values() for way in members if way["frechet"] > top):
            said = f"{way['family']}: {way['frechet']:.0f} ↑"
            axis.annotate(
                said, (way["cost"], 0.97), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=8
            )
    axis.set_xlabel("blocks that ran, relative to plain CFG of 12 steps")
    axis.set_ylabel("Fréchet distance, other captions and noise (lower is better)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=2)
    return drawn
