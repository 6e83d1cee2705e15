"""Executes cells in a fresh kernel of a notebook."""

import json
import sys
import textwrap

import pytest

MODEL = """
    import signal, torch, fxtrain as fx
    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
    state = fx.init(torch.nn.Linear(1, 1), tx)
"""


def outputs(folder, *sources, allow_errors=False):
    """Returns the outputs of each cell, as the notebook stores them.

    Args:
        folder: An empty folder for the kernel's specification.
        sources: The code of the cells, indented or not.
        allow_errors: Whether cells may raise errors, which are then outputs.
    """
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    cells = [nbformat.v4.new_code_cell(textwrap.dedent(source).strip()) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    # The kernel spec starts this interpreter, because installed kernels may belong to other environments.
    spec = folder / "here"
    spec.mkdir()
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "here", "language": "python"}))
    client = nbclient.NotebookClient(
        notebook, kernel_name="here", timeout=100, allow_errors=allow_errors, coalesce_streams=True
    )
    client.create_kernel_manager().kernel_spec_manager.kernel_dirs = [str(folder)]
    client.execute()
    return [cell.outputs for cell in notebook.cells]
