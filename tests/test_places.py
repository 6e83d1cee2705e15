"""Errors name lines of code as users see them."""

import re

import notebook
import pytest
import torch

import fxtrain as fx

MESSAGE = r"expected the metric 'logits' of loss_fn \((.*)\) to be a 0-d tensor"


def test_error_names_file_and_line_of_a_function():
    def loss_fn(model, batch):
        return model(batch).mean(), {"logits": batch}

    tx = fx.optim.sgd(0.1)
    line = loss_fn.__code__.co_firstlineno
    with pytest.raises(TypeError, match=MESSAGE) as caught:
        fx.train_step(loss_fn, tx)(fx.init(torch.nn.Linear(1, 1), tx), torch.ones(4, 1))
    assert re.search(MESSAGE, str(caught.value))[1] == f"{__file__}:{line}"


@pytest.mark.slow
def test_error_names_the_cell_of_a_notebook(tmp_path):
    loss = """
        def loss_fn(model, batch):
            return model(batch).mean(), {"logits": batch}
    """
    _, _, (shown,) = notebook.outputs(
        tmp_path, notebook.MODEL, loss, "fx.train_step(loss_fn, tx)(state, torch.ones(4, 1))", allow_errors=True
    )
    assert re.search(MESSAGE, shown.evalue)[1] == "Cell In[2]:1"


def test_warning_points_at_the_line_that_called_fit():
    def save(state, event: fx.StepEnd):
        return state, fx.Control(save=True)

    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
    with pytest.warns(UserWarning, match="expected a checkpointer for a save requested by a callback") as caught:
        fx.fit(fx.init(torch.nn.Linear(1, 1), tx), step, [torch.ones(4, 1)], steps=1, callbacks=save)
    assert {warning.filename for warning in caught} == {__file__}
