"""Skipping in vision models: gates, masks, tuning, nested and implicit networks."""

if __name__ != "skipguide.vision":
    raise ImportError(
        f"this folder is the package skipguide.vision and was imported as {__name__!r}; "
        "write `import skipguide.vision` (a second name would load every module twice)"
    )
