"""Private interfaces of torch: where they may be used, and a test of each, which names what depends on it."""

import ast
import pathlib
import re

import pytest
import torch

import fxtrain
from fxtrain import rng
from fxtrain._torch_internals import INTERFACES
from fxtrain.model._tensor_reads import TensorReads
from fxtrain.precision._autocast import Float32Norms
from fxtrain.step._missing_gradient import _Cuts

ROOT = pathlib.Path(fxtrain.__file__).parent
DOOR = ROOT / "_torch_internals"
PRIVATE = re.compile(r"(torch|numpy|functorch)\b.*\._(?!_)|torch\.fx\.experimental|torch\._(?!_)")
# Private attributes of tensors, storages, modules, operators and generators, which have no dotted path.
ATTRIBUTES = {
    *("_cdata", "_version", "_backward_hooks", "_post_accumulate_grad_hooks"),
    *("_parameters", "_buffers", "_modules"),
    *("_schema", "_opname", "_dynamo_marked_constant"),
    *("_workers", "_shutdown_workers", "_worker_pids_set", "_bit_generator"),
}


def private_names(path):
    """Yields (line, name) for each private name of torch or NumPy that a file uses."""
    tree = ast.parse(path.read_text())
    names = {}  # dotted paths of imported names
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts, value = [node.attr], node.value
            while isinstance(value, ast.Attribute):
                parts.append(value.attr)
                value = value.value
            base = value.id if isinstance(value, ast.Name) else ""
            yield node.lineno, ".".join([names.get(base, base), *reversed(parts)])
            if node.attr in ATTRIBUTES and base not in ("self", "cls"):
                yield node.lineno, f"torch.*.{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and "attr" in node.func.id:
            for argument in node.args[1:2]:
                if isinstance(argument, ast.Constant) and argument.value in ATTRIBUTES:
                    yield node.lineno, f"torch.*.{argument.value}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
            yield node.lineno, node.value


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(ROOT.rglob("*.py")) if DOOR not in path.parents],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_module_uses_no_private_interface_of_torch(path):
    used = sorted({(line, name) for line, name in private_names(path) if PRIVATE.match(name)})
    assert not used, "Reach private interfaces through fxtrain/_torch_internals."


@pytest.mark.parametrize("path", INTERFACES)
def test_installed_torch_has_interface(path):
    interface = INTERFACES[path]
    assert interface.exists, f"torch lacks {path}, which fxtrain uses for {interface.purpose}"


# Function modes around functions that torch.compile splits into several graphs


@torch._dynamo.disable(recursive=False)
def uncompiled(x):
    return x.mean(), x.sum(), x.exp(), x.neg(), torch.relu(x)


@pytest.fixture
def no_compiled_frames():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [lambda: rng.functional(rng.key(0)), Float32Norms, lambda: TensorReads([]), _Cuts])
def test_compiled_frame_is_not_reused_for_another_operation(mode, no_compiled_frames):
    def function(x):
        return uncompiled(x)

    x = torch.tensor([2.0, -1.0])
    with mode():
        found = torch.compile(function, backend="eager")(x)
    torch.testing.assert_close(found, uncompiled(x))


def test_traced_random_samples_equal_uncompiled_ones(no_compiled_frames):
    def function(x):
        return torch.nn.functional.dropout(x, 0.5)

    x = torch.ones(8)
    with rng.functional(rng.key(0)):
        expected = function(x)
    with rng.functional(rng.key(0)):
        found = torch.compile(function, backend="eager", fullgraph=True)(x)
    assert torch.equal(found, expected)
