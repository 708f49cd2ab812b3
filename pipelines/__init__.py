"""Guidance inside stock diffusers pipelines."""

if __name__ != "skipguide.pipelines":
    raise ImportError(
        f"this folder is the package skipguide.pipelines and was imported as {__name__!r}; "
        "write `import skipguide.pipelines` (a second name would load every module twice)"
    )
