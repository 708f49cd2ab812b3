"""Bars: a few numbers with large words, the ones of this library in colour."""

from __future__ import annotations

import io
from collections.abc import Mapping

from PIL import Image

from demos.study import canvas

OURS, OTHERS = "#2563eb", "#cbd5e1"
SIZE = 20  # of the letters, in points


def bars(values: Mapping[str, float], ours: set[str], title: str, form: str) -> Image.Image:
    """Horizontal bars from the top down.

    Args:
        values: by their words.
        ours: the words of those in colour.
        title: above them, in lines.
        form: of the number behind a bar, as for `%`.
    """
    figure, axes = canvas(1, 1, width=6.9, height=4.1)
    axis = axes[0, 0]
    drawn = axis.barh([*values], [*values.values()], color=[OURS if name in ours else OTHERS for name in values])
    axis.bar_label(drawn, fmt=form, fontsize=SIZE, padding=4)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.35 * max(values.values()))
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(axis="y", labelsize=SIZE, length=0)
    figure.suptitle(title, fontsize=SIZE)
    data = io.BytesIO()
    figure.savefig(data, dpi=100, metadata={"Software": None})
    return Image.open(data)
