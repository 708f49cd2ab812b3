"""The documentation site: its pages, where links lead, and a strict build that asks nothing of the network."""

import importlib.util
import re
import shlex
import sys
import zlib
from pathlib import Path

import pytest

from demos.site import readmes, staging
from demos.site.readmes import ROOT, relinked, sections, slug
from skipguide.cli import build_parser

SYSTEMS = {
    "guidance": "Spatiotemporal Skip Guidance",
    "adaskip": "AdaSkip",
    "unified": "Unified Layer Skipping",
    "self_speculative": "self-speculation",
    "skipnet": "SkipNet",
    "layer_masking": "Layer masking",
    "skip_tuning": "Skip Tuning",
    "unetpp": "UNet++",
    "floorplan": "Floor plans",
    "skip_deq": "Skip DEQ",
}
# Sections that a page of the site takes the place of.
ELSEWHERE = {
    "CONTRIBUTING.md": {"To add something", "Where words go"},
    "README.md": {"The nine systems", "More"},
    "demos/README.md": {"Language models"},
}
# Sentences that the page on troubleshooting quotes, which somebody will search for.
QUOTED = (
    "did not change the prediction",
    "the guided prediction is not finite",
    "the prediction without layers is not finite",
    "the denoiser's own prediction is not finite",
    "guidance is already applied to pipe.",
    "guidance follows the loop",
    "no preset for ",
    "are not described",
    "was replaced",
)
TEXT = """# Title

Said [first](other.md#there).

Contents: [a](#a)

## One

Text with `a[0](b)` and [a link](../x/README.md).

```sh
# no heading
[no](link)
```

### Smaller

Below.

## Two

Last.
"""


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    made = staging.Staging(folder)
    made.write()
    return made


def test_sections_by_title():
    found = sections(TEXT)
    assert list(found) == ["intro", "One", "Smaller", "Two"]
    assert "Said" in "".join(found["intro"].lines) and "Contents" not in "".join(found["intro"].lines)
    assert "# no heading" in found["One"].lines and "Below." in found["One"].lines
    assert "Last." not in found["One"].lines and found["Smaller"].level == 3


def test_headings_move_with_their_section():
    use = readmes.Use("page.md", "a/README.md", sections(TEXT)["One"], "Other", 3)
    lines = use.text().splitlines()
    assert lines[0] == "### Other" and "#### Smaller" in lines and "# no heading" in lines
    assert list(use.anchors()) == [("one", "other"), ("smaller", "smaller")]


def test_links_are_turned_and_code_is_not():
    seen = []

    def place(path, anchor):
        seen.append((path, anchor))
        return f"/{path}!"

    text = relinked(TEXT, "a/b/README.md", place)
    assert ("a/b/other.md", "there") in seen and ("a/x/README.md", "") in seen
    assert "`a[0](b)`" in text and "[no](link)" in text and "[a link](/a/x/README.md!)" in text
    broken = relinked("See [a link\nover lines](c.md), ![p](p.png), [out](https://a.b).", "README.md", place)
    assert broken == "See [a link over lines](/c.md!), ![p](/p.png!), [out](https://a.b)."


def test_a_page_that_names_no_section_is_refused():
    with pytest.raises(staging.SiteError, match="has no section 'None such'"):
        list(staging._wanted("page.md", "README.md", "## None such\n"))


def test_every_system_has_a_page_in_the_same_order(staged):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, title in SYSTEMS.items():
        assert title in readme
        text = (staged.folder / "systems" / f"{name}.md").read_text(encoding="utf-8")
        headings = [line for line in text.splitlines() if re.match("##? ", line)]
        assert headings[0].startswith("# ")
        for part in ("Try", "Use", "ettings", "Limits", "Measurements"):
            assert any(part in heading for heading in headings), f"{name} has no {part}"
        assert f"({name}.md)" in (staged.folder / "systems" / "index.md").read_text(encoding="utf-8")
    assert len(re.findall("^### ", readme, flags=re.MULTILINE)) == len(SYSTEMS) - 1  # two of them share a heading there


def test_every_section_of_every_readme_is_shown(staged):
    shown = {}
    for use in (use for uses in staged.uses.values() for use in uses):
        shown.setdefault(use.file, set()).update([use.section.title, *sections("\n".join(["# t", *use.section.lines]))])
    readmes_found = [
        path
        for folder in ("demos", "pipelines", "vision", "skipguide/llm")
        for path in (ROOT / folder).rglob("README.md")
    ]
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "pipelines" / "SUPPORTED.md", *readmes_found]:
        name = path.relative_to(ROOT).as_posix()
        wanted = set(sections(path.read_text(encoding="utf-8"))) - ELSEWHERE.get(name, set())
        if name == "README.md":
            wanted = {title for title in wanted if sections(path.read_text(encoding="utf-8"))[title].level == 2}
        if name == "vision/README.md":
            wanted -= {"intro"}
        assert wanted <= shown.get(name, set()), f"{name}: {wanted - shown.get(name, set())} is on no page"


def test_notebooks_scripts_and_sheets_are_there(staged):
    for path in (ROOT / "demos" / "notebooks").glob("*.ipynb"):
        assert (staged.folder / "notebooks" / path.name).is_file()
        assert path.stem in (staged.folder / "notebooks" / "index.md").read_text(encoding="utf-8")
    scripts = (staged.folder / "scripts.md").read_text(encoding="utf-8")
    for path in (ROOT / "demos" / "scripts").glob("*.py"):
        assert path.name in scripts or path.stem in ("__init__", "tiny")
    gallery = (staged.folder / "gallery.md").read_text(encoding="utf-8")
    for path in [*(ROOT / "demos" / "quality" / "sheets").iterdir(), *(ROOT / "demos" / "media").iterdir()]:
        assert path.name in gallery


def test_public_names_are_in_the_reference(staged):
    import skipguide
    import skipguide.llm
    import skipguide.pipelines
    import skipguide.vision

    text = "".join(path.read_text(encoding="utf-8") for path in (staged.folder / "api").glob("*.md"))
    for module in (skipguide, skipguide.pipelines, skipguide.llm, skipguide.vision):
        for name in module.__all__:
            assert f":: {module.__name__}.{name}\n" in text


def test_every_command_is_in_the_reference(staged):
    text = (staged.folder / "api" / "commands.md").read_text(encoding="utf-8")
    assert {f"## {name}" for name in ("describe", "generate", "llm", "explain")} <= set(text.splitlines())


def test_quoted_errors_are_what_the_library_says():
    page = (staging.HERE / "pages" / "troubleshooting.md").read_text(encoding="utf-8")
    folders = (ROOT / "skipguide", ROOT / "pipelines")
    source = "".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))
    for words in QUOTED:
        assert words in page and words in source, words


@pytest.mark.parametrize("name", ["troubleshooting", "extend/family", "extend/perturbation", "extend/formula"])
def test_python_of_the_pages_runs(name, monkeypatch):
    from skipguide.pipelines import formulas

    monkeypatch.setattr(formulas, "FORMULAS", dict(formulas.FORMULAS))
    space = {"__name__": "page"}
    for block in re.findall(
        r"```python\n(.*?)```", (staging.HERE / "pages" / f"{name}.md").read_text(), flags=re.DOTALL
    ):
        exec(compile(block, name, "exec"), space)


def test_commands_of_the_pages_parse():
    parser, seen = build_parser(), 0
    for path in (staging.HERE / "pages").rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        lines = [line for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]
        for line in [*lines, *re.findall(r"`(skipguide [a-z]+ \"[^`]*)`", text)]:
            words = shlex.split(line, comments=True)
            if words[:1] == ["skipguide"] and "..." not in words and "COMMAND" not in words and len(words) > 2:
                parser.parse_args(words[1:])
                seen += 1
    assert seen >= 8


def test_inventories_are_what_sphinx_reads(tmp_path):
    for path in sorted((staging.HERE / "inventories").glob("*.txt")):
        staging.write_inventory(path, tmp_path / "made.inv")
        head, _, packed = (tmp_path / "made.inv").read_bytes().partition(b"zlib.\n")
        assert head.startswith(b"# Sphinx inventory version 2\n# Project: ")
        for line in zlib.decompress(packed).decode().splitlines():
            assert re.fullmatch(r"\S+ py:\w+ 1 \S+ -", line), f"{path.name}: {line}"


def test_the_configuration_is_importable():
    pytest.importorskip("sphinx", reason='the site needs `pip install -e ".[docs]"`')
    spec = importlib.util.spec_from_file_location("site_conf", staging.HERE / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    assert all(importlib.util.find_spec(name) for name in (*conf.extensions, conf.html_theme))
    assert set(conf.intersphinx_mapping) == {path.stem for path in (staging.HERE / "inventories").glob("*.txt")}
    assert conf.public_names()["skipguide.plan.SkipPlan"] == "skipguide.SkipPlan"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")  # Sphinx, of its plugins
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path, monkeypatch):
    pytest.importorskip("sphinx", reason='the site needs `pip install -e ".[docs]"`')
    from demos.site.__main__ import main

    monkeypatch.setattr(sys, "argv", ["site", str(tmp_path / "site")])
    assert main() == 0
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 50
    for path in pages:
        text = path.read_text(encoding="utf-8")
        tags = re.findall(r"<(?:script|link|img|iframe|source|video)\b[^>]*>", text)
        assert not [tag for tag in tags if re.search(r"(?:src|href)=\"(?:https?:)?//", tag)], path
    for path in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )['\"]?(?:https?:)?//", path.read_text(encoding="utf-8")), path
    with pytest.raises(SystemExit):  # it is there already
        main()


def test_slugs_are_githubs():
    assert slug("`PrefixReuse`: the pipeline's own guidance, only cheaper") == (
        "prefixreuse-the-pipelines-own-guidance-only-cheaper"
    )
    assert Path(staging.HERE, "pages", "index.md").is_file()
