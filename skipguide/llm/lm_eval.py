r"""lm-eval: the language model evaluation harness on a model with sublayers left out.

Needs the extra: `pip install "skipguide[eval]"`. The harness finds models in a registry of its own process, so that
its command is run through this module, with everything that it takes:

    python -m skipguide.llm.lm_eval run --model skipguide-hf --tasks lambada_openai \
        --model_args pretrained=Qwen/Qwen3-0.6B,policy=unified,policy_speedup=1.5,policy_phase=both

In a program, `register()` adds the model `skipguide-hf`, which is the harness's `hf` with a policy, for
`lm_eval.simple_evaluate(model="skipguide-hf", model_args=...)`; or wrap a model of one's own with
`PolicyLM(HFLM(...), policy)`.

The harness scores a text in one pass over all of it. A policy whose phase is `"decode"` skips nothing there: its scores
would be the whole model's, and that is refused. Tasks that generate need nothing of the kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skipguide.errors import SkipError
from skipguide.files import parse_json, read_json
from skipguide.llm.adaskip import AdaSkip
from skipguide.llm.plan import SublayerPlan
from skipguide.llm.similarity import SublayerStats
from skipguide.llm.speculative.self_speculative import SelfSpeculative
from skipguide.llm.unified import UnifiedSkip

NAME = "skipguide-hf"
POLICIES: dict[str, Any] = {
    "adaskip": AdaSkip,
    "unified": UnifiedSkip,
    "self-speculative": SelfSpeculative,
    "plan": SublayerPlan,
}


class PolicyLM:
    """A harness model whose requests run with a policy applied; everything else is the inner model's.

    Args:
        inner: an `HFLM`, or whatever keeps its transformers model in `.model`.
        policy: `AdaSkip`, `UnifiedSkip`, `SelfSpeculative` or a `SublayerPlan`.
        stats: statistics for `AdaSkip`; without them it measures the first request of every call.

    Raises:
        SkipError: for an inner model without `.model`.
    """

    def __init__(self, inner: Any, policy: Any, stats: SublayerStats | None = None) -> None:
        if not hasattr(inner, "model"):
            raise SkipError(f"expected a harness model with a transformers model in .model; got {type(inner).__name__}")
        self.inner = inner
        self.policy = policy
        self.stats = stats

    def __getattr__(self, name: str) -> Any:
        """What is not about the policy is the inner model's."""
        return getattr(self.__dict__["inner"], name)

    def loglikelihood(self, requests: Any, **more: Any) -> Any:
        """Scores of continuations, with the policy applied."""
        return self._scored("loglikelihood", requests, more)

    def loglikelihood_rolling(self, requests: Any, **more: Any) -> Any:
        """Scores of whole texts, with the policy applied."""
        return self._scored("loglikelihood_rolling", requests, more)

    def generate_until(self, requests: Any, **more: Any) -> Any:
        """Texts, with the policy applied."""
        return self._run("generate_until", requests, more)

    def _scored(self, name: str, requests: Any, more: dict[str, Any]) -> Any:
        if getattr(self.policy, "phase", None) == "decode":
            raise SkipError(
                f"{name} scores texts in one pass, where a policy of phase 'decode' leaves nothing out: give it phase "
                f"'both', or evaluate on tasks that generate"
            )
        if isinstance(self.policy, AdaSkip) and self.stats is None:
            raise SkipError(f"{name} has no prompt to measure on: give AdaSkip statistics (AdaSkip.calibrate)")
        if isinstance(self.policy, SelfSpeculative):
            return getattr(self.inner, name)(requests, **more)  # lossless, and nothing is decoded here
        return self._run(name, requests, more)

    def _run(self, name: str, requests: Any, more: dict[str, Any]) -> Any:
        extra = {"stats": self.stats} if isinstance(self.policy, AdaSkip) else {}
        with self.policy.apply(self.inner.model, **extra):
            return getattr(self.inner, name)(requests, **more)


def load_policy(name: str, settings: str | Path | dict[str, Any] | None = None) -> Any:
    """A policy by name, with its settings as JSON: a file that `save_json` wrote, text, or a mapping.

    Raises:
        SkipError: for an unknown policy, or settings that it does not take.

    Example:
        >>> load_policy("unified", '{"speedup": 1.5, "phase": "both"}').speedup
        1.5
    """
    if name not in POLICIES:
        raise SkipError(f"no policy {name!r}; expected one of {', '.join(POLICIES)}")
    found: Any = settings
    if isinstance(settings, (str, Path)):
        text = str(settings)
        try:
            found = parse_json(text, "the text") if text.lstrip().startswith("{") else read_json(text)
        except (OSError, ValueError) as error:
            raise SkipError(f"cannot read the policy's settings from {text}: {error}{_AT_COMMAS}") from error
    if found is not None and not isinstance(found, Mapping):
        raise SkipError(f"expected the settings of the policy {name!r} as a mapping; got {found!r}")
    given: dict[str, Any] = dict(found or {})
    kind = POLICIES[name]
    if "version" in given:
        return kind.from_dict(given)
    try:
        return kind(**given)
    except TypeError as error:
        raise SkipError(f"{kind.__name__} does not take these settings: {error}") from error


_AT_COMMAS = (
    ". The harness cuts model_args at commas, inside JSON too: write one argument for each setting, as in "
    "policy=unified,policy_speedup=1.5,policy_phase=both, or name a file in policy_settings"
)


def policy_among(arguments: dict[str, Any]) -> tuple[Any, SublayerStats | None]:
    """The policy that the harness's `model_args` name, and its statistics; what is about them is taken out.

    Args:
        arguments: `policy`, and `policy_NAME` for each of its settings, as `policy_skip_ratio`, or `policy_settings`
            for all of them at once, JSON or a file; `policy_stats` is a file of `SublayerStats.save_json`.

    Raises:
        SkipError: for settings that the policy does not take, and for pieces of JSON that was cut at its commas.

    Example:
        >>> policy_among({"pretrained": "gpt2", "policy": "unified", "policy_speedup": 1.5, "policy_phase": "both"})
        (UnifiedSkip(speedup=1.5, phase='both'), None)
    """
    if pieces := [name for name in arguments if not name.isidentifier()]:
        raise SkipError(f"expected names of arguments; got {', '.join(map(repr, pieces))}{_AT_COMMAS}")
    name = arguments.pop("policy", "adaskip")
    settings, stats = arguments.pop("policy_settings", None), arguments.pop("policy_stats", None)
    single = {each.removeprefix("policy_"): arguments.pop(each) for each in list(arguments) if each[:7] == "policy_"}
    if single and settings is not None:
        raise SkipError(f"give the settings one by one ({', '.join(single)}) or all in policy_settings; got both")
    return load_policy(name, single or settings), None if stats is None else SublayerStats.load_json(stats)


def register() -> type:
    """Add `skipguide-hf` to the harness; what it takes beyond the arguments of `hf` is in `policy_among`.

    Returns:
        The class that was added.

    Raises:
        SkipError: if the harness is not installed.
    """
    try:
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise SkipError("the evaluation harness is not installed: pip install 'skipguide[eval]'") from error

    @register_model(NAME)
    class SkippingHFLM(HFLM):
        """The harness's `hf` with a policy."""

        def __init__(self, **kwargs: Any) -> None:
            policy, stats = policy_among(kwargs)
            super().__init__(**kwargs)
            self._policy = PolicyLM(_Inner(self, super()), policy, stats)

        def loglikelihood(self, requests: Any, **more: Any) -> Any:
            return self._policy.loglikelihood(requests, **more)

        def loglikelihood_rolling(self, requests: Any, **more: Any) -> Any:
            return self._policy.loglikelihood_rolling(requests, **more)

        def generate_until(self, requests: Any, **more: Any) -> Any:
            return self._policy.generate_until(requests, **more)

    return SkippingHFLM


class _Inner:
    """The harness's own methods of a model that overrides them."""

    def __init__(self, model: Any, methods: Any) -> None:
        self._model = model
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(self, name, getattr(methods, name))

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self._model.model


def main() -> None:
    """The harness's own command, which then knows `skipguide-hf`.

    Raises:
        SkipError: if the harness is not installed.
    """
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
