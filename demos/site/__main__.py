"""Builds the documentation, strictly: a warning is an error.

python -m demos.site               into a folder that is thrown away: is it whole?
python -m demos.site runs/site     to look at: open runs/site/index.html
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from demos.site.staging import HERE, Staging


def build(target: Path) -> int:
    """Build the site into a folder that is not there yet.

    Returns:
        0, or what Sphinx says of a failed build.
    """
    with tempfile.TemporaryDirectory(prefix="skipguide-site-") as work:
        source = Path(work, "source")
        source.mkdir()
        Staging(source).write()
        options = ["--quiet", "--fail-on-warning", "--keep-going", "-c", str(HERE), "-d", f"{work}/doctrees"]
        # in a process of its own: autodoc writes defaults as they are spelled into the signatures of what it imports
        command = [sys.executable, "-m", "sphinx", *options, str(source), str(target)]
        return subprocess.run(command, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--force", action="store_true", help="replace a site that is there")
    args = parser.parse_args()
    if args.folder is None:
        with tempfile.TemporaryDirectory(prefix="skipguide-site-") as folder:
            return build(Path(folder, "site"))
    target: Path = args.folder
    if target.exists() and not (args.force and (target / "index.html").is_file()):
        parser.error(f"{target} is there already: name another folder, or say --force to replace a site")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if status := build(partial):
        return status
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    print(f"{target / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
