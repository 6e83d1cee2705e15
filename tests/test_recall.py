"""Steps that are recognized without a trace: by the operators that they run."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxtrain as fx
from fxtrain import tree
from fxtrain.compiler.lowering import _trace as traced
from fxtrain.compiler.lowering._signature import signature_of
from fxtrain.compiler.lowering._stored import graph_hash

needs_inductor = pytest.mark.skipif(sys.platform != "linux", reason="compiles C++")

TX = fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.adamw(1e-2))
CALLBACKS = [fx.callbacks.nan_guard(), fx.callbacks.ema(0.9), fx.callbacks.grad_norms()]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))


def batch(seed=0, rows=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator)
    return {"x": x, "y": torch.randint(0, 3, (rows,), generator=generator)}


def loss_fn(model, given):
    logits = model(given["x"])
    return F.cross_entropy(logits, given["y"]), {"accuracy": (logits.argmax(1) == given["y"]).float().mean()}


def train_step(loss=loss_fn, tx=TX, callbacks=CALLBACKS, **options):
    return fx.train_step(loss, tx, callbacks=callbacks, **options)


def evaluated(model, given):
    return {"loss": F.cross_entropy(model(given["x"]), given["y"])}


def trained(step, count=3):
    state, outputs = fx.init(network(), TX, seed=1), []
    for seed in range(count):
        state, output = step(state, batch(seed))
        outputs.append(output)
    return tree.leaves((state, outputs))


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


class Traced(BaseException):
    """Raised by a trace. No other route is tried after it."""


@pytest.fixture
def untraced(monkeypatch):
    """Makes traces raise. Returns a context in which they are allowed."""

    def refuse(*args, **options):
        raise Traced

    trace_step = traced.trace_step
    monkeypatch.setattr(traced, "trace_step", refuse)

    @contextlib.contextmanager
    def allowed():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(traced, "trace_step", trace_step)
            yield

    return allowed


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder of compiled steps, and what they computed."""
    folder = tmp_path_factory.mktemp("graphs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))
        found = {donate: trained(fx.compile(train_step(), donate=donate)) for donate in (False, True)}
        state = fx.init(network(), TX, seed=1)
        found["eval"] = tree.leaves(fx.compile(fx.eval_step(evaluated))(state, batch()))
    return folder / "cache", found


@needs_inductor
class TestRecall:
    @pytest.fixture
    def cache(self, compiled, monkeypatch):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled[0]))
        return compiled[0]

    @pytest.mark.slow
    @pytest.mark.parametrize("donate", [False, True])
    def test_same_step_has_the_same_bits_without_a_trace(self, compiled, cache, untraced, donate):
        assert same(trained(fx.compile(train_step(), donate=donate)), compiled[1][donate])

    def test_evaluation(self, compiled, cache, untraced):
        step = fx.compile(fx.eval_step(evaluated))
        assert same(tree.leaves(step(fx.init(network(), TX, seed=1), batch())), compiled[1]["eval"])

    def test_step_compiled_in_the_background_is_ready_immediately(self, compiled, cache, untraced):
        step = fx.compile(train_step(), background=True)
        assert same(trained(step), compiled[1][False])
        assert step.uncompiled_steps == step.pending == 0

    @pytest.mark.slow
    def test_ahead_of_time(self, tmp_path, monkeypatch, untraced):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        tx = fx.optim.sgd(0.1)
        state, found = fx.init(nn.Linear(6, 3), tx, seed=1), []
        for context in (untraced(), contextlib.nullcontext()):
            step = fx.compile(fx.train_step(loss_fn, tx), mode="ahead-of-time")
            with context:
                found.append(tree.leaves(step(state, batch())))
        assert same(*found)

    def test_run_is_not_checked_again(self, cache, untraced, monkeypatch):
        step = fx.compile(train_step())
        calls = []
        take = fx.Step.__call__
        monkeypatch.setattr(fx.Step, "__call__", lambda *args: calls.append(args) or take(*args))
        trained(step)
        assert len(calls) == 1

    @pytest.mark.parametrize(
        "step",
        [
            lambda: train_step(lambda model, given: loss_fn(model, given)[0] * 2),
            lambda: train_step(tx=fx.optim.chain(fx.optim.clip_by_global_norm(0.5), fx.optim.adamw(1e-2))),
            lambda: train_step(callbacks=CALLBACKS[:2]),
            lambda: train_step(accumulate=2),
        ],
        ids=["loss", "constant", "callbacks", "microbatches"],
    )
    def test_other_step_is_traced(self, cache, untraced, step):
        with pytest.raises(Traced):
            trained(fx.compile(step()), 1)

    @pytest.mark.parametrize("options", [{"check": False}, {"memory": "recompute"}, {"dynamic": True}])
    def test_step_that_may_not_run_uncompiled_is_traced(self, cache, untraced, options):
        with pytest.raises(Traced):
            trained(fx.compile(train_step(), **options), 1)

    def test_damaged_file_is_replaced(self, compiled, tmp_path, monkeypatch, untraced):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        (tmp_path / "fxtrain").mkdir()
        for path in (compiled[0] / "fxtrain").iterdir():
            if path.is_file():
                content = path.read_bytes()
                (tmp_path / "fxtrain" / path.name).write_bytes(content[:-9] if path.suffix == ".fxs" else content)
        with pytest.raises(Traced):
            trained(fx.compile(train_step()))
        with untraced():
            assert same(trained(fx.compile(train_step())), compiled[1][False])
        assert same(trained(fx.compile(train_step())), compiled[1][False])

    def test_named_folder_is_enough_elsewhere(self, compiled, cache, tmp_path, monkeypatch, untraced):
        folder, expected = tmp_path / "named", compiled[1][False]
        trained(fx.compile(train_step(), artefacts=folder))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "empty"))
        assert same(trained(fx.compile(train_step(), artefacts=folder)), expected)
        assert list((tmp_path / "empty" / "fxtrain").glob("*.fxs"))


@pytest.mark.slow
@needs_inductor
def test_second_process_imports_neither_dynamo_nor_inductor(tmp_path):
    code = textwrap.dedent(
        """
        import json, sys
        import torch
        import fxtrain as fx
        torch.set_num_threads(1)
        torch.manual_seed(0)
        tx = fx.optim.adamw(1e-2)
        state = fx.init(torch.nn.Linear(4, 2), tx, seed=0)
        step = fx.compile(fx.train_step(lambda model, batch: model(batch).square().mean(), tx))
        for _ in range(2):
            state, _ = step(state, torch.ones(3, 4))
        heavy = [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]
        print(json.dumps([heavy, state.params["weight"].flatten().tolist()]))
        """
    )
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def run():
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    first, second = run(), run()
    assert first[0] == ["torch._dynamo", "torch._inductor", "sympy"]
    assert second[0] == []
    assert second[1] == first[1]


def of_loss(function):
    """Returns the signature of a step whose loss applies a function to the batch."""
    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, x: (model["w"] * function(x)).mean(), tx)
    return signature_of(step, fx.init({"w": torch.ones(4)}, tx), torch.arange(4.0))


def compiled_elsewhere(x):
    return torch.compile(torch.sin, backend="inductor")(x)


HIDDEN = {
    "apply": lambda x: x.clone().apply_(lambda value: value + 1),
    "tolist": lambda x: x * x.tolist()[1],
    "numpy": lambda x: x * float(x.numpy()[1]),
    "asarray": lambda x: x * float(np.asarray(x)[1]),
    "dlpack": lambda x: x * float(np.from_dlpack(x)[1]),
    "storage": lambda x: x * x.untyped_storage()[1],
    "text": lambda x: x * len(f"{x[1]:.3f}"),
    "caught": lambda x: x * caught(x),
    "sections": lambda x: torch.tensor_split(x, torch.tensor([1, 2]))[0].sum() * x,
}


def caught(x):
    try:
        return x.tolist()[1]
    except Exception:
        return 1.0


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", HIDDEN)
def test_values_read_or_written_without_an_operator_leave_no_signature(name):
    assert of_loss(HIDDEN[name]) is None


def test_assignment_to_data_is_an_operator_in_a_loss_and_hidden_elsewhere():
    def assigned(x):
        copy = x.clone()
        copy.data = torch.ones(4)
        return copy * x

    assert of_loss(assigned) is not None
    assert signature_of(lambda state, x: {"y": assigned(x)}, fx.init({"w": torch.ones(4)}), torch.arange(4.0)) is None


def test_compiled_functions_are_noted_like_uncompiled_ones():
    assert of_loss(compiled_elsewhere).digest == of_loss(torch.sin).digest != of_loss(torch.cos).digest


def test_value_read_by_an_operator_is_part_of_the_signature():
    assert of_loss(lambda x: x * x[1].item()) != of_loss(lambda x: x * x[2].item())


def test_constants_are_part_of_the_signature():
    constants = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 5.0])]
    assert len({of_loss(lambda x, c=c: x * c).digest for c in constants}) == 2
    assert len({of_loss(lambda x, c=c: x * c).digest for c in (1.0, 2.0, 0.0, -0.0)}) == 4


def test_regions_to_recompute_leave_no_signature():
    assert of_loss(lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)) is None


class Remembering(nn.Linear):
    """Writes an attribute at each call, which fxtrain examines at the first one."""

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


def test_first_call_of_a_module_that_writes_attributes_has_the_signature_of_later_ones():
    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, x: model(x).square().mean(), tx)
    state = fx.init(Remembering(4, 2), tx)
    first, second = (signature_of(step, state, torch.ones(3, 4)) for _ in range(2))
    assert first is not None
    assert first.digest == second.digest


def test_inputs_and_generators_are_not_changed():
    def writing(model, given):
        given["x"].mul_(2.0)
        return loss_fn(model, given)[0] + torch.rand(())

    step = train_step(writing)
    state, given = step.enter(step.attached(fx.init(network(), TX, seed=1))), batch()
    before, generator = [leaf.clone() for leaf in tree.leaves((state, given))], torch.random.get_rng_state()
    assert signature_of(step, state, given) is not None
    assert same(tree.leaves((state, given)), before)
    assert torch.equal(torch.random.get_rng_state(), generator)


@pytest.mark.filterwarnings("error")
def test_log_written_by_a_loss_leaves_no_signature_and_no_entry():
    log = ["before"]
    assert of_loss(lambda x: x if log.append("called") else x * 2) is None
    assert log == ["before"]


def smoothed(model, given):
    return F.cross_entropy(model(given["x"]), given["y"], label_smoothing=0.1)


OPTIMIZERS = [
    TX,
    fx.optim.sgd(0.1),
    fx.optim.sgd(0.2),
    fx.optim.sgd(0.1, momentum=0.9),
    fx.optim.sgd(0.1, momentum=0.9, nesterov=True),
    fx.optim.adamw(0.1),
    fx.optim.adamw(0.1, weight_decay=0.3),
    fx.optim.adamw(fx.schedules.warmup_cosine_decay(0.0, 0.1, warmup_steps=2, decay_steps=9)),
]
# Functions that make a fresh object of a step, and the optimizer of its state.
STEPS = [
    (lambda: fx.eval_step(evaluated), TX),
    *((lambda tx=tx: train_step(tx=tx), tx) for tx in OPTIMIZERS),
    (lambda: train_step(callbacks=[]), TX),
    (lambda: train_step(callbacks=[fx.callbacks.ema(0.8)]), TX),
    (lambda: train_step(accumulate=3), TX),
    (lambda: train_step(precision="bf16"), TX),
    (lambda: train_step(smoothed), TX),
]


@pytest.mark.slow
def test_steps_with_other_graphs_have_other_signatures():
    """Each step has one signature, and one graph, however often it is made."""
    graphs: dict[str, set[str]] = {}
    for make, tx in STEPS:
        for _ in range(2):
            step, state = make(), fx.init(network(), tx, seed=1)
            state = step.enter(step.attached(state) if isinstance(step, fx.Step) else state)
            signature = signature_of(step, state, batch())
            graphs.setdefault(signature.digest, set()).add(traced_hash(step, state))
    assert len(graphs) == len(STEPS)
    assert all(len(found) == 1 for found in graphs.values())
    assert len(set.union(*graphs.values())) == len(STEPS)


def traced_hash(step, state):
    found = []

    def keep(graph, examples):
        found.append(graph_hash(graph, examples, {}))
        return graph

    traced.trace_step(step, state, batch(), mode=None, in_place=False, backend=keep)()
    return found[0]
