"""The package layout: imports only from lower layers, short documented files, and a fast import of fxtrain."""

import ast
import os
import pathlib
import subprocess
import sys
import types

import pytest

import fxtrain

ROOT = pathlib.Path(fxtrain.__file__).parent

LAYERS = [
    {"_torch_internals"},
    {"core"},
    {"equivalents", "tree"},
    {"values", "schedules", "disk"},
    {"fold", "metrics", "rng", "optim", "writers"},
    {"precision", "data"},
    {"distributed"},
    {"model"},
    {"step", "callbacks", "checkpoint"},
    {"interop"},
    {"observers"},
    {"compiler", "loop"},
    {"diagnostics", "ensemble", "report"},
    {"finders"},
    {"testing", "cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
HEAVY = (
    "jax",
    "orbax",
    "clu",
    "flax",
    "tensorboardX",
    "rich",
    "matplotlib",
    "wandb",
    "tyro",
    "pandas",
    "PIL",
    "psutil",
    "mlflow",
    "safetensors",
    "pydantic",
    "yaml",
)


def room(path):
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fxtrain":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("fxtrain."))


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_imports_only_lower_layers(path):
    here = room(path)
    for there in imports(path):
        assert there == here or RANK[there] < RANK[here], f"{here} (layer {RANK[here]}) imports {there}"


# The last are the files that hold what users see.
COMPILER_FLOORS = ["passes", "artefacts", "lowering", "check", "call", ""]


def floor(parts):
    return COMPILER_FLOORS.index(parts[0] if parts and parts[0] in COMPILER_FLOORS else "")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "compiler").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_compiler_imports_point_down(path):
    here = floor(path.relative_to(ROOT / "compiler").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fxtrain.compiler"):
            there = floor(node.module.split(".")[2:])
            assert there <= here, f"{node.module} is above {COMPILER_FLOORS[here] or 'the top floor'}"


def test_every_file_has_a_layer_a_docstring_and_at_most_500_lines():
    assert {room(path) for path in FILES} == set(RANK)
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 500, f"{path.name} is past 500 lines"
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path.name} does not say what its idea is"


def run(code):
    # Installed packages have cached bytecode, but some environments disable writing it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout


def test_import_loads_no_heavy_dependency():
    loaded = run("import sys, fxtrain; print(*sorted({name.split('.')[0] for name in sys.modules}))")
    assert not set(HEAVY) & set(loaded.split())


def test_names_imported_on_use_are_listed_and_found():
    script = """
import sys, fxtrain as fx
rooms = ("fxtrain.callbacks", "fxtrain.interop", "fxtrain.diagnostics", "fxtrain.finders")
before = [room for room in rooms if room in sys.modules]
missing = {*fx.__all__, *(room.split('.')[1] for room in rooms)} - set(dir(fx))
found = {name: getattr(fx, name) for name in fx.__all__}
try:
    fx.callback
except AttributeError as error:
    print(before, missing, found["explain"] is fx.diagnostics.explain, error)
"""
    assert run(script) == "[] set() True module 'fxtrain' has no attribute 'callback'\n"


TIMED = """
import time
began = time.perf_counter()
import torch, optree
between = time.perf_counter()
import fxtrain
print(between - began, time.perf_counter() - between)
"""


@pytest.mark.slow
def test_import_takes_at_most_a_tenth_of_torch_import():
    run("import fxtrain")  # warms up the file cache
    alone: list[float] = []
    ours: list[float] = []
    for _ in range(10):
        first, second = map(float, run(TIMED).split())
        alone.append(first)
        ours.append(second)
        # Minima are compared, because other load on the machine only adds time.
        if len(ours) >= 3 and min(ours) <= 0.10 * min(alone):
            return
    pytest.fail(f"{min(ours) / min(alone):.3f} of the import of torch")


def test_modules_in_packages_are_private():
    # A function exported under the same name would shadow a public module. Packages that are private export nothing.
    assert not list(ROOT.glob("[!_]*/[!_]*.py"))
    for name in {room(path) for path in FILES}:
        assert isinstance(getattr(fxtrain, name, fxtrain), types.ModuleType), f"fxtrain.{name} is no module"
