"""The progress observer's panel in a terminal and in a notebook."""

import contextlib
import functools
import io
import re
import sys
import types
import warnings

import notebook
import problem
import pytest
from progress_events import bits, ended, evaluation, run, see

import fxtrain as fx
from fxtrain import observers
from fxtrain.core import (
    EvalBegin,
    EvalEnd,
    FitBegin,
    FitEnd,
    Interrupted,
    Restored,
    Rewound,
    StepEnd,
)


class Terminal(io.StringIO):
    """A terminal that interprets escape sequences and returns its screen."""

    def isatty(self):
        return True

    @property
    def screen(self):
        rows, row, column = [""], 0, 0
        for code, kind, character in re.findall(r"\x1b\[([?\d;]*)([A-Za-z])|([^\x1b])", self.getvalue()):
            if kind == "A":
                row -= int(code or 1)
            elif kind == "K":
                rows[row] = ""
            elif character == "\r":
                column = 0
            elif character == "\n":
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            elif character:
                rows[row] = rows[row].ljust(column)[:column] + character + rows[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in rows]

    @property
    def cursor_is_shown(self):
        text = self.getvalue()
        return text.rfind("\x1b[?25h") >= text.rfind("\x1b[?25l")


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def attached(terminal):
    """Redirects standard output and error to this terminal."""
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(terminal))
    stack.enter_context(contextlib.redirect_stderr(terminal))
    return stack


FIRST_EPOCH = (
    "epoch 1/2   loss 2.5000   bits 3.6067   eval loss 2.0000   eval bits 2.8854   eval accuracy 0.2500   0:23   "
    "best loss"
)
SECOND_EPOCH = (
    "epoch 2/2   loss 5.0000   bits 7.2135   eval loss 4.0000   eval bits 5.7708   eval accuracy 0.2500   0:23"
)


def test_terminal_panel_updates_in_place(terminal):
    shown = observers.progress(rate=("tokens", 1000), extra={"bits": bits}, file=terminal)
    screens = {}
    for event in run():
        see(shown, event)
        screens[type(event).__name__, event.step, getattr(event, "index", 0)] = terminal.screen
    shown.close()
    bar = "━" * 40
    assert screens["FitBegin", 0, 0] == [
        f"train  {bar}   0/20   0:30 elapsed",
        f"epoch  {bar}    0/2",
        "       running the first step",
    ]
    assert screens["StepEnd", 7, 0] == [
        f"train  {bar[:14]}╺{bar[:25]}   7/20   0:42 elapsed   0:26 left",
        f"epoch  {bar[:28]}╺{bar[:11]}    0/2   0:20 per epoch   6.0 s left",
        "       loss 3.5225   bits 5.0820   500 tokens/s   data wait 25%",
    ]
    assert screens["StepEnd", 10, 0][:2] == [
        f"train  {bar[:20]}╺{bar[:19]}  10/20   0:48 elapsed   0:20 left",
        f"epoch  {bar}    1/2   0:20 per epoch",
    ]
    assert screens["EvalBegin", 10, 0][2] == "       evaluating"
    assert screens["EvalStep", 10, 1][2:] == [
        "       loss 3.2951   bits 4.7539   500 tokens/s   data wait 25%",
        f"eval   {bar}  batch 2   1.00 batches/s",
    ]
    assert screens["EvalStep", 20, 1] == [
        FIRST_EPOCH,
        f"train  {bar}  20/20   1:13 elapsed",
        f"epoch  {bar}    2/2   0:23 per epoch",
        "       loss 2.4144   bits 3.4832   500 tokens/s   data wait 25%",
        f"eval   {bar[:26]}╸{bar[:13]}  batch 2/3   1.00 batches/s   1.0 s left",
    ]
    shown = [line for line in terminal.screen if line]
    assert shown == [
        FIRST_EPOCH,
        SECOND_EPOCH,
        "end  step 20/20: reached 20 steps, in 1:16; best loss 2.0000 at step 10",
    ]
    assert terminal.cursor_is_shown


def test_printed_text_appears_above_the_panel(terminal):
    with attached(terminal):
        shown = observers.progress(file=terminal)
        for event in run(evaluated=False):
            see(shown, event)
            if isinstance(event, StepEnd) and event.step in (3, 7):
                print(f"a message at step {event.step}")
                print("and an error", file=sys.stderr)
        shown.close()
        print("after the end")
    assert [line for line in terminal.screen if line] == [
        "a message at step 3",
        "and an error",
        "a message at step 7",
        "and an error",
        "epoch 1/2   loss 2.5000   0:20",
        "epoch 2/2   loss 5.0000   0:20",
        "end  step 20/20: reached 20 steps, in 1:10",
        "after the end",
    ]


def test_redirected_output_is_not_captured(terminal):
    output = io.StringIO()
    with attached(terminal), contextlib.redirect_stdout(output):
        shown = observers.progress(file=terminal)
        see(shown, FitBegin(step=0))
        print("a result")
        shown.close()
    assert output.getvalue() == "a result\n"


@pytest.mark.parametrize("how", ["close", "failure"])
def test_terminal_is_restored_after_an_exception(terminal, how):
    with attached(terminal):
        shown = observers.progress(file=terminal)
        see(shown, FitBegin(step=0), ended(1))
        assert not terminal.cursor_is_shown
        assert sys.stdout is not terminal
        if how == "failure":
            with pytest.raises(TypeError):
                see(shown, EvalEnd(step=1, metrics=None))
        else:
            shown.close()
        assert terminal.cursor_is_shown
        assert (sys.stdout, sys.stderr) == (terminal, terminal)
        shown.close()


def test_dumb_terminal_gets_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    shown = observers.progress(file=terminal)
    see(shown, *run(evaluated=False))
    assert "\x1b" not in terminal.getvalue()
    assert terminal.screen[-2] == "ended: reached 20 steps, in 1:10"


class Cell:
    """A notebook cell behind ``IPython.display``: stores the displayed data and counts the updates."""

    def __init__(self, monkeypatch):
        import rich
        import rich.console

        self.shown, self.count = [], 0
        monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
        monkeypatch.setattr(rich, "_console", rich.console.Console())
        module = types.SimpleNamespace(display=self.display)
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=module))
        monkeypatch.setitem(sys.modules, "IPython.display", module)
        monkeypatch.setitem(sys.modules, "ipywidgets", None)

    def display(self, data, *, raw, display_id):
        assert raw
        assert display_id
        self.shown.append(data)
        return types.SimpleNamespace(update=functools.partial(self.update, len(self.shown) - 1))

    def update(self, index, data, *, raw):
        assert raw
        self.shown[index], self.count = data, self.count + 1


def test_notebook_panel_updates_in_place_without_widgets(monkeypatch, capsys):
    cell = Cell(monkeypatch)
    shown = observers.progress()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            see(shown, *run())
            shown.close()
    first, second = cell.shown
    assert first == second
    assert 20 < cell.count < 100
    assert first["text/plain"].splitlines() == [
        FIRST_EPOCH.replace("bits 3.6067   ", "").replace("eval bits 2.8854   ", ""),
        SECOND_EPOCH.replace("bits 7.2135   ", "").replace("eval bits 5.7708   ", ""),
        "end  step 20/20: reached 20 steps, in 1:16; best loss 2.0000 at step 10",
    ]
    assert first["text/html"].startswith("<pre style=")
    assert "reached 20 steps" in first["text/html"]
    assert capsys.readouterr().out == ""


def test_notebook_shows_notes_and_file_gets_lines(monkeypatch, capsys):
    cell, file = Cell(monkeypatch), io.StringIO()
    rewound = Rewound(step=3, from_step=3, to_step=1, abandoned=range(1, 3), times=1)
    see(observers.progress(), FitBegin(step=0), ended(1), rewound, Interrupted(step=1, cause="ValueError: <b>"))
    lines = cell.shown[0]["text/plain"].splitlines()
    assert lines == ["rewound from step 3 to step 1", "end  interrupted at step 1: ValueError: <b>"]
    assert "&lt;b&gt;" in cell.shown[0]["text/html"]
    assert "<b>" not in cell.shown[0]["text/html"]
    assert capsys.readouterr().out == ""
    see(observers.progress(file=file), *run(evaluated=False))
    assert file.getvalue().endswith("ended: reached 20 steps, in 1:10\n")
    assert len(cell.shown) == 1


def test_first_evaluation_shows_the_number_of_batches_of_its_data(terminal):
    shown = observers.progress(file=terminal)
    see(shown, *evaluation(3, num_batches=10))
    # The first batch may include the compilation, so the speed is that of the two others.
    assert terminal.screen[-1] == f"eval   {'━' * 12}╺{'━' * 27}  batch 3/10   0.25 batches/s   0:28 left"
    shown.close()


def test_observer_is_reusable_for_another_run(terminal):
    with attached(terminal):
        shown = observers.progress(file=terminal)
        for _ in range(2):
            see(shown, *run(reason="done"))
            shown.close()
        assert sys.stdout is terminal
    assert [line for line in terminal.screen if line.startswith("end")] == [
        "end  step 20/20: done, in 1:16; best loss 2.0000 at step 10"
    ] * 2


HOSTILE = "a[red]\x1b[2J\x07\x9b\x7f\n\u202eb\ud800\u2028[/]:smile:"
SHOWN = "a[red]\\x1b[2J\\x07\\x9b\\x7f\\n\\u202eb\\ud800\\u2028[/]:smile:"


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_names_and_reasons_are_escaped(kind, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    file = kind()
    shown = observers.progress((HOSTILE,), best=HOSTILE, rate=(HOSTILE, 1), extra={HOSTILE: lambda m: 1.0}, file=file)
    see(
        shown,
        FitBegin(step=0, total_steps=3),
        Restored(step=0, path="p", missing=(HOSTILE,), environment_changes=(HOSTILE,)),
        ended(1, **{HOSTILE: 1.0}),
        ended(2, **{HOSTILE: 1.0}),
        EvalBegin(step=2),
        EvalEnd(step=2, metrics={HOSTILE: 2.0}),
        Interrupted(step=2, cause=HOSTILE),
        FitEnd(step=2, reason=HOSTILE),
    )
    text = file.getvalue()
    assert SHOWN in text
    assert not re.findall(r"[\x07\x7f-\x9f\u2028\u202e\ud800]", text)
    assert "\x1b[2J" not in text
    assert "\x1b[31m" not in text  # red
    assert f"best {SHOWN}" in text


@pytest.mark.slow
def test_fit_shows_progress_in_a_notebook_unless_it_is_shown_already(tmp_path):
    train = "result = fx.fit(state, step, [torch.ones(4, 1)] * 10, epochs=3, {})"
    alone, again, switched_off, shown, required, by_hand, interrupted, continued = notebook.outputs(
        tmp_path,
        f"{notebook.MODEL}\n    {train.format('')}",
        train.format(""),
        train.format("progress=False"),
        train.format("observers=fx.observers.progress()"),
        train.format("observers=[fx.observers.required(fx.observers.progress())], progress=True"),
        "for _ in fx.steps(state, step, [torch.ones(4, 1)] * 10, epochs=3): pass",
        """
        def interrupt(state, event: fx.StepEnd, control):
            if event.step == 15:
                signal.raise_signal(signal.SIGINT)
        result = fx.fit(state, step, [torch.ones(4, 1)] * 10, epochs=3, observers=interrupt)
        result.reason, int(result.state.step)
        """,
        "fx.fit(result.continue_from, step, [torch.ones(4, 1)] * 10, epochs=3).reason",
    )
    assert (switched_off, by_hand) == ([], [])
    for panels in (alone, again, shown, required):
        assert [output.output_type for output in panels] == ["display_data"]  # no streams and no widgets
        assert sorted(panels[0].data) == ["text/html", "text/plain"]
        lines = panels[0].data["text/plain"].splitlines()
        assert [line.split("   ")[0] for line in lines[:-1]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
        assert re.fullmatch(r"end  step 30: finished 3 epochs, in [\d.]+ s", lines[-1])
        assert "\x1b" not in panels[0].data["text/html"] + panels[0].data["text/plain"]
    panel, value = interrupted
    first, last = panel.data["text/plain"].splitlines()
    assert first.startswith("epoch 1/3   loss ")
    assert last.startswith("end  step 15: interrupted by SIGINT, in ")
    assert value.data["text/plain"] == "('interrupted by SIGINT', 15)"
    assert [line.split("   ")[0] for line in continued[0].data["text/plain"].splitlines()[:-1]] == [
        "resuming from step 15",
        "epoch 2/3",
        "epoch 3/3",
    ]
    assert continued[1].data["text/plain"] == "'finished 3 epochs'"


def test_fit_shows_progress_outside_of_notebooks_only_if_asked(capsys):
    fx.fit(problem.start(), problem.step(), problem.data(), steps=2)
    assert capsys.readouterr().out == ""
    for _ in fx.steps(problem.start(), problem.step(), problem.data(), steps=2, progress=True):
        pass
    assert capsys.readouterr().out.count("ended: reached 2 steps") == 1
    with pytest.raises(ValueError, match=r"expected progress to be one of None, True, False, got 'no'"):
        fx.fit(problem.start(), problem.step(), problem.data(), steps=2, progress="no")
