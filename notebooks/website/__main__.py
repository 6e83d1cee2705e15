"""Builds the website: ``python -m notebooks.website``."""

from __future__ import annotations

import pathlib
import shutil
import sys
import tempfile

from sphinx.cmd.build import main as sphinx

from notebooks.website._links import dead_links
from notebooks.website._names import ROOT
from notebooks.website._pages import write_sources

OUTPUT = ROOT / "build" / "website"


def main() -> None:
    """Writes the website to ``build/website``. Exits with an error if a page of it has a problem."""
    shutil.rmtree(OUTPUT, ignore_errors=True)  # pages and files that no longer exist would hide dead links
    with tempfile.TemporaryDirectory() as folder:
        write_sources(pathlib.Path(folder))
        settings = pathlib.Path(__file__).parent
        options = ["--fail-on-warning", "--keep-going", "--quiet", "-c", str(settings), "-d", f"{folder}/.doctrees"]
        code = sphinx([*options, folder, str(OUTPUT)])
    found = list(dead_links(OUTPUT))
    if code or found:
        sys.exit("\n".join([*found, "expected a website without problems, got those above. Repair them."]))
    print(f"Open {OUTPUT / 'index.html'} in a browser.")


if __name__ == "__main__":
    main()
