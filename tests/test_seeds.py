"""The table of other trainers' features: it is complete, its code is valid, and each row has a test or a reason."""

import ast
import collections
import functools
import inspect
import pathlib
import re
import shlex
from typing import NamedTuple

import pytest

import fxtrain as fx
from fxtrain.cli import _lm, _train
from fxtrain.cli._arguments import parse
from fxtrain.core import EVENTS

TESTS = pathlib.Path(__file__).parent
PAGE = TESTS.parent / "notebooks/other_trainers.md"
ROWS = {  # the number of features in the documentation of each trainer
    "Dream Trainer: monitoring": 55,
    "Dream Trainer: callbacks": 45 + 1,
    "Dream Trainer: loggers": 41,
    "Forgather and Hugging Face": 71 + 3,
    "The plugin-style LM trainer": 28,
    "Keras": 16,
    "Lightning": 33,
    "Classes and arguments": 22,
}
MAX_PLANNED = 2
OPTIONS = {"lm": _lm.Options, "train": _train.Options}
NAMES = {"fx": fx, "help": help, "result": fx.Result, "state": fx.TrainState}
NAMES |= {kind.__name__: kind for kind in (*EVENTS, fx.LoopEvent)}


class Row(NamedTuple):
    there: str
    here: str
    shown: str


def read(page):
    """Returns the rows by section."""
    sections = {}
    for section in page.split("\n## ")[1:]:
        title, *lines = section.splitlines()
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
        assert rows[:2] == [["there", "in fxtrain", "shown by"], ["---"] * 3], title
        sections[title] = [Row(*cells) for cells in rows[2:]]
    return sections


SECTIONS = read(PAGE.read_text())
ALL = [row for rows in SECTIONS.values() for row in rows]


def code(cell):
    return re.findall("`([^`]+)`", cell)


@functools.cache
def names_in(file):
    """Returns the names of the tests in a file, those of classes as ``Class::test``."""
    path = TESTS / file
    names = []
    for node in ast.parse(path.read_text()).body if path.is_file() else ():
        prefix, members = (f"{node.name}::", node.body) if isinstance(node, ast.ClassDef) else ("", [node])
        names += [prefix + each.name for each in members if isinstance(each, ast.FunctionDef)]
    return {name for name in names if name.rpartition("::")[2].startswith("test_")}


def resolve(node):
    """Returns the object that an expression names, or None if it is a placeholder or a value of the run."""
    if isinstance(node, ast.Name):
        return NAMES.get(node.id)
    if not isinstance(node, ast.Attribute) or (owner := resolve(node.value)) is None:
        return None
    is_field = node.attr in getattr(owner, "__dataclass_fields__", {})
    return None if is_field else getattr(owner, node.attr)


def mistake(snippet):
    """Returns what is wrong with a snippet of code or a command line, or None."""
    try:
        if snippet.startswith("fxtrain "):
            command, *arguments = shlex.split(snippet)[1:]
            parse(OPTIONS[command], command, arguments)
            return None
        for node in ast.walk(ast.parse(snippet, mode="eval")):
            if isinstance(node, ast.Name) and re.match("[A-Z][a-z]", node.id) and node.id not in NAMES:
                return f"{node.id} is no event"
            resolve(node)
            if isinstance(node, ast.Call) and (function := resolve(node.func)) is not None:
                keywords = {each.arg: each.value for each in node.keywords}
                inspect.signature(function).bind_partial(*node.args, **keywords)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def report(rows):
    """Fails with one line per row, if there are any."""
    assert not rows, "\n" + "\n".join(f"{row.there} | {row.here} | {reason}" for row, reason in rows)


def test_table_has_every_feature_once():
    assert {title: len(rows) for title, rows in SECTIONS.items()} == ROWS
    counts = collections.Counter((title, row.there) for title, rows in SECTIONS.items() for row in rows)
    assert [key for key, count in counts.items() if count > 1] == []


def test_each_row_has_a_test_or_a_reason():
    explained = ("By design: ", "Planned: ")
    report([(row, "has no test") for row in ALL if not row.shown and not row.here.startswith(explained)])


def test_number_of_planned_rows_only_falls():
    assert sum(row.here.startswith("Planned: ") for row in ALL) <= MAX_PLANNED


def test_named_tests_exist():
    report([(row, "expected tests in code") for row in ALL if re.sub("`[^`]+`|, ", "", row.shown)])
    named = [(row, *test.split("::", 1)) for row in ALL for test in code(row.shown)]
    report([(row, f"{file} has no {test}") for row, file, test in named if test not in names_in(file)])


def test_code_is_valid():
    found = [(row, f"{snippet}: {mistake(snippet)}") for row in ALL for snippet in code(row.here) if mistake(snippet)]
    report(found)


@pytest.mark.parametrize(
    ("snippet", "expected"),
    [
        ("fx.callbacks.grad_norm()", "no attribute 'grad_norm'"),
        ("fx.when(3, fx.callbacks.save(evry=3))", "unexpected keyword argument 'evry'"),
        ("fx.at(", "SyntaxError"),
        ("StepEnds", "StepEnds is no event"),
        ("StepEnd.metric", "no attribute 'metric'"),
        ("result.histories", "no attribute 'histories'"),
        ("fxtrain lm --nothing 3", "CommandError: Unrecognized options: --nothing"),
        ("fxtrain train --nothing", "CommandError: Unrecognized options: --nothing"),
    ],
)
def test_mistakes_in_code_are_found(snippet, expected):
    assert expected in mistake(snippet)
