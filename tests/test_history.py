"""The curves that a run leaves: what is kept of them, and how they are drawn."""

import builtins
import io
import json
import math
import sys

import matplotlib as mpl
import numpy as np
import problem
import pytest

import fxtrain as fx
from fxtrain.loop._history import History

mpl.use("agg")


@pytest.fixture
def history():
    made = History()
    for step in range(1, 101):
        made.add(step, {"train/loss": 1 / step, "train/accuracy": 0.5, "lr": 0.1})
        if step % 20 == 0:
            made.add(step, {"eval/loss": 2 / step, "eval/auc": 0.9})
    return made


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()


# What is kept


def test_numbers_are_kept_by_step_and_the_rest_is_not(history):
    history.add(101, {"train/loss": 7, "ok": True, "text": fx.values.Text("hello")})
    assert history["train/loss"].steps.tolist() == list(range(1, 102))
    assert history["train/loss"].values.dtype == np.float64
    assert history["eval/loss"].steps.tolist() == [20, 40, 60, 80, 100]
    assert "text" not in history
    assert list(history) == ["eval/auc", "eval/loss", "lr", "ok", "train/accuracy", "train/loss"]
    assert repr(history).splitlines()[:2] == ["History of 6 curves", "  eval/auc: 5 points, last 0.9"]


def test_one_point_a_step_whatever_is_published_again_or_late():
    history = History()
    for step, value in [(1, 1.0), (3, 3.0), (3, 4.0), (2, 2.0), (1, 0.5)]:
        history.add(step, {"eval/loss": value})
    assert history["eval/loss"].steps.tolist() == [1, 2, 3]
    assert history["eval/loss"].values.tolist() == [0.5, 2.0, 4.0]


def test_a_rewind_takes_back_what_it_abandons(history):
    history.forget_after(30)
    assert history["train/loss"].steps[-1] == 30
    assert history["eval/loss"].steps.tolist() == [20]
    history.add(31, {"train/loss": 9.0})
    assert (history["train/loss"].steps[-1], history["train/loss"].values[-1]) == (31, 9.0)


def test_a_curve_that_is_not_there_is_an_error_that_names_the_others(history):
    with pytest.raises(
        KeyError, match=r"expected a published name, got 'loss'.* Published: 'eval/auc', 'eval/loss', 'lr'"
    ):
        history["loss"]
    with pytest.raises(KeyError, match=r"got 'loss'. Published: nothing"):
        History()["loss"]


# How it is drawn


def test_train_and_eval_of_one_name_share_a_panel_that_comes_first(history):
    figure = history.plot()
    assert titles(figure) == ["loss", "eval/auc", "lr", "train/accuracy"]
    assert png(figure).startswith(b"\x89PNG")


def test_only_a_panel_of_several_curves_has_a_legend(history):
    shared, *others = history.plot().axes
    assert [text.get_text() for text in shared.get_legend().get_texts()] == ["train/loss", "eval/loss"]
    assert [axes.get_legend() for axes in others] == [None] * 3


def test_train_and_eval_are_told_apart(history):
    train, evaluated = history.plot("*loss").axes[0].get_lines()
    assert (train.get_label(), evaluated.get_label()) == ("train/loss", "eval/loss")
    assert train.get_color() != evaluated.get_color()
    assert train.get_linewidth() < evaluated.get_linewidth()
    assert (train.get_marker(), evaluated.get_marker()) == ("", "o")
    assert train.get_zorder() <= evaluated.get_zorder()  # drawn later, and so above


def test_patterns_choose_and_a_curve_is_drawn_once(history):
    assert titles(history.plot("eval/*")) == ["eval/auc", "eval/loss"]
    figure = history.plot("lr", "*loss", "train/*")
    assert titles(figure) == ["loss", "lr", "train/accuracy"]
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 1, 1]


def test_a_pattern_that_matches_nothing_is_an_error_that_names_what_there_is(history):
    with pytest.raises(KeyError, match=r"got '\*/lss', which matches none. Published: 'eval/auc', 'eval/loss', 'lr'"):
        history.plot("*loss", "*/lss")
    with pytest.raises(KeyError, match=r"got '\*', which matches none. Published: nothing"):
        History().plot()


def test_values_that_are_not_finite_are_gaps():
    history = History()
    for step, value in enumerate([1.0, math.nan, 2.0, math.inf, 3.0, -math.inf]):
        history.add(step, {"loss": value, "lost": math.nan})
    figure = history.plot()
    drawn = figure.axes[0].get_lines()[0].get_ydata()
    assert np.array_equal(drawn, [1, np.nan, 2, np.nan, 3, np.nan], equal_nan=True)
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [[], ["no finite value"]]
    assert png(figure)
    assert math.isinf(history["loss"].values[3])  # as they were


def test_many_panels_stand_in_three_columns_and_in_the_order_of_their_numbers():
    history = History()
    for number in range(20):
        history.add(1, {f"norm/layer.{number}.weight": 1.0})
    figure = history.plot()
    assert titles(figure) == [f"norm/layer.{number}.weight" for number in range(20)]
    assert figure.get_size_inches().tolist() == pytest.approx([13.5, 2.8 * 7])
    # The step stands below the lowest panel of each column, also where the last row is not full.
    assert [axes.get_xlabel() for axes in figure.axes] == [""] * 17 + ["step"] * 3
    assert png(figure)


def test_names_that_are_too_long_for_a_title_are_cut_in_their_middle():
    history = History()
    history.add(1, {"gradients/" + "a" * 50 + ".weight": 1.0})
    (title,) = titles(history.plot())
    assert title.startswith("gradients/aaa")
    assert title.endswith("aaa.weight")
    assert len(title) <= 46


def test_a_single_point_can_be_seen():
    history = History()
    history.add(1, {"train/loss": 1.0})
    assert history.plot().axes[0].get_lines()[0].get_marker() == "."


def test_a_figure_is_returned_and_not_left_open(history):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    figure = history.plot()
    assert plt.get_fignums() == before  # of an open one a notebook shows a second copy at the end of the cell
    assert isinstance(figure, mpl.figure.Figure)


def test_the_history_of_a_run_can_be_drawn():
    step = problem.step()
    result = fx.fit(
        problem.start(), step, problem.data(), epochs=2, eval_step=problem.eval_step, eval_data=problem.data()
    )
    figure = result.history.plot()
    assert titles(figure) == ["loss", "mae"]
    assert [axes.get_lines()[1].get_xdata().tolist() for axes in figure.axes] == [[3, 6]] * 2


def test_without_matplotlib_it_is_said_what_to_install(history, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"plot requires matplotlib. Install it: pip install 'fxtrain\[plot"):
        history.plot()


def test_a_notebook_shows_the_figure_once_and_progress_in_its_cell(tmp_path):
    """Where there is a kernel to try it with."""
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    train = """
    import torch, fxtrain as fx
    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
    state = fx.init(torch.nn.Linear(1, 1), tx)
    result = fx.fit(state, step, [torch.ones(4, 1)], steps=30, observers=[fx.observers.progress()])
    """
    sources = ["\n".join(line.strip() for line in train.splitlines()), "result.history.plot()"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    # A kernel of this interpreter, whatever others are installed.
    spec = tmp_path / "here"
    spec.mkdir()
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "here", "language": "python"}))
    client = nbclient.NotebookClient(notebook, kernel_name="here", timeout=100)
    client.create_kernel_manager().kernel_spec_manager.kernel_dirs = [str(tmp_path)]
    client.execute()
    shown, drawn = (cell.outputs for cell in notebook.cells)
    assert [output.output_type for output in shown] == ["display_data"]
    assert "end    reached 30 steps, in" in shown[0].data["text/plain"]
    assert "━" in shown[0].data["text/html"]
    assert [list(output.data) for output in drawn] == [["text/plain", "image/png"]]


def test_the_repr_escapes_what_acts_on_a_terminal():
    history = History()
    history.add(1, {"a\x1b[2J\n\u202e": 1.0})
    assert repr(history).splitlines() == ["History of 1 curves", "  a\\x1b[2J\\n\\u202e: 1 points, last 1"]
