"""The decoding loop of self-speculation: prefill once, then draft, verify, commit, on one shared cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.hosts.kv_cache import cache_among, length
from skipguide.llm.speculative.chooser import Chooser
from skipguide.llm.speculative.stats import SpeculationStats
from skipguide.llm.speculative.verify import Verdict, accept_greedy, accept_sampled


class Drafter(Protocol):
    """Turns the model into its own drafter for the length of a `with`."""

    def drafting(self, cache: Any, number: int) -> AbstractContextManager[object]:
        """While open, the model leaves out what drafter `number` does, on the full model's cache.

        Afterwards the cache is as before.
        """

    def rest(self) -> None:
        """Drafting will not go on for a while."""


class Steps(Protocol):
    """Who is told of plain steps."""

    def plain_step(self, seconds: float) -> None:
        """Enter a step without a draft."""


@dataclass
class Request:
    """What `generate` prepared, and how far it has got.

    Attributes:
        ids: [B, T] tokens so far; the cache holds the first T - 1.
        unfinished: [B] int64, 1 while a row goes on.
        model_kwargs: what a forward is given besides the tokens; its mask and positions grow with `ids`.
    """

    model: Any
    ids: Tensor
    processor: Callable[[Tensor, Tensor], Tensor]
    criteria: Any
    config: Any
    streamer: Any
    model_kwargs: dict[str, Any]
    unfinished: Tensor = field(init=False)
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.unfinished = torch.ones(len(self.ids), dtype=torch.long, device=self.ids.device)
        self.ends_early = any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)
        pad = self.config._pad_token_tensor
        self.pad = pad.to(self.ids.device) if pad is not None else None

    @property
    def cache(self) -> Any:
        """The shared cache."""
        return cache_among(self.model_kwargs)

    @property
    def room(self) -> int:
        """How many tokens may still come, by the maximal length."""
        return int(self.config.max_length) - self.ids.shape[1]

    def forward(self, ids: Tensor, count: int, model_kwargs: dict[str, Any]) -> Any:
        """Run the model on the last `count` tokens of `ids`.

        Raises:
            SkipError: if other tokens than these went into the cache. PEFT's prompt tuning puts its virtual tokens in
                front of every pass: one over several tokens then is another text than as many single ones.
        """
        if "logits_to_keep" in model_kwargs:
            model_kwargs = {**model_kwargs, "logits_to_keep": count}
        held = length(self.cache)
        inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=count, **model_kwargs)
        outputs = self.model(**inputs, return_dict=True)
        if (grown := length(self.cache) - held) != count:
            raise SkipError(
                f"a pass over {count} tokens put {grown} into the KV cache: something adds tokens of its own to every "
                f"pass (prompt tuning of PEFT does), or the cache is another one. What is drafted could not be "
                f"verified: decode without SelfSpeculative"
            )
        return outputs

    def grown(self, outputs: Any, count: int, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """`model_kwargs` for `count` tokens more."""
        return self.model._update_model_kwargs_for_generation(outputs, dict(model_kwargs), num_new_tokens=count)

    def commit(self, outputs: Any, tokens: Tensor, raw: Tensor, scores: Tensor) -> bool:
        """Append tokens one by one, as plain decoding would: each may end a row, or everything.

        Args:
            outputs: of the forward that they come from.
            tokens: [B, n].
            raw: [B, n, V] of the model, as float32.
            scores: [B, n, V] of the processors.

        Returns:
            Whether to stop.
        """
        stop, count = False, 0
        for j in range(tokens.shape[1]):
            token = tokens[:, j]
            if self.ends_early and self.pad is not None:
                token = token * self.unfinished + self.pad * (1 - self.unfinished)
            if self.config.return_dict_in_generate:
                if self.config.output_scores:
                    self.scores.append(scores[:, j])
                if self.config.output_logits:
                    self.logits.append(raw[:, j])
            self.ids = torch.cat([self.ids, token[:, None]], dim=1)
            if self.streamer is not None:
                self.streamer.put(token.cpu())
            count += 1
            self.unfinished = self.unfinished & ~self.criteria(self.ids, tuple(self.scores) or None)
            if stop := bool(self.unfinished.max() == 0):
                break
        self.model_kwargs = self.grown(outputs, count, self.model_kwargs)
        return stop


def start(request: Request, outputs: Any) -> bool:
    """Choose the first token, from the prefill's outputs; whether to stop there."""
    return _commit_plain(request, outputs, outputs.logits[:, -1:].to(torch.float32))


def run(request: Request, drafter: Drafter, chooser: Chooser, stats: SpeculationStats) -> None:
    """Decode until everything is finished.

    Args:
        request: with at least one token beyond what the cache holds.
        drafter: of this model.
        chooser: of this request.
        stats: filled in as it goes.
    """
    stop, single = False, len(request.ids) == 1
    while not stop:
        room = request.room - 1
        size, found = 0, list[int]()
        if single and chooser.lookup:
            chooser.read(request.ids[0, len(chooser.text.tokens) :].tolist())
            size, found = chooser.looked_up(room)
        if found:
            stop = _looked_up_round(request, chooser, stats, size, found)
        elif (length := chooser.own_length(room)) > 0:
            stop = _own_round(request, drafter, chooser, stats, length)
        else:
            drafter.rest()
            stop = plain_step(request, chooser, stats)


def _commit_plain(request: Request, outputs: Any, raw: Tensor) -> bool:
    scores = request.processor(request.ids, raw[:, 0].clone())
    if request.config.do_sample:
        token = torch.multinomial(scores.softmax(dim=-1), 1)
    else:
        token = scores.argmax(dim=-1, keepdim=True)
    return request.commit(outputs, token, raw, scores[:, None])


def plain_step(request: Request, chooser: Steps, stats: SpeculationStats) -> bool:
    """One token by the full model alone; whether to stop."""
    began = _clock(request)
    outputs = request.forward(request.ids, 1, request.model_kwargs)
    request.cache.crop(0)  # a recording sliding window shrinks back to its size
    stop = _commit_plain(request, outputs, outputs.logits[:, -1:].to(torch.float32))
    seconds = _clock(request) - began
    chooser.plain_step(seconds)
    stats.plain_steps += 1
    stats.plain_seconds += seconds
    return stop


def _own_round(request: Request, drafter: Drafter, chooser: Chooser, stats: SpeculationStats, length: int) -> bool:
    """A round whose draft the model makes itself; whether to stop."""
    began = _clock(request)
    draft = _draft(request, drafter, chooser, length)
    between = _clock(request)
    accepted, stop = _verify(request, draft, stats)
    ended = _clock(request)
    chooser.own_round(draft.confidences, accepted, between - began, ended - between)
    stats.draft_seconds += between - began
    stats.verify_seconds += ended - between
    return stop


def _looked_up_round(request: Request, chooser: Chooser, stats: SpeculationStats, size: int, found: list[int]) -> bool:
    """A round whose draft stood in the text already; whether to stop."""
    began = _clock(request)
    drafted = torch.tensor([found], dtype=request.ids.dtype, device=request.ids.device)
    draft = _Draft(torch.cat([request.ids, drafted], dim=1), None, [])
    accepted, stop = _verify(request, draft, stats)
    seconds = _clock(request) - began
    chooser.looked_up_round(size, len(found), accepted, seconds)
    stats.verify_seconds += seconds
    stats.lookup_rounds += 1
    stats.lookup_drafted += len(found)
    stats.lookup_accepted += accepted
    return stop


def _verify(request: Request, draft: _Draft, stats: SpeculationStats) -> tuple[int, bool]:
    """Let the full model judge a draft, whoever made it; how much it accepts, and whether to stop."""
    ids, probabilities, start = draft.ids, draft.probabilities, request.ids.shape[1]
    drafted = ids[:, start:]
    count = drafted.shape[1]
    outputs = request.forward(ids, count + 1, request.grown({}, count, request.model_kwargs))
    raw = outputs.logits[:, -count - 1 :].to(torch.float32)
    scores = torch.stack([request.processor(ids[:, : start + j], raw[:, j].clone()) for j in range(count + 1)], dim=1)
    if not request.config.do_sample:
        verdict = accept_greedy(drafted, scores)
    else:
        if probabilities is None:  # what was looked up is drawn from nothing: it had to come
            probabilities = torch.nn.functional.one_hot(drafted, scores.shape[-1]).to(scores.dtype)
        verdict = accept_sampled(drafted, probabilities, scores.softmax(dim=-1))
    accepted = _common_matches(request, verdict, count)
    stop = request.commit(outputs, verdict.tokens[:, : accepted + 1], raw, scores)
    # start + count tokens are in the cache; those committed, but for the last, stay there
    request.cache.crop(request.ids.shape[1] - 1 - start - count)
    stats.rounds += 1
    stats.drafted += count
    stats.accepted += accepted
    stats.rejected_rounds += accepted < count
    return accepted, stop


@dataclass
class _Draft:
    """[B, T + k] tokens; a drafter's [B, k, V] when sampling, and its k confidences, of the least sure row."""

    ids: Tensor
    probabilities: Tensor | None
    confidences: list[float]


def _draft(request: Request, drafter: Drafter, chooser: Chooser, length: int) -> _Draft:
    ids, model_kwargs, alive = request.ids, request.model_kwargs, request.unfinished.bool()[:, None]
    probabilities: list[Tensor] = []
    confidences: list[float] = []
    with drafter.drafting(request.cache, chooser.drafter):
        for j in range(length):
            outputs = request.forward(ids, 1, model_kwargs)
            scores = request.processor(ids, outputs.logits[:, -1].to(torch.float32, copy=True))
            chances = scores.softmax(dim=-1)
            top, token = chances.max(dim=-1, keepdim=True)
            if request.config.do_sample:
                token = torch.multinomial(chances, 1)
                probabilities.append(chances)
            confidences.append(float(torch.where(alive, top, 1.0).min()))  # a mask as an index would wait once more
            ids = torch.cat([ids, token], dim=1)
            if j + 1 == length or _ends(request, token, alive) or not chooser.controller.worth_going_on(confidences):
                break
            model_kwargs = request.grown(outputs, 1, model_kwargs)
    return _Draft(ids, torch.stack(probabilities, dim=1) if probabilities else None, confidences)


def _ends(request: Request, tokens: Tensor, alive: Tensor) -> bool:
    """Whether the token of every row that goes on is an end: nothing needs to be drafted after it."""
    eos = getattr(request.config, "_eos_token_tensor", None)
    return eos is not None and bool((torch.isin(tokens, eos.to(tokens.device)) | ~alive).all())


def _common_matches(request: Request, verdict: Verdict, count: int) -> int:
    """How many drafted tokens every row accepts; a finished row accepts everything."""
    matches = torch.where(request.unfinished.bool(), verdict.matches, count)
    return int(matches.min())


def _clock(request: Request) -> float:
    if request.ids.device.type == "cuda":
        torch.cuda.synchronize(request.ids.device)
    return time.perf_counter()
