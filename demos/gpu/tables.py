"""The tables of the GPU's figures, from one or several results.json: `python -m demos.gpu.tables A.json B.json`.

Writes results.json (all pieces together; of a piece that is in several, the last one with figures) and results.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HOME = Path(__file__).parent
Figures = Mapping[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; all columns but the first are aligned right."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def to(row: Figures, key: str = "to_plain") -> str:
    """A ratio as `1.23`, with its quartiles where there are any."""
    found = row.get(key)
    if not found:
        return ""
    quartiles = found.get("quartiles")
    return f"{found['median']:.3f}" + (f" ({quartiles[0]:.3f} to {quartiles[1]:.3f})" if quartiles else "")


def size(count: float) -> str:
    """Bytes as gigabytes."""
    return f"{count / 1e9:.2f} GB" if count else ""


def raced(variants: Figures, key: str, unit: str, first: str = "plain", factor: float = 1.0) -> list[str]:
    """The variants of one race: time, ratio to the first, memory beyond what was there, memory in all."""
    rows = []
    for name, row in variants.items():
        if "error" in row:
            rows.append((name, "", f"failed: {cell(row['error'])}", "", ""))
        else:
            time = f"{factor * row.get(key, row['seconds']):.4g}"
            rows.append((name, time, to(row, f"to_{first}"), size(row["peak_bytes"]), size(row["total_bytes"])))
    return table(("", unit, f"to {first}", "peak beyond", "peak in all"), rows)


def cell(text: str) -> str:
    """Text that fits a cell."""
    return text.replace("|", "/")[:160]


def video(found: Figures) -> list[str]:
    note = f", {found['note']}" if found["note"] else ""
    head = (
        f"**{found['title']}**: {found['parameters'] / 1e9:.2f} G parameters, {found['blocks']} blocks, layer "
        f"{found['layer']} skipped, {found['tokens']} tokens{note}, {found['steps']} steps, CFG {found['cfg']}. By "
        f"blocks, guided is {found['blocks_to_plain']:.3f} of plain."
    )
    return [head, "", *raced(found["variants"], "seconds_per_step", "s per step")]


def compiled(found: Figures) -> list[str]:
    first = ", ".join(f"{name} {seconds:g} s" for name, seconds in found["first_call_seconds"].items())
    ratio = found["compiled_guided_to_compiled_plain"]
    last = f"Compiled guided to compiled plain: {ratio['median']:.3f}." if ratio else ""
    head = f"**{found['title']}**, blocks compiled. First calls: {first}. {last}"
    return [head, "", *raced(found["variants"], "seconds", f"s for {found['steps']} steps")]


def tail(found: Figures) -> list[str]:
    head = (
        f"**{found['title']}**, first {found['depth']} blocks, layer {found['layer']} skipped. Below 1 the batched "
        f"tail wins: {crossover(found['points'])}"
    )
    rows = []
    for point in found["points"]:
        sizes = [str(point[key]) for key in ("tokens", "rows", "tokens_times_rows")]
        if "error" in point:
            rows.append((*sizes, f"failed: {cell(point['error'])}", "", "", "", ""))
            continue
        both = [point["variants"][name] for name in ("separate", "batched")]
        ratios = (to(point, "batched_to_separate"), *(to(row) for row in both))
        rows.append((*sizes, *ratios, *(size(row.get("peak_bytes", 0)) for row in both)))
    columns = ("tokens", "rows", "tokens x rows", "batched / separate", "separate / plain", "batched / plain")
    return [head, "", *table((*columns, "peak, separate", "peak, batched"), rows)]


def crossover(points: Sequence[Figures]) -> str:
    """Up to which tokens times rows the batched tail is faster, without a gap."""
    won = None
    for point in points:
        ratio = point.get("batched_to_separate")
        if not ratio or ratio["median"] >= 1:
            break
        won = point["tokens_times_rows"]
    return f"up to {won} tokens x rows." if won else "nowhere."


def prefill(found: Figures) -> list[str]:
    lines = [f"A quarter of the {2 * found['layers']} sublayers left out.", ""]
    for prompt in found["prompts"]:
        lines += [f"**{prompt['tokens']} tokens**", ""]
        lines += [f"failed: {prompt['error']}", ""] if "error" in prompt else raced(prompt["variants"], "seconds", "s")
    return lines


def decode(found: Figures) -> list[str]:
    head = (
        f"{found['tokens']} tokens after a prompt of {found['prompt']}; 3 of {found['of_sublayers']} sublayers out; "
        f"{found['share_that_stays']:.3f} of them stay, the bar is {found['bar']}."
    )
    return [head, "", *raced(found["variants"], "ms_per_token", "ms per token")]


def gates(found: Figures) -> list[str]:
    lines = []
    for net in found["nets"]:
        head = f"**{net['net']}, {net['gate']}**"
        if "error" in net:
            lines += [f"{head} failed: {net['error']}", ""]
        else:
            head += f", batch {net['batch']}, {net['gated_blocks']} gated blocks"
            lines += [head, "", *raced(net["variants"], "ms_per_batch", "ms per batch")]
    return lines


def masking(found: Figures) -> list[str]:
    lines = [f"{found['model']}, batch {found['batch']}, {found['size']} px; the bar of patches is {found['bar']}.", ""]
    for dtype, variants in found["by_dtype"].items():
        lines += [f"**{dtype}**; `_planned` makes its plan in the call, one call against one call", ""]
        lines += raced(variants, "seconds", "s")
    return lines


def tuning(found: Figures) -> list[str]:
    rows = []
    for name, row in found["fits"].items():
        if "error" in row:
            rows.append((name, f"failed: {cell(row['error'])}", "", "", "", ""))
        else:
            ratio = f"{row['to_full']:.3f}" if "to_full" in row else ""
            seconds = f"{row['seconds']:.2f} ({row['extraction_seconds']:.2f})"
            rows.append(
                (name, f"{row['ms_per_step']:.2f}", ratio, seconds, size(row["peak_bytes"]), f"{row['trained']:,}")
            )
    head = f"{found['classes']} classes, batch {found['batch']}, {found['epochs']} epochs."
    columns = ("", "ms per step", "to full", "s in all (caching)", "peak", "trained")
    return [head, "", *table(columns, rows)]


def tests(found: Figures) -> list[str]:
    counts = ", ".join(f"{number} {word}" for word, number in found["counts"].items())
    late = ", stopped at its time limit" if found["timed_out"] else ""
    lines = [f"{found['files']} files, {found['seconds']:g} s{late}: {counts or 'no summary'}.", ""]
    return lines + [f"- {failure}" for failure in found["failures"]] + [""] * bool(found["failures"])


# first word of a piece's name -> heading and table
SECTIONS: dict[str, tuple[str, Callable[[Figures], list[str]]]] = {
    "ltx": ("Guidance", video),
    "wan": ("Guidance", video),
    "ltx2": ("Guidance", video),
    "hunyuan": ("Guidance", video),
    "tail": ("The tail in one batch, or by itself", tail),
    "compile": ("Compiled blocks", compiled),
    "prefill": ("Llama-3-8B shape, reading a prompt", prefill),
    "decode": ("Llama-3-8B shape, decoding", decode),
    "skipnet": ("SkipNet", gates),
    "masking": ("Layer masking", masking),
    "tuning": ("Skip Tuning, CLIP ViT-B/16 shape", tuning),
    "tests": ("Tests that need a GPU", tests),
}


def section(name: str, record: Figures) -> list[str]:
    """What is said of one piece."""
    if "figures" not in record:
        return [f"`{name}`: {record.get('left_out') or 'failed: ' + record.get('error', '')}", ""]
    return SECTIONS[name.partition("_")[0]][1](record["figures"])


def document(results: Figures) -> str:
    """The whole text."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    kind = "The dry form: tiny shapes on a CPU, figures without a meaning" if results["dry"] else "Random weights"
    lines = ["# On a GPU", "", f"{kind}; {machine['gpu'] or machine['cpu']}, Python {machine['python']}, {versions}."]
    lines += ["Medians over interleaved rounds, ratios within a round, quartiles in brackets.", ""]
    before = ""
    for name in sorted(results["pieces"], key=lambda name: list(SECTIONS).index(name.partition("_")[0])):
        heading = SECTIONS[name.partition("_")[0]][0]
        lines += [f"## {heading}", ""] if heading != before else []
        lines += section(name, results["pieces"][name])
        before = heading
    return "\n".join(lines).rstrip() + "\n"


def merged(parts: Sequence[Figures]) -> dict[str, Any]:
    """Several results as one."""
    pieces: dict[str, Any] = {}
    for part in parts:
        for name, record in part["pieces"].items():
            if "figures" in record or "figures" not in pieces.get(name, {}):
                pieces[name] = record
    return {"dry": parts[0]["dry"], "machine": parts[-1]["machine"], "pieces": pieces}


def main(argv: Sequence[str] | None = None) -> int:
    from demos.benchmarks.measure import write_json, write_text

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", default=[HOME / "results.json"])
    parser.add_argument("--out", type=Path, default=HOME, help="folder (default: demos/gpu)")
    args = parser.parse_args(argv)
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in args.results]
    if len({part["dry"] for part in parts}) > 1:
        parser.error("a dry result and a measured one do not belong in one table")
    results = merged(parts)
    name = "results_dry" if results["dry"] else "results"
    write_json(args.out / f"{name}.json", results)
    write_text(args.out / f"{name}.md", document(results))
    print(document(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
