"""Tracing: model code behaves as expected under a trace, and the graph computes the same as the step."""

import builtins
import importlib
import io
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import fxtrain as fx
from fxtrain import tree
from fxtrain.compiler.lowering._function_modes import OpaqueCTC
from fxtrain.compiler.lowering._side_effects import FileInTraceError, detecting_side_effects
from fxtrain.compiler.passes._concatenation import replace_trivial_concatenations
from fxtrain.core import compiling
from fxtrain.diagnostics._analysis import trace

AS_LIBRARIES_ASK = [
    torch.compiler.is_compiling,
    torch._utils.is_compiling,
    torch._dynamo.is_compiling,
    lambda: False | torch.compiler.is_compiling(),
    lambda: torch.compiler.is_compiling() | False,
    lambda: torch.compiler.is_compiling() and not torch.compiler.is_exporting(),
]


class Masked(nn.Module):
    """Skips a mask of ones, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, mask):
        if not torch.compiler.is_compiling() and bool(mask.all()):
            return self.linear(x)
        return self.linear(x) * mask


def masked():
    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, batch: model(*batch).square().mean(), tx)
    return step, fx.init(Masked(), tx), (torch.randn(3, 4), torch.tensor([[1.0], [1.0], [0.0]]))


class TestIsCompiling:
    @pytest.mark.parametrize("ask", AS_LIBRARIES_ASK)
    def test_is_true_inside_and_false_after(self, ask):
        with compiling():
            assert bool(ask()) is True
            with compiling():
                assert bool(ask()) is True
            assert bool(ask()) is True
        assert ask() is False

    def test_is_restored_after_an_error(self):
        with pytest.raises(ZeroDivisionError), compiling():
            raise ZeroDivisionError
        assert torch.compiler.is_compiling() is False

    def test_is_false_in_other_threads(self):
        seen = []

        def ask():
            seen.append(bool(torch.compiler.is_compiling()))
            with compiling():
                seen.append(bool(torch.compiler.is_compiling()))
            seen.append(bool(torch.compiler.is_compiling()))

        with compiling():
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
            assert torch.compiler.is_compiling()
        assert seen == [False, True, False]
        assert torch.compiler.is_compiling() is False

    def test_is_false_after_a_late_restore_by_another_session(self):
        before = torch.compiler._is_compiling_flag
        with compiling():
            covered = torch.compiler._is_compiling_flag
            torch.compiler._is_compiling_flag = True
        assert torch.compiler._is_compiling_flag is True
        torch.compiler._is_compiling_flag = covered
        assert not torch.compiler.is_compiling()
        torch.compiler._is_compiling_flag = before

    def test_guarded_read_of_a_mask_keeps_one_graph(self):
        step, state, batch = masked()
        compiled = fx.compile(step, backend="aot_eager")
        found, expected = compiled(state, batch), step(state, batch)
        torch.testing.assert_close(tree.leaves(found), tree.leaves(expected))
        found = fx.explain(step, state, batch, calls=0)
        assert found.breaks + found.reads == ()
        assert torch.compiler.is_compiling() is False


class TestImports:
    @pytest.mark.parametrize("by_name", [False, True])
    def test_import_inside_a_step_creates_tensors_with_values(self, tmp_path, monkeypatch, by_name):
        name = f"constants_of_a_step_{int(by_name)}"
        (tmp_path / f"{name}.py").write_text("import torch\nSCALES = torch.tensor([1.0, 2.0]).cumsum(0)\n")
        monkeypatch.syspath_prepend(tmp_path)

        def loss_fn(model, batch):
            if by_name:
                scales = importlib.import_module(name).SCALES
            else:
                from constants_of_a_step_0 import SCALES

                scales = SCALES
            return (model(batch).square().mean() * scales).sum()

        tx = fx.optim.sgd(0.1)
        step, state, batch = fx.train_step(loss_fn, tx), fx.init(nn.Linear(4, 4), tx), torch.randn(3, 4)
        trace(step, state, batch)
        assert importlib.import_module(name).SCALES.tolist() == [1.0, 3.0]
        assert torch.isfinite(step(state, batch)[1].metrics["loss"])


def grown(dim):
    """Returns a function that concatenates keys to an empty cache, and views the result as a dense tensor."""
    return lambda empty, keys: torch.cat([empty, keys.transpose(1, 2)], dim=dim).view(4, 8, 3)


class TestConcatenations:
    @pytest.mark.parametrize(
        ("function", "shapes", "replaced"),
        [
            (grown(-2), [(0,), (2, 8, 2, 3)], True),
            (grown(2), [(2, 2, 0, 3), (2, 8, 2, 3)], True),
            (lambda empty, x: torch.cat([x.mT, empty]).view(6), [(0,), (2, 3)], True),
            (lambda x, y: torch.cat([x.mT, y.mT]), [(2, 3), (2, 3)], False),
            (lambda x, y: torch.cat([x, y]), [(0,), (0,)], False),
            (lambda empty, x: torch.cat([empty.double(), x]), [(0,), (3,)], False),
        ],
    )
    def test_concatenation_with_empty_tensors_is_dense(self, function, shapes, replaced):
        given = [torch.randn(shape) for shape in shapes]
        graph = make_fx(function, tracing_mode="fake")(*given)
        replace_trivial_concatenations(graph.graph)
        graph.recompile()
        assert ("aten.cat" not in graph.code) == replaced
        # Inductor applies these decompositions before it generates code.
        lowered = make_fx(graph, decomposition_table=select_decomp_table(), tracing_mode="fake")(*given)
        expected = function(*given)
        for found in (graph(*given), lowered(*given)):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            assert found.stride() == expected.stride()

    def test_data_dependent_sizes_are_unchanged(self):
        def function(x):
            return torch.cat([x[x > 0], x[x < 0]])

        graph = make_fx(function, tracing_mode="fake")(torch.randn(4))
        replace_trivial_concatenations(graph.graph)
        graph.recompile()
        for x in (torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 2.0, 0.0])):
            torch.testing.assert_close(graph(x), function(x), rtol=0, atol=0)


class TestCTC:
    """CTC loss as one opaque operator, with lengths from the batch."""

    @pytest.mark.parametrize("zero_infinity", [False, True])
    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    def test_equals_torch_for_all_lengths(self, reduction, zero_infinity):
        def loss_fn(scores, *given):
            with OpaqueCTC():
                scores = scores.log_softmax(-1)
                loss = F.ctc_loss(scores, *given, reduction=reduction, zero_infinity=zero_infinity)
            return (loss * torch.arange(1.0, 4.0)).sum() if reduction == "none" else loss

        first = torch.randn(7, 3, 5), torch.randint(1, 5, (3, 4)), torch.tensor([7, 6, 5]), torch.tensor([4, 2, 0])
        graph = make_fx(torch.func.grad_and_value(loss_fn), tracing_mode="fake")(*first)
        impossible = torch.randn(7, 3, 5), first[1].flip(0), torch.tensor([7, 2, 5]), torch.tensor([1, 4, 3])
        for scores, *given in (first, impossible):
            leaf = scores.clone().requires_grad_()
            loss = F.ctc_loss(leaf.log_softmax(-1), *given, reduction=reduction, zero_infinity=zero_infinity)
            loss = (loss * torch.arange(1.0, 4.0)).sum() if reduction == "none" else loss
            expected = torch.autograd.grad(loss, leaf)[0], loss.detach()
            torch.testing.assert_close(graph(scores, *given), expected, equal_nan=True)

    @pytest.mark.parametrize("lengths", [([7, 6, 5], [2, 1, 1]), (torch.tensor([7, 6, 5]), torch.tensor([2, 1, 1]))])
    def test_accepts_concatenated_targets_and_lists_of_lengths(self, lengths):
        scores = torch.randn(7, 3, 5).log_softmax(-1)
        with OpaqueCTC():
            found = F.ctc_loss(scores, torch.tensor([1, 2, 3, 4]), *lengths)
        torch.testing.assert_close(found, F.ctc_loss(scores, torch.tensor([1, 2, 3, 4]), *lengths))

    def test_accepts_an_unbatched_example(self):
        given = torch.randn(7, 5).log_softmax(-1), torch.tensor([1, 2]), torch.tensor(7), torch.tensor(2)
        with OpaqueCTC():
            found = F.ctc_loss(*given, reduction="none")
        torch.testing.assert_close(found, F.ctc_loss(*given, reduction="none"))

    def test_second_derivatives_are_refused(self):
        def loss(scores):
            return F.ctc_loss(scores, torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2]))

        def slope(scores):
            with OpaqueCTC():
                return torch.func.grad(loss)(scores).square().sum()

        with pytest.raises(NotImplementedError, match="expected a first derivative of ctc_loss"):
            torch.func.grad(slope)(torch.randn(5, 1, 4).log_softmax(-1))


def explained(loss_fn):
    """Returns the graph breaks and value reads of a step that is traced without values."""
    tx = fx.optim.sgd(0.1)
    state = fx.init(nn.Linear(4, 4), tx)
    found = fx.explain(fx.train_step(loss_fn, tx), state, torch.randn(3, 4), calls=0)
    return found.breaks + found.reads


class TestLiterals:
    def test_tolist_of_literals_is_constant(self):
        def loss_fn(model, batch):
            axes = torch.arange(0, batch.ndim).tolist()
            return model(batch).square().mean(dim=axes) * torch.tensor([2.0, 3.0])[1:].mul(1).sum() * axes[1]

        assert explained(loss_fn) == ()
        step = fx.train_step(loss_fn, fx.optim.sgd(0.1))
        state, batch = fx.init(nn.Linear(4, 4), fx.optim.sgd(0.1)), torch.randn(3, 4)
        graph = trace(step, state, batch)
        found = graph(*tree.leaves(state), *tree.leaves(batch))
        torch.testing.assert_close(found, tree.leaves(step(state, batch)), rtol=0, atol=0)

    @pytest.mark.parametrize("differentiate", ["func", "autograd"])
    def test_nested_literals_are_constant_in_both_differentiations(self, differentiate):
        def loss_fn(model, batch):
            ((one, two), (three, four)) = torch.tensor([[0.5, 2.0], [3.0, 4.0]]).tolist()
            return model(batch).square().mean() * (one + two * three - four)

        tx = fx.optim.sgd(0.1)
        step = fx.train_step(loss_fn, tx, differentiate=differentiate)
        state, batch = fx.init(nn.Linear(4, 4), tx), torch.randn(3, 4)
        found = trace(step, state, batch)(*tree.leaves(state), *tree.leaves(batch))
        torch.testing.assert_close(found, tree.leaves(step(state, batch)), rtol=0, atol=0)

    @pytest.mark.parametrize(
        "read",
        [
            lambda batch: torch.tensor([1.0, 2.0]).mul_(batch.sum()).tolist()[0],
            lambda batch: batch.sum().tolist(),
            lambda batch: torch.tensor([1.0, 2.0]).copy_(batch[0, :2]).tolist()[0],
        ],
    )
    def test_tolist_of_data_stays_a_read(self, read):
        assert explained(lambda model, batch: model(batch).square().mean() * read(batch)) != ()


class TestEffects:
    @pytest.mark.parametrize("load", [np.load, lambda path: torch.load(path.with_suffix(".pt"))])
    def test_file_access_is_refused_with_its_line(self, tmp_path, load):
        np.save(tmp_path / "scale.npy", np.ones(1))
        torch.save(torch.ones(1), tmp_path / "scale.pt")
        opened = (builtins.open, io.open)

        def loss_fn(model, batch):
            return model(batch).square().mean() * float(load(tmp_path / "scale.npy")[0])

        (only, *_) = explained(loss_fn)
        assert "FileInTraceError" in only.reason
        assert "test_tracing.py:" in only.reason
        assert (builtins.open, io.open) == opened

    @pytest.mark.parametrize("write", [lambda path: path.read_text(), lambda path: path.write_text("seen")])
    def test_pathlib_access_is_refused(self, tmp_path, write):
        path = tmp_path / "notes.txt"
        path.write_text("before")

        def loss_fn(model, batch):
            write(path)
            return model(batch).square().mean()

        with pytest.raises(FileInTraceError, match=r"test_tracing\.py:\d+"), detecting_side_effects():
            loss_fn(lambda batch: batch, torch.ones(2))
        assert path.read_text() == "before"

    def test_file_access_in_other_threads_is_allowed(self, tmp_path):
        with detecting_side_effects():
            thread = threading.Thread(target=(tmp_path / "other").write_text, args=("written",))
            thread.start()
            thread.join()
        assert (tmp_path / "other").read_text() == "written"

    @pytest.mark.parametrize("show", [print, str, repr])
    def test_print_of_a_tensor_warns_with_its_line(self, show):
        def loss_fn(model, batch):
            loss = model(batch).square().mean()
            show(loss)
            return loss

        with pytest.warns(UserWarning, match=r"formatted as text at .*test_tracing\.py:\d+"):
            assert explained(loss_fn) == ()

    def test_model_without_effects_does_not_warn(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert explained(lambda model, batch: model(batch).square().mean()) == ()
