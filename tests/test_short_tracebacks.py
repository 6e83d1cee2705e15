"""Tracebacks show the lines of the user, and hide frames of fxtrain and torch."""

import json
import os
import re
import subprocess
import sys
import traceback

import notebook
import problem
import pytest
import torch

import fxtrain as fx

NOTE = "Frames of fxtrain and torch are hidden. Set the environment variable FXTRAIN_TRACEBACK=full to show them."
PROGRAM = """
import torch, fxtrain as fx
from torch.nn import functional as F

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
    def forward(self, x):
        return self.layer(x)

def loss(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])

def late(state, event: fx.StepEnd):
    try:
        check(state)
    except ValueError as error:
        raise LookupError("first") from error

def check(state):
    raise ValueError("cause")

def nested(state, event: fx.StepEnd):
    return state, fx.Control(log=fx.evaluate(state, fx.eval_step(loss), [wide]))

class Rows:
    def __len__(self):
        return 3
    def __getitem__(self, index):
        return {"x": 1}["z"]

tx = fx.optim.sgd(0.1)
state, step = fx.init(Net(), tx), fx.train_step(loss, tx)
batch = {"x": torch.ones(4, 3), "y": torch.zeros(4, dtype=torch.long)}
wide = {**batch, "x": torch.ones(4, 5)}
loader = torch.utils.data.DataLoader
compiled = fx.compile(step, backend="eager")

def eager(): fx.fit(state, step, [wide], steps=1)
def traced(): fx.fit(state, compiled, [wide], steps=1)
def called(): compiled(state, wide)
def stepped(): step(state, wide)
def evaluated(): fx.eval_step(loss)(state, wide)
def refused(): fx.train_step(Net(), tx)
def iterated(): list(fx.steps(state, step, [wide], steps=1))
def callback(): fx.fit(state, step, [batch], steps=1, callbacks=late)
def evaluation(): fx.fit(state, step, [batch], steps=1, callbacks=nested)
def key(): fx.fit(state, step, [{"x": batch["x"]}], steps=1)
def rows(): fx.fit(state, step, loader(Rows(), batch_size=1), steps=1)
def worker(): fx.fit(state, step, loader(Rows(), batch_size=1, num_workers=1), steps=1)
def option(): fx.fit(state, step, [batch], stepz=1)
def limit(): fx.fit(state, step, [batch])
def module(): fx.fit(Net(), step, [batch], steps=1)
def made(): fx.init(Net, tx)
def optimizer(): fx.optim.adamw("0.1")
def schedule(): fx.schedules.warmup(0.1, 10)
def data(): fx.data.padded([[1], []], 2)
def resumable(): fx.data.from_stateful_loader([1])
def composed(): fx.compose(fx.when(fx.every(2), late), 3)
def slot(): fx.stateful("best", lambda state: 0, late)
"""
REPORT = """
import json, logging, os, pickle, sys, traceback
cases = [eager, traced, called, stepped, evaluated, refused, iterated]
cases += [callback, evaluation, key, rows, worker, option, limit, module, made]
cases += [optimizer, schedule, data, resumable, composed, slot]

def failed(case):
    try:
        case()
    except Exception as error:
        return error

def named(error):
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.name if frame.filename == __file__ else "other" for frame in frames]

def notes(error):
    return [note for note in getattr(error, "__notes__", []) if not note.startswith("The batch has ")]

errors = {case.__name__: failed(case) for case in cases}
found = {name: [named(error), notes(error)] for name, error in errors.items()}
os.environ["FXTRAIN_TRACEBACK"] = "full"
found["full"] = [named(failed(eager)), notes(failed(eager))]
del os.environ["FXTRAIN_TRACEBACK"]
sys.settrace(lambda *event: None)
found["debugged"] = [named(failed(eager)), []]
sys.settrace(None)
found["cause"] = [named(errors["callback"].__cause__), []]
pickle.dumps(errors["eager"])

def broken(*arguments):
    return {}["absent"]
from fxtrain.loop import _run
broken.__code__ = broken.__code__.replace(co_filename=_run.__file__)
_run.check_step = broken
found["defect"] = [named(failed(eager)), notes(failed(eager))]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The functions of each traceback and the notes, by case, in a program without IPython and pytest."""
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM + REPORT)
    environment = {**os.environ, "FXTRAIN_TRACEBACK": ""}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "functions"),
    {
        "eager": ["loss", "forward"],
        "traced": ["loss", "forward"],
        "called": ["loss", "forward"],
        "stepped": ["loss", "forward"],
        "evaluated": ["loss", "forward"],
        "refused": [],
        "iterated": ["loss", "forward"],
        "callback": ["late"],
        "evaluation": ["nested", "loss", "forward"],
        "key": ["loss"],
        "rows": ["__getitem__"],
        "worker": [],
        "option": [],
        "limit": [],
        "module": [],
        "made": [],
        "optimizer": [],
        "schedule": [],
        "data": [],
        "resumable": [],
        "composed": [],
        "slot": [],
    }.items(),
)
def test_only_frames_of_the_program_are_in_its_traceback(found, case, functions):
    assert found[case] == [["failed", case, *functions], [NOTE]]


def test_switch_shows_all_frames(found):
    frames, notes = found["full"]
    assert frames.count("other") > 10
    assert notes == []


def test_debugger_sees_all_frames(found):
    assert found["debugged"][0].count("other") > 10


def test_causes_keep_their_frames_of_the_program(found):
    assert found["cause"][0] == ["late", "check"]


def test_defects_of_fxtrain_keep_their_frames(found):
    frames, notes = found["defect"]
    assert frames[-2:] == ["other", "other"]
    assert notes == []


def test_pytest_sees_marks_on_hidden_frames(monkeypatch):
    monkeypatch.delenv("FXTRAIN_TRACEBACK", raising=False)

    def broken(model, batch):
        raise LookupError("broken")

    with pytest.raises(LookupError) as caught:
        fx.fit(problem.start(), fx.train_step(broken, problem.transform()), problem.data(), steps=1)
    shown = [entry.name for entry in caught.traceback.filter(caught)]
    assert shown == ["test_pytest_sees_marks_on_hidden_frames", "broken"]
    assert len(traceback.extract_tb(caught.value.__traceback__)) > 10


def test_log_has_the_whole_traceback(monkeypatch, caplog):
    monkeypatch.delenv("FXTRAIN_TRACEBACK", raising=False)
    caplog.set_level("DEBUG", "fxtrain.core")
    with pytest.raises(TypeError):
        fx.fit(torch.nn.Linear(1, 1), None, None, steps=1)
    assert "check_state" in caplog.text


@pytest.mark.slow
def test_notebook_shows_cells_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("FXTRAIN_TRACEBACK", raising=False)
    calls = ["eager()", "traced()", "callback()", "key()", "limit()", "result"]
    before = "result = fx.fit(state, step, [batch], steps=1, progress=False)"
    _, *cells = notebook.outputs(tmp_path, f"{PROGRAM}\n{before}", *calls, allow_errors=True)
    texts = [re.sub(r"\x1b\[[\d;]*m", "", "\n".join(cell[-1].get("traceback", []))) for cell in cells]
    for text in texts[:-1]:
        assert re.search(r"^Cell In\[", text, flags=re.MULTILINE)
        assert "File" not in text.replace("/program.py", "")
        assert text.endswith(NOTE)
    assert "[... skipping hidden" in texts[0]
    assert re.findall(r"^-+> *\d+ (.*)$", texts[0], flags=re.MULTILINE)[-2:] == [
        '    return F.cross_entropy(model(batch["x"]), batch["y"])',
        "        return self.layer(x)",
    ]
    assert texts[2].index("ValueError: cause") < texts[2].index("LookupError: first")
    assert cells[-1][0].data["text/plain"].startswith("Result at step 1")  # as it was before the errors
