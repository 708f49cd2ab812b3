"""Pictures of clips: labels, clips side by side, contact sheets, files.

Everything takes and gives lists of Pillow images; `as_images` makes such a list of whatever a pipeline
returned. Pillow is imported when a function runs, so that importing this module costs nothing.
"""

from skipguide.media.frames import (
    amplified_difference,
    as_images,
    as_rgb,
    comfortable_zoom,
    difference,
    in_levels,
    pick,
    resized,
)
from skipguide.media.movies import open_webp, require_video, save_frames, save_gif, save_video, save_webp
from skipguide.media.sheets import (
    FAINT,
    INK,
    PAPER,
    TEXT_SIZE,
    banner,
    contact_sheet,
    in_a_row,
    label,
    side_by_side,
    stacked,
    wrap,
)

__all__ = [
    "FAINT",
    "INK",
    "PAPER",
    "TEXT_SIZE",
    "amplified_difference",
    "as_images",
    "as_rgb",
    "banner",
    "comfortable_zoom",
    "contact_sheet",
    "difference",
    "in_a_row",
    "in_levels",
    "label",
    "open_webp",
    "pick",
    "require_video",
    "resized",
    "save_frames",
    "save_gif",
    "save_video",
    "save_webp",
    "side_by_side",
    "stacked",
    "wrap",
]
