"""Plan checks: whether a model can run a sublayer plan."""

from __future__ import annotations

from skipguide.errors import SkipError
from skipguide.llm.plan_data import SublayerPlanData
from skipguide.llm.sublayers import SublayerMap


def check_plan(plan: SublayerPlanData, sites: SublayerMap, cached: bool = True) -> None:
    """Refuse a plan that the model cannot run.

    Raises:
        SkipError: see `SublayerPlan.apply`.
    """
    for layer in plan.attn:
        name = sites.site(layer, "attn").name
        if layer in sites.producers:
            raise SkipError(
                f"{name} cannot be left out: later layers of {type(sites.model).__name__} read its keys and values "
                f"(shared KV cache)"
            )
    for layer in plan.mlp:
        sites.site(layer, "mlp")
    kept = [site for site in sites.sites if site.part == "attn" and site.layer not in plan.attn]
    if cached and plan.attn and not kept:
        raise SkipError(
            f"every attention of {type(sites.model).__name__} is left out, and a KV cache needs one that is kept: keep "
            f"one, or say plan.apply(model, cached=False) and run with use_cache=False"
        )
    check_scale(bool(plan.attn_scale or plan.mlp_scale), sites)


def check_scale(scaled: bool, sites: SublayerMap) -> None:
    """Refuse a scale per sublayer where there is no sum of sublayers."""
    if scaled and not sites.scalable:
        why = "run attention and feed-forward in parallel" if sites.parallel else "are not h + sublayer(norm(h))"
        raise SkipError(
            f"a scale per sublayer is not defined for {type(sites.model).__name__}: its layers {why}. Leave attn_scale "
            f"and mlp_scale empty"
        )
