"""Private interfaces of torch: where they may be used, and a test of each, which names what depends on it."""

import ast
import importlib
import pathlib
import re

import pytest
from canaries import CANARIES

import fxtrain
from fxtrain._torch_internals.interface import INTERFACES

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


# Canaries register themselves on import. Their assertions are rewritten, so that failures show the values.
for name in ("tracing_canaries", "compiler_canaries", "tensor_canaries"):
    pytest.register_assert_rewrite(name)
    importlib.import_module(name)


@pytest.mark.parametrize("path", INTERFACES)
def test_interface_behaves_as_fxtrain_expects(path):
    purpose = INTERFACES[path].purpose
    assert INTERFACES[path].exists, f"torch lacks {path}, which fxtrain uses for {purpose}."
    try:
        CANARIES[path]()
    except Exception as error:
        pytest.fail(f"{path} has changed, which fxtrain uses for {purpose}: {error!r}")
