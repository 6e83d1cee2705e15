"""The notebooks of the course: their form, and the script that runs them."""

import functools
import pathlib
import re
import subprocess
import sys

import pytest

import fxtrain as fx

nbformat = pytest.importorskip("nbformat")

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.ipynb"))
MAX_BYTES = 300_000
MAX_CELLS = 32


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def cells(path):
    return nbformat.read(path, as_version=4).cells


def code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def text(cells):
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def tags(cell):
    return cell.metadata.get("tags", [])


def test_cells_were_executed_in_order(cells):
    assert [cell.execution_count for cell in code(cells)] == list(range(1, len(code(cells)) + 1))
    assert any(cell.outputs for cell in code(cells))


def test_only_tagged_cells_show_errors_and_warnings(cells):
    for cell in code(cells):
        kinds = {output.output_type for output in cell.outputs}
        names = {output.get("name") for output in cell.outputs}
        assert ("error" in kinds) == ("raises-exception" in tags(cell)), cell.source
        assert "stderr" not in names or "warns" in tags(cell), cell.source


def test_notebook_begins_with_its_number_and_ends_with_something_to_try(path, cells):
    assert cells[0].source.startswith(f"# {int(path.name[:2])}. ")
    assert "## Try it" in cells[-1].source
    assert 2 <= len(re.findall(r"^\d\. ", cells[-1].source, re.M)) <= 4


def test_links_resolve(cells):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text(cells)):
        assert "://" in link or (FOLDER / link).exists(), link


def test_names_in_texts_exist(cells):
    for name in re.findall(r"\bfx\.([\w.]*\w)", text(cells)):
        functools.reduce(getattr, name.split("."), fx)


def test_cells_are_what_a_user_writes(cells):
    for cell in code(cells):
        assert not re.search(r"fxtrain[\w.]*\._|\bfx\._|sys\.path", cell.source), cell.source


def test_notebook_is_short(path, cells):
    assert path.stat().st_size <= MAX_BYTES
    assert len(cells) <= MAX_CELLS


def test_outputs_name_no_machine(path):
    assert not re.findall(r"/(?:home|root|work|Users)/|/tmp/\w+", path.read_text())


# The script that runs them


def run(*arguments, folder):
    command = [sys.executable, str(folder / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def written(tmp_path, *cells, **metadata):
    """Returns a folder with the script and one notebook of code cells: sources, or pairs of a source and its tags."""
    (tmp_path / "run.py").write_text((FOLDER / "run.py").read_text())
    notebook = nbformat.v4.new_notebook(metadata=metadata)
    for cell in cells:
        source, tags = (cell, []) if isinstance(cell, str) else cell
        notebook.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": tags}))
    nbformat.write(notebook, tmp_path / "00_some.ipynb")
    return tmp_path


def outputs(folder):
    return [cell.outputs for cell in nbformat.read(folder / "00_some.ipynb", as_version=4).cells]


def test_outputs_are_written_once_and_stay(tmp_path):
    pytest.importorskip("ipykernel")
    varying = ("import os; os.getpid()", ["varies"])
    folder = written(tmp_path, "x = 2 / 3\nprint(x)\nx", ("1 / 0", ["raises-exception"]), varying)
    assert run(folder=folder).returncode == 0
    printed, raised, _ = outputs(folder)
    assert [output.output_type for output in printed] == ["stream", "execute_result"]
    assert raised[0].ename == "ZeroDivisionError"
    checked = run("--check", folder=folder)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.slow
def test_check_lists_everything_that_needs_attention(tmp_path):
    pytest.importorskip("ipykernel")
    compiles = "\n".join(
        [
            "import sys, torch, fxtrain as fx",
            "step = fx.compile(fx.eval_step(lambda model, batch: {'mean': batch.mean()}), backend='eager')",
            "_ = step(fx.init(torch.nn.ReLU()), torch.ones(2))",
            "print('careful', file=sys.stderr)",
        ]
    )
    folder = written(tmp_path, compiles, "print(1)", ("2", ["raises-exception"]), max_graphs=0)
    before = (folder / "00_some.ipynb").read_text()
    checked = run("--check", folder=folder)
    assert checked.returncode == 1
    assert "00_some.ipynb: expected at most 0 compiled graphs, got 1." in checked.stderr
    assert "expected nothing on stderr in cell 1, got 'careful\\n'." in checked.stderr
    assert "expected the outputs of cell 2 to be '', as in the file, got '1\\n'." in checked.stderr
    assert "expected an error in cell 3, got none." in checked.stderr
    assert (folder / "00_some.ipynb").read_text() == before


def test_cell_that_raises_unexpectedly_fails_with_its_source(tmp_path):
    pytest.importorskip("ipykernel")
    failed = run(folder=written(tmp_path, "1 / 0"))
    assert failed.returncode == 1
    assert "00_some.ipynb: An error occurred while executing the following cell" in failed.stderr
    assert "ZeroDivisionError" in failed.stderr


def test_unknown_name_is_refused(tmp_path):
    assert "expected beginnings of names of notebooks" in run("77", folder=written(tmp_path, "1")).stderr
