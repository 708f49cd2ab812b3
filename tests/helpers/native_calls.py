"""Direct calls of a denoiser under `PrefixReuse`: a stand-in for the pipeline says which passes will come."""

from types import SimpleNamespace

import torch

from skipguide.pipelines import PrefixReuse


def near(a, b, tolerance=1e-5):
    """Equal to rounding: passes of another batch size move the last bits."""
    assert a.shape == b.shape
    assert (a - b).norm() <= tolerance * b.norm(), float((a - b).norm() / b.norm())


def compared(case, pipe, **call):
    """A stock call without and with prefix reuse: both results, and the stats."""
    plain = case.run(pipe, **call)
    with PrefixReuse().apply(pipe) as applied:
        out = case.run(pipe, **call)
    return plain, out, applied.stats


def ltx2_pipe(model, stg=(2,), modality=False):
    """What LTX-2's foretelling reads of a modular pipeline, around one model."""
    guider = SimpleNamespace(
        spatio_temporal_guidance_blocks=list(stg),
        is_stg_enabled=lambda: bool(stg),
        is_modality_enabled=lambda: modality,
    )
    return SimpleNamespace(transformer=model, guider=guider)


def ltx2_row(inputs, row=1):
    """The same call for one row of its batch."""
    batch = inputs["hidden_states"].shape[0]
    cut = {k: v[row : row + 1] if torch.is_tensor(v) and len(v) == batch else v for k, v in inputs.items()}
    return {**cut, "return_dict": False}
