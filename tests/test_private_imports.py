"""Tests and benchmarks observe the public surface. The private modules that they may import are listed with reasons."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

ALGORITHM = "a pure function whose properties hold for many inputs, of which a run shows few"
CANARY = "a use of a private interface of torch, which a canary repeats"
COMMAND = "a part of a command, which takes minutes as a whole"
ENGINE = "a part of the compiler that steps reach only under rare conditions"
FAULT = "a name that a test replaces to cause a fault or to shorten a pause"
PASS = "a pass over graphs, tested on small graphs"

ALLOWED = {
    "_torch_internals": CANARY,
    "_torch_internals.interface": CANARY,
    "_torch_internals.kernels": CANARY,
    "callbacks._decoding": ALGORITHM,
    "callbacks._textgen": ALGORITHM,
    "checkpoint._host_copy": "copies to the host, from a device that a test imitates",
    "checkpoint._manifest": "a benchmark compares what two folders contain",
    "checkpoint._orphaned_slots": ALGORITHM,
    "cli._arguments": COMMAND,
    "cli._baselines": COMMAND,
    "cli._corpus": COMMAND,
    "cli._lm": COMMAND,
    "cli._run_folder": COMMAND,
    "cli._streams": COMMAND,
    "cli._train": COMMAND,
    "cli._transformer": COMMAND,
    "compiler._compiled": "a fuzzer runs compiled steps operation by operation",
    "compiler.artefacts._file": FAULT,
    "compiler.artefacts._fingerprint": FAULT,
    "compiler.artefacts._lease": FAULT,
    "compiler.call._memory": ENGINE,
    "compiler.check._rounding_noise": ALGORITHM,
    "compiler.lowering._compile_thread": FAULT,
    "compiler.lowering._cuda_graphs": "CUDA graphs, replayed without a GPU",
    "compiler.lowering._executable": ENGINE,
    "compiler.lowering._function_modes": ENGINE,
    "compiler.lowering._inductor": FAULT,
    "compiler.lowering._modes": "modes with CUDA graphs, without a GPU",
    "compiler.lowering._route_order": FAULT,
    "compiler.lowering._routes": "a fuzzer runs compiled steps operation by operation",
    "compiler.lowering._side_effects": ENGINE,
    "compiler.lowering._signature": ALGORITHM,
    "compiler.lowering._specialization": ENGINE,
    "compiler.lowering._stored": ALGORITHM,
    "compiler.lowering._trace": FAULT,
    "compiler.lowering._value_reads": ENGINE,
    "compiler.passes._concatenation": PASS,
    "compiler.passes._dropout": PASS,
    "compiler.passes._constants": PASS,
    "compiler.passes._in_place": PASS,
    "compiler.passes._matmuls": PASS,
    "compiler.passes._recompute": PASS,
    "compiler.passes._reductions": PASS,
    "compiler.passes._repeats": PASS,
    "compiler.passes._scalars": PASS,
    "compiler.passes._splitting": PASS,
    "compiler.passes._transfer_buckets": PASS,
    "core._available_memory": "the memory of a GPU that a test imitates",
    "core._graph_marks": "what a trace notes on the nodes of its graph, in a test of a pass",
    "core._state_view": FAULT,
    "data._bin_packing": ALGORITHM,
    "data._bucketed": ALGORITHM,
    "data._epoch_order": ALGORITHM,
    "data._seeding": ALGORITHM,
    "diagnostics._analysis": ENGINE,
    "fold._subscription": "the events that an observer names, which decide what a run costs",
    "loop._history": ALGORITHM,
    "loop._interrupts": FAULT,
    "loop._publisher": "copies to the host, from a device that a test imitates",
    "loop._transfer": "copies to the host, from a device that a test imitates",
    "model._tensor_access": CANARY,
    "model._unseeded_values": ENGINE,
    "observers._running_averages": ALGORITHM,
    "precision._policy": CANARY,
    "report._downsampling": ALGORITHM,
    "rng._arithmetic": ALGORITHM,
    "rng._continuous": ALGORITHM,
    "rng._discrete": ALGORITHM,
    "rng._functional": "the random functions of torch, of which none may be missing",
    "rng._host_generators": FAULT,
    "rng._torch_functions": "the random functions of torch, of which none may be missing",
    "rng._uniform": ALGORITHM,
    "step._loss_mistakes": CANARY,
    "values._markdown": ALGORITHM,
    "writers._backlog": FAULT,
    "writers._channel": FAULT,
    "writers._mlflow_runs": FAULT,
    "writers._outbox": FAULT,
    "writers._staging": ALGORITHM,
}

FILES = sorted(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def private_imports(path):
    """Yields the private modules of fxtrain that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = node.module or ""
            is_private = any(part.startswith("_") for part in inside.split("."))
            modules = [inside if is_private else f"{inside}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            package, *parts = module.split(".")
            if package == "fxtrain" and any(part.startswith("_") and not part.endswith("__") for part in parts):
                yield ".".join(parts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_imports_only_allowed_private_modules(path):
    found = sorted(set(private_imports(path)) - ALLOWED.keys())
    assert not found, "Observe this through the public surface, or add the module to ALLOWED with a reason."


def test_allowed_private_modules_are_imported():
    assert ALLOWED.keys() == {module for path in FILES for module in private_imports(path)}
