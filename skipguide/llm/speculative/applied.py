"""Self-speculation in force: what it refuses, how the drafter is found, and how `generate` gets there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from skipguide.applied import MethodHandle
from skipguide.errors import SkipError
from skipguide.gate import gate_of
from skipguide.hosts.generation import BATCHING, follow_generation, leave_generation
from skipguide.hosts.kv_cache import as_argument, cache_among, refuse_older_windows
from skipguide.llm.cache import mark_of
from skipguide.llm.cost import SublayerCosts
from skipguide.llm.elsewhere import plan_that_holds
from skipguide.llm.find import sublayer_map
from skipguide.llm.plan import SublayerPlan
from skipguide.llm.plan_checks import check_plan
from skipguide.llm.speculative import loop
from skipguide.llm.speculative.acceptance import Controller
from skipguide.llm.speculative.chooser import Chooser
from skipguide.llm.speculative.drafter import PromptMeter, SelfDrafter, StepClock, choose_drafter, expected_cost
from skipguide.llm.speculative.settings import SelfSpeculativeSettings
from skipguide.llm.speculative.stats import SpeculationStats
from skipguide.llm.sublayers import SublayerMap
from skipguide.shown import Row, Shown

_MISSING = object()


class AppliedSelfSpeculative(Shown, MethodHandle):
    """`model.generate` drafts and verifies while this is in force. Leave the `with` block or call `remove()` to end it.

    Attributes:
        config: the settings.
        model: the model.
        stats: rounds, drafts, acceptance and seconds of all requests so far.
        costs: milliseconds of every sublayer, once they were measured or if they were given.
        controller: of the last request; the next one begins with what it has learned.
    """

    def __init__(self, config: SelfSpeculativeSettings, model: Any) -> None:
        if not callable(getattr(model, "generate", None)) or not hasattr(model, "prepare_inputs_for_generation"):
            raise SkipError(f"expected a transformers model with generate(); got {type(model).__name__}")
        sublayers = sublayer_map(model)
        _check_config(config, sublayers)
        if isinstance(getattr(model.__dict__.get("generate"), "__self__", None), AppliedSelfSpeculative):
            raise SkipError(
                "SelfSpeculative is applied to this model already: call remove() on its handle first, or "
                "skipguide.remove_from(model) where that is gone"
            )
        self.config = config
        self.model = model
        self.stats = SpeculationStats()
        self.costs: SublayerCosts | None = config.costs
        self.controller: Chooser | None = None
        self._before = model.__dict__.get("generate", _MISSING)
        self._generate = model.generate
        self._inside = sublayers.model
        self._replacement = self.generate  # first: removing knows it by this
        model.generate = self._replacement
        follow_generation(self._inside, self, BATCHING)

    def generate(self, *args: Any, streamer: Any = None, tokenizer: Any = None, **kwargs: Any) -> Any:
        """What stands in for `model.generate`.

        transformers hands neither the streamer nor the tokenizer on to a decoding loop of one's own, so they are kept
        here.
        """
        if kwargs.get("custom_generate") is not None or kwargs.get("assistant_model") is not None:
            raise SkipError("SelfSpeculative is applied to this model: call remove() before decoding in another way")
        if tokenizer is not None:
            kwargs = _stop_strings(args, kwargs, tokenizer, self.model)

        def decoding(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
            return decode(self.config, self.stats, model, input_ids, streamer=streamer, applied=self, **prepared)

        return self._generate(*args, streamer=streamer, custom_generate=decoding, **kwargs)

    def _heading(self) -> str:
        where = f"on {type(self._inside).__name__}" if self._generate is not None else "removed"
        return f"Self-speculation ({where}), {self.stats._heading()}"

    def _rows(self) -> list[Row]:
        return self.stats._rows()

    def remove(self) -> None:
        """Give `model.generate` back; a second call does nothing.

        Raises:
            SkipError: if it was replaced in the meantime.
        """
        now = self.model.__dict__.get("generate", _MISSING)
        if now is self._replacement:
            if self._before is _MISSING:
                del self.model.generate
            else:
                self.model.generate = self._before
        elif self._generate is not None and now is not self._before:
            raise SkipError("model.generate was replaced while SelfSpeculative was applied: undo that first")
        leave_generation(self._inside, self, BATCHING)
        self._generate = None  # last: until here it can be repeated

    def _enter_generation(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching: nothing would be drafted, and nobody would be told.

        Raises:
            SkipError: always.
        """
        raise SkipError(
            "SelfSpeculative is applied to this model, and continuous batching (generate_batch, "
            'cache_implementation="paged") has a loop of its own, which drafts nothing: use generate(), or call '
            "remove() first"
        )

    def __enter__(self) -> AppliedSelfSpeculative:
        """Return the handle."""
        return self

    def __exit__(self, *exc: object) -> None:
        """End it."""
        try:
            self.remove()
        except BaseException:  # Ctrl-C: what was broken off is done again
            self.remove()
            raise


def decode(
    config: SelfSpeculativeSettings,
    stats: SpeculationStats,
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    applied: AppliedSelfSpeculative | None = None,
    **model_kwargs: Any,
) -> Any:
    """Decode one request, or a batch of them, with what `generate` has prepared.

    Raises:
        SkipError: for a cache that cannot be taken back, and for ways of decoding that drafting does not cover.
    """
    sublayers = sublayer_map(model)
    _check_config(config, sublayers)
    _check_request(model, sublayers, generation_config, model_kwargs, synced_gpus)
    request = loop.Request(
        model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs
    )
    chooser = _chooser(config, applied)
    chooser.prepared = chooser.wants_drafters
    meter = PromptMeter(model) if config.plan is None and config.stats is None and chooser.prepared else None
    if meter is None:
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
    else:
        with meter.watching():
            outputs = model._prefill(input_ids, generation_config, model_kwargs)
    stop = loop.start(request, outputs)
    del outputs
    _check_cache(request.cache)
    stats.requests += 1
    with _recording(request.cache):
        costs = applied.costs if applied is not None else config.costs
        if not stop and config.plan is None and costs is None:
            # A first step that is not timed, as it also warms up what decoding needs
            stop, costs = _timed_steps(request, chooser, stats, sublayers)
            if applied is not None:
                applied.costs = costs
        if not stop:
            plans = _plans(config, meter, costs, sublayers) if chooser.prepared else []
            chooser.expect([expected_cost(plan, costs, sublayers) for plan in plans])
            with SelfDrafter(plans, model) as drafter:
                loop.run(request, drafter, chooser, stats)
            if plans:
                plan = plans[chooser.drafter]
                stats.attn, stats.mlp = tuple(plan.attn), tuple(plan.mlp)
            stats.switched_off += chooser.switched_off
    if streamer is not None:
        streamer.end()
    return _result(request, generation_config)


def _plans(
    config: SelfSpeculativeSettings, meter: PromptMeter | None, costs: SublayerCosts | None, sublayers: SublayerMap
) -> list[SublayerPlan]:
    """What the drafters leave out, most of the time first."""
    if config.plan is not None:
        return [SublayerPlan(config.plan.attn, config.plan.mlp, config.plan.attn_scale, config.plan.mlp_scale)]
    similarities = config.stats if meter is None else meter.stats()
    assert similarities is not None
    assert costs is not None
    return [choose_drafter(similarities, costs, share, keep_attn=sublayers.producers) for share in config.shares]


def _chooser(config: SelfSpeculativeSettings, applied: AppliedSelfSpeculative | None) -> Chooser:
    if applied is not None and applied.controller is not None:
        applied.controller = applied.controller.again()
        return applied.controller
    drafters = 1 if config.plan is not None else len(config.shares)
    fresh = Chooser(config.max_draft, config.adaptive, config.confidence_exit, config.lookup, drafters)
    if applied is not None:
        applied.controller = fresh
    return fresh


def _timed_steps(
    request: loop.Request, chooser: Chooser, stats: SpeculationStats, sublayers: SublayerMap
) -> tuple[bool, SublayerCosts | None]:
    """Two plain steps: one to warm up, one with a clock on every sublayer; whether to stop, and the costs."""
    scratch = Controller()  # clocks make a step slower: it is no measure of plain decoding
    if loop.plain_step(request, chooser, stats):
        return True, None
    with StepClock(sublayers, request.ids.device) as clock:
        stop = loop.plain_step(request, scratch, stats)
    return stop, clock.costs(request.ids.shape[1])


@contextmanager
def _recording(cache: Any) -> Iterator[None]:
    """Sliding windows keep what a crop needs, for as long as the block lasts."""
    layers = [layer for layer in cache.layers if hasattr(layer, "record_past")]
    before = [layer.record_past for layer in layers]
    cache.activate_past_recording()
    try:
        yield
    finally:
        for layer, recorded in zip(layers, before, strict=True):
            layer.record_past = recorded


def _result(request: loop.Request, config: Any) -> Any:
    if not config.return_dict_in_generate:
        return request.ids
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(
        sequences=request.ids,
        scores=tuple(request.scores) if config.output_scores else None,
        logits=tuple(request.logits) if config.output_logits else None,
        **as_argument(GenerateDecoderOnlyOutput, request.cache),
    )


def _check_config(config: SelfSpeculativeSettings, sublayers: SublayerMap) -> None:
    for name, found in (("statistics", config.stats), ("costs", config.costs)):
        layers = None if found is None else len(getattr(found, "attn_similarity", getattr(found, "attn_ms", ())))
        if layers is not None and layers != sublayers.num_layers:
            raise SkipError(
                f"the {name} are of a model of {layers} layers; {type(sublayers.model).__name__} has "
                f"{sublayers.num_layers}"
            )
    if config.plan is not None:
        check_plan(config.plan, sublayers)
    elif config.stats is None and not sublayers.watchable:
        raise SkipError(
            f"the similarities of {type(sublayers.model).__name__} cannot be measured ({sublayers.layout.note}): say "
            f"what the drafter leaves out, SelfSpeculative(plan=SublayerPlan(...))"
        )


def _check_request(
    model: Any, sublayers: SublayerMap, config: Any, model_kwargs: dict[str, Any], synced_gpus: bool
) -> None:
    """Refuse what drafting does not cover, before anything runs."""
    wrong = {
        "an encoder-decoder model": model.config.is_encoder_decoder,
        "beam search (num_beams)": (config.num_beams or 1) > 1,
        "use_cache=False (some models' own default): drafting needs use_cache=True": not model_kwargs.get("use_cache"),
        "an assistant of transformers": bool(config.prompt_lookup_num_tokens or config.assistant_early_exit),
        "guidance_scale, whose processor runs the model itself": (config.guidance_scale or 1) != 1,
        "output_attentions or output_hidden_states": bool(config.output_attentions or config.output_hidden_states),
        "synced_gpus (sharded training frameworks)": synced_gpus,
    }
    found = [what for what, is_so in wrong.items() if is_so]
    mode = str(config.get_generation_mode().value)
    if not found and mode not in ("greedy_search", "sample"):  # transformers leaves it to the loop, which knows neither
        found = [mode.replace("_", " ")]
    if found:
        raise SkipError(
            f"SelfSpeculative does not go with {'; '.join(found)}. Leave it out, or decode without drafting"
        )
    if plan_that_holds(gate_of(sublayers.decoder)) is not None:
        raise SkipError(
            "sublayers are left out of this model already (AdaSkip, UnifiedSkip or a plan is applied): the full model "
            "could not verify. End that first"
        )
    cache = cache_among(model_kwargs)
    if cache is None:
        raise SkipError("generate() prepared no cache: SelfSpeculative needs a model with a key-value cache")
    if mark_of(cache) is not None:
        raise SkipError("this KV cache was made with sublayers left out: start a new sequence")
    if getattr(cache, "layers", None):
        _check_cache(cache)


def _check_cache(cache: Any) -> None:
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [])}
    # transformers 5.24 crops static layers too, but a draft's keys stay in them, behind their length
    lossy = any(word in kind for kind in kinds for word in ("Quantized", "Static"))
    if not kinds or not getattr(cache, "is_croppable", False) or lossy:
        raise SkipError(
            f"drafts must be taken back from the cache without a trace, which a {type(cache).__name__} of "
            f"{', '.join(sorted(kinds)) or 'no layers'} cannot: use the default dynamic cache of an attention model"
        )
    refuse_older_windows(kinds)


def _stop_strings(args: tuple[Any, ...], kwargs: dict[str, Any], tokenizer: Any, model: Any) -> dict[str, Any]:
    """`stop_strings` as a stopping criterion: transformers wants the tokenizer for it, and does not get it here."""
    given = kwargs.pop("stop_strings", None)
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")
    if any(getattr(where, "stop_strings", None) for where in (config, getattr(model, "generation_config", None))):
        raise SkipError(
            "pass stop_strings to generate() itself, not inside a generation_config (of the call, or the model's own)"
        )
    if given is None:
        return kwargs
    from transformers import StoppingCriteriaList, StopStringCriteria

    criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
    criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=given))
    return {**kwargs, "stopping_criteria": criteria}
