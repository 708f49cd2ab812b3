"""What Sphinx is told. Nothing is fetched: themes and inventories are here, and notebooks carry their outputs."""

from __future__ import annotations

import importlib
from typing import Any

import skipguide

PACKAGES = (
    "skipguide",
    "skipguide.pipelines",
    "skipguide.llm",
    "skipguide.vision",
    "skipguide.vision.layer_masking",
    "skipguide.vision.floorplan",
)

project = "skipguide"
author = "The skipguide maintainers"
project_copyright = author
release = version = skipguide.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_design",
]
exclude_patterns = ["_files", "_inventories"]
root_doc = "index"
default_role = "literal"  # docstrings write code in single backticks

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # outputs are committed; tests/repo/test_notebooks.py runs them
nb_ipywidgets_js: dict[str, Any] = {}  # would be fetched

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # an attribute may be a property with a docstring of its own as well
napoleon_custom_sections = [
    ("Formula and CFG", "params_style"),
    ("What it costs", "params_style"),
    ("Which layers beyond a list", "params_style"),
]

intersphinx_mapping = {
    "python": ("https://docs.python.org/3", "_inventories/python.inv"),
    "torch": ("https://docs.pytorch.org/docs/stable", "_inventories/torch.inv"),
    "numpy": ("https://numpy.org/doc/stable", "_inventories/numpy.inv"),
    "diffusers": ("https://huggingface.co/docs/diffusers/main/en", "_inventories/diffusers.inv"),
    "transformers": ("https://huggingface.co/docs/transformers/main/en", "_inventories/transformers.inv"),
}

html_theme = "pydata_sphinx_theme"
html_title = "skipguide"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "show_nav_level": 1,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "search_as_you_type": True,
}


def public_names() -> dict[str, str]:
    """Where a class really lies -> the public name that it is documented under, which annotations do not have."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            each = getattr(module, name)
            if hasattr(each, "__qualname__"):
                found.setdefault(f"{each.__module__}.{each.__qualname__}", f"{package}.{name}")
    return found


def link_to_public_name(app: Any, env: Any, node: Any, contents: Any) -> Any:
    """A type in a signature links to where it is documented."""
    target = public_names().get(node.get("reftarget", ""))
    if node.get("refdomain") != "py" or target is None:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contents)


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect("missing-reference", link_to_public_name, priority=400)
