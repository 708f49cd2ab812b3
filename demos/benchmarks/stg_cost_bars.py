"""The bars: what the design promises, held against the measurements."""

from __future__ import annotations

from typing import Any

TIME_SLACK, ZERO_SLACK = 0.03, 0.01
PREDICTIONS_HELD = 4  # memory slack: c, the delta and the two sums, each the size of a prediction


def bars(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the design promises, held against one model's measurements."""
    rows = entry["variants"]
    out = {
        "blocks_equal_analytic": {
            "passed": all(
                row["blocks_run"] == row["blocks_counted"] == row["blocks_analytic"] for row in rows.values()
            ),
        },
    }
    direct = round(rows["scale_0"]["time_to_plain"]["median"] - 1, 5)
    overhead = rows["scale_0"].get("split_overhead", direct)
    out["scale_0_overhead"] = {
        "value": overhead,
        "direct": direct,
        "limit": ZERO_SLACK,
        "passed": overhead < ZERO_SLACK,
    }
    for name in ("ours", "ours_deep"):
        row = rows[name]
        direct = row["time_to_naive"]["median"] / row["limit_to_naive"] - 1
        split = row["split_time_to_naive"] / row["limit_to_naive"] - 1 if "split_time_to_naive" in row else direct
        out[f"{name}_time"] = {
            "value": round(direct, 5),
            "split": round(split, 5),
            "limit": TIME_SLACK,
            "applies": entry["branches"] == 2 and entry["blocks"] >= 24,
            "passed": max(direct, split) <= TIME_SLACK,
        }
        allowed = row["captured_bytes"] + PREDICTIONS_HELD * row["prediction_bytes"]
        out[f"{name}_memory"] = {
            "value": row["peak_over_plain"],
            "limit": allowed,
            "passed": row["peak_over_plain"] <= allowed,
        }
    return out


def overall(models: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each bar over all models it applies to: passed, and the worst value."""
    out: dict[str, dict[str, Any]] = {}
    for name in models[0]["bars"]:
        held = [entry["bars"][name] for entry in models if entry["bars"][name].get("applies", True)]
        out[name] = {"passed": all(bar["passed"] for bar in held), "models": len(held)}
        if held and not name.endswith("memory") and "value" in held[0]:
            out[name] |= {"worst": max(bar["value"] for bar in held), "limit": held[0]["limit"]}
    return out
