"""Public names: help() of each package lists and documents its functions."""

import importlib
import inspect
import pathlib
import pydoc

import pytest

import fxtrain

ROOT = pathlib.Path(fxtrain.__file__).parent
DOORS = sorted(
    path.parent.name
    for path in ROOT.glob("*/__init__.py")
    if path.parent.name not in ("_torch_internals", "cli", "equivalents")
)
MODULES = ["testing"]


def public(module):
    if hasattr(module, "__all__"):
        return {name: getattr(module, name) for name in module.__all__}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }


@pytest.fixture(params=["", *DOORS, *MODULES])
def module(request):
    return importlib.import_module(f"fxtrain.{request.param}".rstrip("."))


def test_help_lists_each_public_function(module):
    page = pydoc.plain(pydoc.render_doc(module))
    functions = [name for name, value in public(module).items() if inspect.isfunction(value)]
    assert not [name for name in functions if f"    {name}(" not in page]


def test_public_names_have_docstrings(module):
    documented = [value for value in public(module).values() if inspect.isfunction(value) or inspect.isclass(value)]
    assert not [value for value in documented if not value.__doc__]


def test_optimizer_states_are_not_exported():
    assert not [name for name in fxtrain.optim.__all__ if name.endswith("State")]


def test_result_types_are_exported_at_the_top_level():
    assert {"Compiled", "Composed", "History", "LoadReport", "Result", "Trigger", "View"} <= set(fxtrain.__all__)


@pytest.mark.parametrize("name", ["optim", "schedules", "interop"])
def test_docstrings_describe_every_argument(name):
    for function in filter(inspect.isfunction, public(importlib.import_module(f"fxtrain.{name}")).values()):
        arguments = list(inspect.signature(function).parameters)
        lines = inspect.getdoc(function).splitlines()
        lost = [argument for argument in arguments if not any(line.startswith(f"    {argument}: ") for line in lines)]
        assert len(arguments) < 2 or not lost, f"{function.__name__} does not describe {', '.join(lost)}"


def test_public_names_of_optimizers_and_metrics_have_an_example():
    for name in ("optim", "schedules", "metrics", "precision", "interop"):
        for value in public(importlib.import_module(f"fxtrain.{name}")).values():
            if inspect.isfunction(value) or inspect.isclass(value):
                assert ">>>" in value.__doc__, f"{value.__name__} has no example"
