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


def outputs(specification, *sources, folder=None, allow_errors=False):
    """Returns the outputs of each cell, as the notebook stores them.

    Args:
        specification: An empty folder for the kernel's specification.
        sources: The code of the cells, indented or not.
        folder: The working folder of the kernel. By default the current one.
        allow_errors: Whether cells may raise errors, which are then outputs.
    """
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    cells = [nbformat.v4.new_code_cell(textwrap.dedent(source).strip()) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    # The kernel spec starts this interpreter, because installed kernels may belong to other environments.
    spec = specification / "here"
    spec.mkdir()
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "here", "language": "python"}))
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="here",
        timeout=100,
        allow_errors=allow_errors,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)} if folder else {}},
    )
    client.create_kernel_manager().kernel_spec_manager.kernel_dirs = [str(specification)]
    client.execute()
    return [cell.outputs for cell in notebook.cells]
