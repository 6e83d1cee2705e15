"""Imports between benchmark modules resolve, even if the measured libraries are not installed, and ratios exist."""

import ast
import pathlib

from benchmarks.bars import Bar
from benchmarks.race import Outcome

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


def file_of(module):
    path = BENCHMARKS.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def names_in(path):
    """Returns the names that a module defines or imports, and for a package also its submodules."""
    found = {other.stem for other in path.parent.iterdir()} if path.name == "__init__.py" else set()
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.Import() | ast.ImportFrom():
                found.update(alias.asname or alias.name for alias in node.names)
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
    return found


def test_imports_between_benchmarks_resolve():
    missing, count = [], 0
    for path in sorted(BENCHMARKS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks"):
                there = names_in(file_of(node.module))
                count += len(node.names)
                missing += [f"{path}: {node.module}.{each.name}" for each in node.names if each.name not in there]
    assert count > 100
    assert not missing


def test_models_that_take_no_memory_have_no_ratio():
    bar = Bar("tiny_mlp", ["other"], "the best", 1.0, measure="memory", ours="fxtrain")
    assert bar.ratios(Outcome("", 1, 1, memory={"fxtrain": 0, "other": 0})) == ([], "")
    assert bar.ratios(Outcome("", 1, 1, memory={"fxtrain": 1, "other": 2})) == ([0.5], "other")
