"""Runs the notebooks of the course in fresh kernels, and writes or checks their outputs.

    python notebooks/run.py                 # runs all, and writes their outputs
    python notebooks/run.py 04 05           # runs those whose names begin with 04 or 05
    python notebooks/run.py --check         # leaves the files, and fails if one needs attention

A check fails when a cell raises, when the outputs in the file are stale, or when a notebook exceeds its budget: the
number of compiled graphs in its metadata as ``max_graphs``, and a time. Machines differ in speed, and shared ones from
minute to minute, so the time is that of 20 short trainings by plain PyTorch, measured just before. On average a
notebook may take half of that.

Tags of cells:
    raises-exception: The cell shows an error, and must raise.
    varies: The outputs differ from run to run, as times do, and are not compared.
    warns: The cell shows what is written to stderr. Other cells must not write there.

Only printed text, results and errors are compared. Pictures and progress are not.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import nbclient
import nbformat
import tyro
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

FOLDER = pathlib.Path(__file__).resolve().parent
MAX_TRAININGS = 20.0
MAX_MEAN_TRAININGS = 10.0
TOLERANCE = 0.05
"""Relative difference up to which printed fractions are equal, because processors round differently."""

_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "COLUMNS": "100",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm warns that widgets are not installed
}
_BEFORE = """
import logging as _logging
class _Graphs(_logging.Handler):
    built = 0
    def emit(self, record):
        self.built += record.getMessage().startswith("Compiling ")
_graphs, _logger = _Graphs(), _logging.getLogger("fxtrain.compiler")
_logger.addHandler(_graphs)
_logger.setLevel(_logging.INFO)
"""
_AFTER = """
import json, psutil
process = psutil.Process()
seconds = sum(sum(each.cpu_times()[:4]) for each in [process, *process.children(recursive=True)])
print(json.dumps([_graphs.built, seconds]))
"""
_TRAINING = """
import time, torch
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters())
inputs, labels = torch.randn(128, 64), torch.randint(10, (128,))
for _ in range(500):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
print(time.process_time())
"""
_FRACTION = re.compile(r"(?<![\w.])-?\d+\.\d+(?:e[-+]?\d+)?(?![\w.])")


class Run(NamedTuple):
    """What one execution of a notebook gave.

    Attributes:
        notebook: The notebook with fresh outputs.
        graphs: Number of compiled graphs.
        seconds: Wall time, or processor time if that is shorter, because others may use the machine.
    """

    notebook: NotebookNode
    graphs: int
    seconds: float


def execute(path: pathlib.Path) -> Run:
    """Executes the notebook from top to bottom, in a fresh kernel and an empty folder.

    Raises:
        CellExecutionError: If a cell raises unexpectedly.
    """
    notebook: NotebookNode = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # Kernels that were installed on this machine may belong to other environments.
        manager = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        client = nbclient.NotebookClient(
            notebook,
            km=manager,
            timeout=300,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
            extra_arguments=["--HistoryManager.enabled=False", "--log-level=ERROR"],
        )
        python_path = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
        settings = {**_SETTINGS, "PYTHONPATH": python_path, "IPYTHONDIR": f"{folder}/.ipython"}
        with client.setup_kernel(env={**os.environ, **settings}):
            began = time.perf_counter()
            _silently(client, _BEFORE)
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
            graphs, processor_seconds = json.loads(_silently(client, _AFTER))
            seconds = min(time.perf_counter() - began, processor_seconds)
        _normalize(notebook, folder)
    return Run(notebook, graphs, seconds)


def training_seconds() -> float:
    """Returns the processor time of a short training by plain PyTorch, in a process of its own."""
    ran = subprocess.run([sys.executable, "-c", _TRAINING], check=True, capture_output=True, text=True)
    return float(ran.stdout)


def _silently(client: nbclient.NotebookClient, source: str) -> str:
    """Runs code that is not part of the notebook, and returns what it printed."""
    cells = client.nb.cells
    cells.append(nbformat.v4.new_code_cell(source))
    client.execute_cell(cells[-1], len(cells) - 1, store_history=False)
    return "".join(output["text"] for output in cells.pop().outputs)


def _normalize(notebook: NotebookNode, folder: str) -> None:
    """Removes what differs between machines, so that the file changes only where the notebook does."""
    replaced = {f"{folder}/": "", folder: ".", f"{FOLDER.parent}/": "", f"{sys.prefix}/": ""}

    def text(value: str) -> str:
        for old, new in replaced.items():
            value = value.replace(old, new)
        value = re.sub(r"/tmp/ipykernel_\d+/\d+\.py:\d+", "notebook", value)
        return re.sub(r"\b0x[0-9a-f]{6,}\b", "0x...", value)

    budget = {name: value for name, value in notebook.metadata.items() if name == "max_graphs"}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = NotebookNode(kernelspec=kernel, language_info={"name": "python"}, **budget)
    for cell in notebook.cells:
        cell.metadata = NotebookNode({name: value for name, value in cell.metadata.items() if name == "tags"})
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = text(output.text)
            if "traceback" in output:
                output.traceback = [text(line) for line in output.traceback]
                output.evalue = text(output.evalue)
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/") and isinstance(value, str):
                    output.data[kind] = text(value)


def problems(path: pathlib.Path, run: Run, max_seconds: float) -> Iterator[str]:
    """Yields what is wrong with the run of a notebook, or with the outputs in its file."""
    committed: NotebookNode = nbformat.read(path, as_version=4)
    max_graphs = committed.metadata.get("max_graphs", 0)
    if run.seconds > max_seconds:
        yield f"expected at most {max_seconds:.0f} s, got {run.seconds:.0f} s."
    if run.graphs > max_graphs:
        yield f"expected at most {max_graphs} compiled graphs, got {run.graphs}. Set max_graphs in its metadata."
    for number, (old, new) in enumerate(zip(committed.cells, run.notebook.cells, strict=True), 1):
        if new.cell_type != "code":
            continue
        tags = new.metadata.get("tags", [])
        kinds = {output.output_type for output in new.outputs}
        if "raises-exception" in tags and "error" not in kinds:
            yield f"expected an error in cell {number}, got none. Remove the tag raises-exception."
        if "warns" not in tags and any(output.get("name") == "stderr" for output in new.outputs):
            yield f"expected nothing on stderr in cell {number}, got {shown(new)!r}. Silence it, or add the tag warns."
        if "varies" not in tags and not same(shown(old), shown(new)):
            yield (
                f"expected the outputs of cell {number} to be {shown(old)!r}, as in the file, got {shown(new)!r}. Run "
                f"the notebook again without --check, or add the tag varies."
            )


def shown(cell: NotebookNode) -> str:
    """Returns what a cell printed, returned or raised, without colors."""
    texts: list[str] = []
    for output in cell.outputs:
        if output.output_type == "stream":
            texts.append(output.text)
        elif output.output_type == "execute_result":
            texts.append(output.data.get("text/plain", ""))
        elif output.output_type == "error":
            texts.append(f"{output.ename}: {output.evalue}")
    return _without_colors("\n".join(texts))


def _without_colors(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def same(a: str, b: str) -> bool:
    """Whether two texts are equal, up to small differences of the fractions in them."""
    fractions = zip(_FRACTION.findall(a), _FRACTION.findall(b), strict=False)
    is_near = all(abs(float(x) - float(y)) <= TOLERANCE * max(abs(float(x)), abs(float(y))) for x, y in fractions)
    return is_near and _FRACTION.sub("#", a) == _FRACTION.sub("#", b)


def main(names: Annotated[tuple[str, ...], tyro.conf.Positional] = (), /, *, check: bool = False) -> None:
    """Runs the notebooks in fresh kernels, and writes their outputs.

    Args:
        names: Beginnings of file names, such as 04. All notebooks by default.
        check: Leave the files, and fail if a notebook raises, is stale or exceeds its budget.
    """
    paths = [path for path in sorted(FOLDER.glob("[0-9]*.ipynb")) if path.name.startswith(names or "")]
    if not paths:
        sys.exit(f"expected beginnings of names of notebooks in {FOLDER}, got {' '.join(names)}.")
    found: list[str] = []
    total = max_total = 0.0
    for path in paths:
        training = training_seconds() if check else 0.0
        try:
            run = execute(path)
        except CellExecutionError as error:
            found.append(f"{path.name}: {_without_colors(str(error))}")
            continue
        total += run.seconds
        max_total += MAX_MEAN_TRAININGS * training
        trainings = f", {run.seconds / training:.1f} trainings" if check else ""
        print(f"{path.stem}: {run.seconds:.0f} s{trainings}, {run.graphs} graphs", flush=True)
        if check:
            found += [f"{path.name}: {problem}" for problem in problems(path, run, MAX_TRAININGS * training)]
        else:
            nbformat.write(run.notebook, path)
    if check and total > max_total:
        found.append(f"expected at most {max_total:.0f} s for all notebooks, got {total:.0f} s.")
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    tyro.cli(main)
