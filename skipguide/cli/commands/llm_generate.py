"""`skipguide llm generate`: a policy beside plain decoding, and what it costs and saves."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from skipguide.cli.arguments import given
from skipguide.cli.llm_models import LanguageModel, load, texts
from skipguide.cli.outputs import check_output, plain_arguments, replacing, versions, write_json
from skipguide.errors import SkipError

OWN_FLAGS = {
    "adaskip": ("phase", "skip_ratio", "cost_aware", "no_online", "text"),
    "unified": ("phase", "speedup", "mode"),
    "self-speculative": ("draft_skip", "max_draft", "text"),
    "none": (),
}
PIECES, PIECE_TOKENS = 12, 256


def run(args: argparse.Namespace) -> None:
    """Generate in turns, compare, print."""
    _check(args)
    if args.output is not None:
        check_output(args.output, (".json",), force=args.force, notes=False)
    lm = load(args.model, args.device, args.dtype)
    ids = lm.encode(args.prompt)
    policy = make_policy(args, lm)
    report = measure(args, lm, ids, policy)
    if args.output is not None:
        with replacing(args.output) as (file,):
            write_json(file, report)
    print(json.dumps(report, indent=2, default=str) if args.json else as_text(report))


def make_policy(args: argparse.Namespace, lm: LanguageModel) -> Callable[[Any], Any] | None:
    """What is applied to the model for the policy, as a function of the model; None for plain decoding.

    The statistics that a policy needs are measured here.
    """
    from skipguide.llm import AdaSkip, SelfSpeculative, UnifiedSkip

    def statistics_of_text() -> Any:
        return AdaSkip.calibrate(lm.model, lm.windows(texts(args.text), PIECE_TOKENS, PIECES))

    if args.policy == "adaskip":
        ada = AdaSkip(
            skip_ratio=0.125 if args.skip_ratio is None else args.skip_ratio,
            phase=args.phase or "both",
            online=not args.no_online,
            cost_aware=args.cost_aware,
        )
        stats = statistics_of_text()
        costs = ada.measure(lm.model, PIECE_TOKENS) if args.cost_aware else None
        return lambda model: ada.apply(model, stats=stats, costs=costs)
    if args.policy == "unified":
        return UnifiedSkip(**given(args, ("speedup", "mode", "phase"))).apply
    if args.policy == "self-speculative":
        return SelfSpeculative(stats=statistics_of_text(), **given(args, ("draft_skip", "max_draft"))).apply
    return None


def measure(
    args: argparse.Namespace, lm: LanguageModel, ids: Any, policy: Callable[[Any], Any] | None
) -> dict[str, Any]:
    """Everything that is printed, as plain data."""
    _warm_up(lm, ids, policy)
    seconds: dict[str, list[float]] = {"plain": [], "policy": []}
    outputs: dict[str, Any] = {}
    ledger: dict[str, Any] = {}
    for _ in range(args.rounds):
        outputs["plain"], taken = _generate(args, lm, ids)
        seconds["plain"].append(taken)
        with nullcontext() if policy is None else policy(lm.model) as applied:
            outputs["policy"], taken = _generate(args, lm, ids)
        seconds["policy"].append(taken)
        if applied is not None:
            ledger = applied.stats.to_dict()
    new = {name: int(out.shape[1] - ids.shape[1]) for name, out in outputs.items()}
    rates = {name: new[name] / statistics.median(taken) for name, taken in seconds.items()}
    return {
        "prompt": args.prompt,
        "text": lm.tokenizer.decode(outputs["policy"][0, ids.shape[1] :]),
        "policy": args.policy,
        "model": lm.describe(),
        "new_tokens": new["policy"],
        "tokens_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "speedup": round(rates["policy"] / rates["plain"], 3),
        "same_text_as_plain": outputs["plain"].tolist() == outputs["policy"].tolist(),
        **_left_out(args, ledger),
        **_agreement(args, lm, outputs["policy"], ids.shape[1], policy),
        "arguments": plain_arguments(args),
        "versions": versions(),
    }


def _left_out(args: argparse.Namespace, ledger: dict[str, Any]) -> dict[str, Any]:
    if args.policy == "self-speculative":
        return {"skipped_fraction": 0.0, "kv_bytes_saved": 0, "speculation": ledger}
    return {
        "skipped_fraction": round(ledger.get("skipped_fraction", 0.0), 4),
        "skipped": sorted(ledger.get("skips", {})),
        "kv_bytes": ledger.get("kv_bytes"),
        "kv_bytes_saved": ledger.get("kv_bytes_saved", 0),
    }


def _agreement(
    args: argparse.Namespace, lm: LanguageModel, ids: Any, prompt: int, policy: Callable[[Any], Any] | None
) -> dict[str, Any]:
    """Agreement on the policy's own text; a lossless policy is the whole model, by construction."""
    from skipguide.llm.agreement import agreement

    if args.policy in ("self-speculative", "none"):
        return {"agreement": {"kl": 0.0, "top1": 1.0, "tokens": int(ids.shape[1] - prompt)}, "lossless": True}
    return {"agreement": asdict(agreement(lm.model, ids, prompt, policy)), "lossless": False}


def _generate(args: argparse.Namespace, lm: LanguageModel, ids: Any) -> tuple[Any, float]:
    import torch

    torch.manual_seed(args.seed)
    how: dict[str, Any] = {"do_sample": args.sample}
    if args.temperature is not None:
        how["temperature"] = args.temperature
    began = _now(lm.device)
    try:
        out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.max_new_tokens, **how)
    except SkipError:
        raise
    except (ValueError, IndexError) as error:
        raise SkipError(f"{type(lm.model).__name__} failed: {error} (--traceback shows where)") from error
    return out, _now(lm.device) - began


def _warm_up(lm: LanguageModel, ids: Any, policy: Callable[[Any], Any] | None) -> None:
    """Run everything once without timing it: what is slow only once, such as the first allocation, is not counted."""
    for context in (nullcontext(), nullcontext() if policy is None else policy(lm.model)):
        with context:
            lm.model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)


def _now(device: str) -> float:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that the chosen policy does not have: they would do nothing."""
    for policy, flags in OWN_FLAGS.items():
        for flag in flags:
            if getattr(args, flag) not in (None, False) and flag not in OWN_FLAGS[args.policy]:
                raise SkipError(f"--{flag.replace('_', '-')} belongs to --policy {policy}; got --policy {args.policy}")
    if args.policy == "unified" and args.phase == "prefill":
        raise SkipError("--policy unified skips in --phase decode or both")
    if args.temperature is not None and not args.sample:
        raise SkipError("--temperature does nothing without --sample")


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    model, rate, agreement = report["model"], report["tokens_per_second"], report["agreement"]
    lines = [
        report["prompt"] + report["text"],
        "",
        f"{model['name']}: {model['class']}, {model['layers']} layers, {model['parameters'] / 1e6:,.1f} M parameters, "
        f"{model['device']} {model['dtype']}; policy {report['policy']}",
        f"tokens/s: {rate['policy']:.1f} with the policy, {rate['plain']:.1f} without: x{report['speedup']:.2f} "
        f"({report['new_tokens']} new tokens)",
    ]
    if (spoken := report.get("speculation")) is not None:
        lines.append(
            f"drafts: {spoken['accepted']} of {spoken['drafted']} tokens accepted in {spoken['rounds']} rounds "
            f"({spoken['acceptance']:.0%} of those that were judged: none is behind the first rejected one), "
            f"{spoken['plain_steps']} plain steps, switched off "
            f"{spoken['switched_off']} times"
        )
        drafter = ", ".join(f"{part} {_numbers(spoken[part])}" for part in ("attn", "mlp"))
        exact = "" if model["dtype"] == "float32" else f", up to logits that are tied in {model['dtype']}"
        lines.append(f"the drafter leaves out: {drafter}; the output is the whole model's (lossless{exact})")
        return "\n".join(lines)
    saved, held = report["kv_bytes_saved"] or 0, report["kv_bytes"] or 0
    share = saved / (saved + held) if saved else 0.0
    lines += [
        f"left out: {report['skipped_fraction']:.1%} of the sublayer runs, {len(report['skipped'])} sublayers",
        f"key-value cache: {saved:,} bytes saved ({share:.1%})",
        f"agreement with the whole model on this text: KL {agreement['kl']:.4f} nats, top-1 {agreement['top1']:.1%} "
        f"of {agreement['tokens']} tokens",
    ]
    return "\n".join(lines)


def _numbers(layers: list[int]) -> str:
    return " ".join(map(str, layers)) or "none"
