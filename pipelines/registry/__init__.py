"""How each pipeline drives its denoiser: data, and what is refused."""

from skipguide.pipelines.registry.described import PIPELINES, pipeline_spec, register_pipeline
from skipguide.pipelines.registry.spec import PipelineSpec

__all__ = ["PIPELINES", "PipelineSpec", "pipeline_spec", "register_pipeline"]
