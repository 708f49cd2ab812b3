"""`skipguide llm generate`: a policy beside plain decoding, and what it costs and saves."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from skipguide.cli.arguments import given
from skipguide.cli.llm_models import PIECE_TOKENS, LanguageModel, load, order_of, statistics_of
from skipguide.cli.outputs import check_output, plain_arguments, replacing, versions, write_json
from skipguide.errors import SkipError
from skipguide.hosts.progress import progress_bar
from skipguide.shown import counted

OWN_FLAGS = {
    "adaskip": ("phase", "skip_ratio", "cost_aware", "no_online", "text", "stats"),
    "measured": ("phase", "skip_ratio", "text", "stats"),
    "unified": ("phase", "speedup", "mode"),
    "self-speculative": ("draft_skip", "max_draft", "no_lookup", "text", "stats"),
    "none": (),
}
SKIP_RATIO = 0.05  # a 30-layer model's perplexity rises by a tenth; by two thirds at an eighth (demos/README.md)


def run(args: argparse.Namespace) -> None:
    """Generate in turns, compare, print."""
    _check(args)
    if args.output is not None:
        check_output(args.output, (".json",), force=args.force, notes=False)
    lm = load(args.model, args.device, args.dtype)
    ids = lm.encode_chat(args.prompt) if args.chat else lm.encode(args.prompt)
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
    from skipguide.llm import AdaSkip, MeasuredSkip, SelfSpeculative, UnifiedSkip

    def statistics_of_text() -> Any:
        return statistics_of(lm, args.text, args.stats)

    one = 1 / (2 * lm.describe()["layers"])  # a small model leaves out one sublayer at least
    ratio = max(SKIP_RATIO, one) if args.skip_ratio is None else args.skip_ratio
    if args.policy == "measured":
        found = order_of(lm, args.text, args.stats, max(1, round(ratio / one)))
        return MeasuredSkip(skip_ratio=ratio, phase=args.phase or "both").plan(found).apply
    if args.policy == "adaskip":
        ada = AdaSkip(
            skip_ratio=ratio,
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
        how = given(args, ("draft_skip", "max_draft")) | {"lookup": not args.no_lookup}
        return SelfSpeculative(stats=statistics_of_text(), **how).apply
    return None


def measure(
    args: argparse.Namespace, lm: LanguageModel, ids: Any, policy: Callable[[Any], Any] | None
) -> dict[str, Any]:
    """Everything that is printed, as plain data."""
    _warm_up(lm, ids, policy)
    took: dict[str, list[_Taken]] = {"plain": [], "policy": []}
    outputs: dict[str, Any] = {}
    ledger: dict[str, Any] = {}
    for number in range(args.rounds):
        for name in took if number % 2 == 0 else reversed(took):  # in turns, so that a slower minute is both's
            with nullcontext() if name == "plain" or policy is None else policy(lm.model) as applied:
                outputs[name], taken = _generate(args, lm, ids)
            took[name].append(taken)
            if applied is not None:
                ledger = applied.stats.to_dict()
    new = {name: int(out.shape[1] - ids.shape[1]) for name, out in outputs.items()}
    prompt = {name: statistics.median(each.prompt for each in rows) for name, rows in took.items()}
    rates = {name: _rate(new[name] - 1, [each.decoding for each in rows]) for name, rows in took.items()}
    faster = rates["policy"] / rates["plain"] if rates["policy"] and rates["plain"] else None
    return {
        "prompt": args.prompt,
        "text": lm.tokenizer.decode(outputs["policy"][0, ids.shape[1] :]),
        "policy": args.policy,
        "model": lm.describe(),
        "prompt_tokens": int(ids.shape[1]),
        "new_tokens": new["policy"],
        "tokens_per_second": {name: rate and round(rate, 2) for name, rate in rates.items()},
        "speedup": faster and round(faster, 3),
        "prompt_seconds": {name: round(seconds, 5) for name, seconds in prompt.items()},
        "prompt_speedup": round(prompt["plain"] / prompt["policy"], 3),
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


@dataclass(frozen=True)
class _Taken:
    """Seconds of one generation: up to its first token, and from there on."""

    prompt: float
    decoding: float


class _Clock:
    """A streamer that notes when tokens come: the prompt itself, the first token, the last."""

    def __init__(self, device: str, bar: Any) -> None:
        self.device = device
        self.bar = bar
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        self.times.append(_now(self.device))
        self.bar.update(tokens.numel() if self.times[1:] else 0)  # the first are the prompt's

    def end(self) -> None:
        """Whoever made the bar closes it."""


def _rate(tokens: int, seconds: list[float]) -> float | None:
    """Tokens per second; None where the first token was the last."""
    return tokens / statistics.median(seconds) if tokens else None


def _generate(args: argparse.Namespace, lm: LanguageModel, ids: Any) -> tuple[Any, _Taken]:
    import torch

    torch.manual_seed(args.seed)
    how: dict[str, Any] = {"do_sample": args.sample, "num_beams": 1}
    if args.temperature is not None:
        how["temperature"] = args.temperature
    how |= {"max_new_tokens": args.max_new_tokens, "attention_mask": torch.ones_like(ids)}
    try:
        with progress_bar(what="generating", total=args.max_new_tokens, unit="token") as bar:
            clock = _Clock(lm.device, bar)
            began = _now(lm.device)
            out = lm.model.generate(ids, streamer=clock, **how)
    except SkipError:
        raise
    except (ValueError, IndexError) as error:
        raise SkipError(f"{type(lm.model).__name__} failed: {error} (--traceback shows where)") from error
    _, first, *rest = clock.times
    return out, _Taken(first - began, rest[-1] - first if rest else 0.0)


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
    model, prompt, agreement = report["model"], report["prompt_seconds"], report["agreement"]
    lines = [
        report["prompt"] + report["text"],
        "",
        f"{model['name']}: {model['class']}, {model['layers']} layers, {model['parameters'] / 1e6:,.1f} M parameters, "
        f"{model['device']} {model['dtype']}; policy {report['policy']}",
        _decoding(report),
        f"prompt: {1000 * prompt['policy']:,.1f} ms with the policy, {1000 * prompt['plain']:,.1f} ms without: "
        f"x{report['prompt_speedup']:.2f} ({report['prompt_tokens']} tokens)",
    ]
    if (spoken := report.get("speculation")) is not None:
        lines.append(
            f"drafts: {spoken['accepted']} of {spoken['drafted']} tokens accepted in {spoken['rounds']} rounds "
            f"({spoken['acceptance']:.0%} of those that were judged: none is behind the first rejected one), "
            f"{spoken['plain_steps']} plain steps; {spoken['lookup_rounds']} rounds were looked up in the text "
            f"({spoken['lookup_accepted']} of {spoken['lookup_drafted']} accepted), switched off "
            f"{spoken['switched_off']} times"
        )
        drafter = ", ".join(f"{part} {_numbers(spoken[part])}" for part in ("attn", "mlp"))
        exact = "" if model["dtype"] == "float32" else f", up to logits that are tied in {model['dtype']}"
        lines.append(f"the drafter leaves out: {drafter}; the output is the whole model's (lossless{exact})")
        return "\n".join(lines)
    saved, held = report["kv_bytes_saved"] or 0, report["kv_bytes"] or 0
    share = saved / (saved + held) if saved else 0.0
    sublayers = counted(len(report["skipped"]), "sublayer")
    lines += [
        f"left out: {report['skipped_fraction']:.1%} of the sublayer runs, {sublayers}",
        f"key-value cache: {saved:,} bytes saved ({share:.1%})",
        f"agreement with the whole model on this text: KL {agreement['kl']:.4f} nats, top-1 {agreement['top1']:.1%} "
        f"of {agreement['tokens']} tokens",
    ]
    return "\n".join(lines)


def _decoding(report: dict[str, Any]) -> str:
    """Tokens per second after the first token, of both."""
    rate, after = report["tokens_per_second"], report["new_tokens"] - 1
    if report["speedup"] is None:
        return "tokens/s: the first token was the last, and nothing was decoded"
    return (
        f"tokens/s: {rate['policy']:.1f} with the policy, {rate['plain']:.1f} without: x{report['speedup']:.2f} "
        f"({after} tokens after the first)"
    )


def _numbers(layers: list[int]) -> str:
    return " ".join(map(str, layers)) or "none"
