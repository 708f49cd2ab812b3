"""Calibration: the statistics of a model on texts of the user's own kind, measured while it runs whole."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from skipguide.config import as_whole
from skipguide.errors import SkipError
from skipguide.hosts.accelerate import execution_device
from skipguide.hosts.progress import progress_bar
from skipguide.llm.batch import Batch, check_batches, ids_and_mask, vocabulary_of
from skipguide.llm.cost import last_token_only
from skipguide.llm.elsewhere import refuse_skipping
from skipguide.llm.find import sublayer_map
from skipguide.llm.passes import evaluating
from skipguide.llm.similarity import RequestMeter, StatsMeter, SublayerStats
from skipguide.llm.watch import watch


def calibrate(model: nn.Module, batches: Iterable[Batch], requests: int | None = None) -> SublayerStats:
    """Measure the statistics on texts of the user's own kind; the model runs whole. About 20 long ones are enough.

    Args:
        model: a causal language model of a known family.
        batches: each of them token ids [T] or [B, T], or a tokenizer output with `input_ids` and `attention_mask`.
            Every row counts as one request, padding as nothing.
        requests: stop after so many; None takes all. The published code takes the first 20.

    Raises:
        SkipError: for no batches, what is no batch or not of this model's vocabulary, a model that sublayers are left
            out of, and statistics that are not finite.
    """
    check_batches(batches)
    requests = None if requests is None else as_whole("requests", requests)
    found = sublayer_map(model)
    refuse_skipping(found)
    device = execution_device(model)
    vocabulary = vocabulary_of(found.model)
    meter = StatsMeter(found.num_layers, type(found.model).__name__)
    with evaluating(model):
        for number, batch in enumerate(progress_bar(batches, "calibrating")):
            ids, mask = ids_and_mask(batch, number, vocabulary)
            left = None if requests is None else requests - meter.requests
            ids, mask = ids[:left].to(device), None if mask is None else mask[:left].to(device)
            request = RequestMeter(found.num_layers)
            with watch(model, request.entering(mask)):
                try:
                    model(input_ids=ids, attention_mask=mask, use_cache=False, **last_token_only(model))
                except IndexError as error:  # the ids are in the vocabulary: learned positions have ended
                    raise SkipError(
                        f"batch {number} of {ids.shape[1]} tokens is longer than the positions of "
                        f"{type(found.model).__name__} ({error}): cut it into several"
                    ) from error
            meter.add(request)
            if meter.requests == requests:
                break
    return meter.result()
