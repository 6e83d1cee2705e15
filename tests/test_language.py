"""Private words do not come back into the prose and the errors of the library, and into the notebooks."""

import json
import pathlib
import re

import pytest

import fxtrain

ROOT = pathlib.Path(fxtrain.__file__).parent
WORDS = re.compile(
    r"\b(anew|somebody|nobody|whoever|hitherto|likewise|had better|ever after|(is|are|was) wanted|is told)\b"
    r"|, say\b|\bcame[.:,]"
)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_library_uses_plain_technical_english(path):
    found = [f"{number}: {line}" for number, line in enumerate(path.read_text().splitlines(), 1) if WORDS.search(line)]
    assert not found


def test_readme_uses_plain_technical_english():
    assert not WORDS.findall((ROOT.parent / "README.md").read_text())


@pytest.mark.parametrize("path", sorted((ROOT.parent / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_use_plain_technical_english(path):
    cells = json.loads(path.read_text())["cells"]
    assert not WORDS.findall("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"))
