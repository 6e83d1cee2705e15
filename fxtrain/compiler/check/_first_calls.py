"""Compares the first calls of a compiled step with the uncompiled step."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from optree import PyTreeSpec
from torch import Tensor

from fxtrain import tree
from fxtrain.compiler.check._agreement import AbandonedError, Agreement
from fxtrain.compiler.check._criterion import Difference, change_size, deviation, is_rounding, unexplained
from fxtrain.compiler.check._generators import Generators, other_samples
from fxtrain.compiler.check._mismatch import MiscompiledError, mismatch
from fxtrain.compiler.check._rounding_noise import RoundingNoise
from fxtrain.compiler.lowering._executable import Executable
from fxtrain.compiler.lowering._obstacles import obstacle
from fxtrain.compiler.lowering._side_effects import FileInTraceError, refusing_files
from fxtrain.core import Tree, dtype_name
from fxtrain.core._collective_errors import is_of_collective
from fxtrain.model._outside_values import repeating
from fxtrain.step import EvalFunction, Step

_log = logging.getLogger(__name__)

_CHECKED_CALLS = 2
_MAX_SIZES = 32
"""Number of batch sizes for which a graph of symbolic sizes is checked."""
_MAX_PAIRS = 4
"""Pairs of noisy calls after which a difference counts as unexplained."""
_CALLS = ("first call", "second call", "first call with another batch size")


class _Inputs(NamedTuple):
    """The inputs of a call: leaves of the state before it, of the batch, and the random generators before it."""

    leaves: Sequence[Tensor]
    batch: Sequence[Tensor]
    generators: Generators | None


class _Leaf(NamedTuple):
    """A leaf of the new state or of the output."""

    path: str
    index: int  # among all leaves of the result
    old: Tensor | None
    expected: Tensor
    found: Tensor


class _Unexplained(NamedTuple):
    """A difference, and the deviation of each element of the leaf under noise, if it could be measured."""

    leaf: _Leaf
    difference: Difference
    spread: Tensor | None


class _UncheckableError(RuntimeError):
    """The uncompiled step cannot be run once more."""


class CheckedRun:
    """The ``run`` function of an executable, whose first calls are compared with the uncompiled step.

    Of a step with a mesh, only the first call is. All ranks make it together, and take all decisions together, because
    each uncompiled step has collectives. Later calls may need a new graph on some ranks only.

    Args:
        step: The uncompiled step.
        state_structure: The structure of the part of the state that enters the step.
        batch_structure: The structure of the batches.
        executable: The compiled step.
        is_dynamic: Whether batches differ in their sizes, each of which is checked.
        finish: Called after the last check. It puts the unchecked ``run`` in place of this object.
    """

    def __init__(
        self,
        step: Step | EvalFunction,
        state_structure: PyTreeSpec,
        batch_structure: PyTreeSpec,
        executable: Executable,
        *,
        is_dynamic: bool,
        finish: Callable[[], None],
    ) -> None:
        self._step, self._structures = step, (state_structure, batch_structure)
        self._executable, self._is_dynamic, self._finish = executable, is_dynamic, finish
        self._is_in_place = executable.written is not None
        self._calls = self._passed = 0
        mesh = step.mesh
        self._ranks, self._has_ranks = Agreement(mesh), mesh is not None
        self._calls_due = _CHECKED_CALLS if mesh is None else 1
        self._sizes = set[tuple[torch.Size, ...]]()
        self._noise: dict[int, Tensor] = {}  # deviations of leaves under noise, relative to their change

    def __call__(self, leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tree]:
        run, graphs = self._executable.run, self._executable.graphs
        size = tuple(leaf.shape for leaf in inputs) if self._is_dynamic and not self._has_ranks else ()
        is_due = self._calls < self._calls_due or size not in self._sizes
        is_in_place = self._is_in_place
        if is_in_place and not is_due:
            return run(leaves, inputs)
        why_not = obstacle(leaves, is_in_place, has_mesh=self._has_ranks) if is_due else None
        if is_due and self._ranks.any(why_not is not None):
            why_not = why_not or "another rank cannot check it"
            _log.warning("%r is not checked against the uncompiled step: %s.", self._step, why_not)
            self._finish()
            return run(leaves, inputs)
        old = [leaf.clone() for leaf in leaves] if is_in_place else leaves
        before = Generators.now() if is_due else None
        count = 0 if graphs is None else len(graphs)
        new, output = run(leaves, inputs)
        if graphs is not None and len(graphs) != count and not self._has_ranks:
            # Another graph, for other values of the tensors that Python reads.
            self._calls, is_due = 0, True
        if is_due:
            try:
                self._passed += self._check(_Inputs(old, inputs, before), (leaves if is_in_place else new, output))
            except MiscompiledError:
                if is_in_place:
                    _restore(leaves, old)
                raise
        self._calls += 1
        self._sizes.add(size)
        has_more_sizes = self._is_dynamic and not self._has_ranks and len(self._sizes) < _MAX_SIZES
        if self._calls >= self._calls_due and not has_more_sizes and (graphs is None or self._has_ranks):
            self._finish()
            if self._passed == self._calls and self._executable.mark is not None:
                _leave(self._executable.mark)
        return ((), output) if is_in_place else (new, output)

    def _check(self, given: _Inputs, found: tuple[Sequence[Tensor], Tree]) -> bool:
        """Compares a call with the uncompiled step. Returns whether it could.

        Raises:
            MiscompiledError: They differ.
        """
        began = time.perf_counter()
        try:
            try:
                expected = self._uncompiled(given)
            except (torch.OutOfMemoryError, MemoryError, FileInTraceError):
                raise
            except Exception as error:
                if is_of_collective(error):
                    raise
                raise _UncheckableError(f"it cannot run once more: {error!r}") from error
            suspects = self._differing(given, expected, found)
            differences = self._unexplained(given, suspects) if self._ranks.any(bool(suspects)) else []
            if self._ranks.any(bool(differences)) and self._differs_at_each_call(given, found, differences):
                return False
        except (_UncheckableError, AbandonedError, FileInTraceError, torch.OutOfMemoryError, MemoryError) as error:
            if not isinstance(error, AbandonedError):
                self._ranks.abandon()
            _log.info("%r is not checked against the uncompiled step: %s", self._step, error)
            return False
        _log.info("Checked %r against the uncompiled step in %.1f s.", self._step, time.perf_counter() - began)
        return True

    def _uncompiled(self, given: _Inputs) -> tuple[list[Tensor], Tree]:
        """Returns the leaves of the new state and the output of the uncompiled step."""
        state_structure, batch_structure = self._structures
        state = tree.unflatten(state_structure, given.leaves)
        # The step may write into its batch.
        batch = tree.unflatten(batch_structure, [leaf.clone() for leaf in given.batch])
        kept = contextlib.nullcontext() if given.generators is None else given.generators.repeated()
        with kept, refusing_files(), repeating():
            result: Any = self._step(state, batch)
        moved, output = result if isinstance(self._step, Step) else ((), result)
        return tree.leaves(moved), output

    def _differing(
        self, given: _Inputs, expected: tuple[Sequence[Tensor], Tree], found: tuple[Sequence[Tensor], Tree]
    ) -> list[_Leaf]:
        """Returns the leaves that differ by more than rounding errors of their elements."""
        return [
            leaf
            for leaf in self._leaves(given, expected, found)
            if not is_rounding(leaf.old, leaf.expected, leaf.found) and not self._is_known_noise(leaf)
        ]

    def _is_known_noise(self, leaf: _Leaf) -> bool:
        """Whether noise measured at an earlier call explains the difference. If not, it is measured again."""
        noise = self._noise.get(leaf.index)
        if noise is None or noise.numel() != leaf.expected.numel():
            return False
        spread = noise * change_size(leaf.old, leaf.expected)
        return unexplained(leaf.old, leaf.expected, leaf.found, spread) is None

    def _leaves(
        self, given: _Inputs, expected: tuple[Sequence[Tensor], Tree], found: tuple[Sequence[Tensor], Tree]
    ) -> Iterator[_Leaf]:
        olds: list[Tensor | None] = []
        paths: list[str] = []
        if isinstance(self._step, Step):
            olds += given.leaves
            paths += tree.paths(tree.unflatten(self._structures[0], given.leaves), "state")
        outputs = [tree.paths(output, "output") for _, output in (expected, found)]
        if outputs[0] != outputs[1]:
            names = [path for path in (*outputs[0], *outputs[1]) if (path in outputs[0]) != (path in outputs[1])]
            raise self._error(names, "it is in one of the two outputs only", is_frozen=False)
        paths += outputs[0]
        ones, twos = ([*new, *tree.leaves(output)] for new, output in (expected, found))
        olds += [None] * (len(paths) - len(olds))
        for index, (path, old, one, two) in enumerate(zip(paths, olds, ones, twos, strict=True)):
            if not isinstance(one, Tensor) or not isinstance(two, Tensor):
                continue
            if one.shape != two.shape or one.dtype != two.dtype:
                kinds = [f"{dtype_name(leaf.dtype)}{list(leaf.shape)}" for leaf in (two, one)]
                raise self._error([path], f"{kinds[0]}, expected {kinds[1]}", is_frozen=False)
            yield _Leaf(path, index, old, one, two)

    def _unexplained(self, given: _Inputs, suspects: list[_Leaf]) -> list[_Unexplained]:
        """Returns the leaves whose differences are larger than the effects of noise in each operation."""
        spreads: dict[int, Tensor | None] = dict.fromkeys(leaf.index for leaf in suspects)
        left: list[_Unexplained] = []
        for seed in range(_MAX_PAIRS):
            for sign in (1.0, -1.0):
                noisy = self._noisy(given, RoundingNoise(seed=seed, sign=sign))
                if self._ranks.any(noisy is None) or noisy is None:
                    break
                for leaf in suspects:
                    spreads[leaf.index] = deviation(leaf.expected, noisy[leaf.index], spreads[leaf.index])
            left = []
            for leaf in suspects:
                spread = spreads[leaf.index]
                difference = unexplained(leaf.old, leaf.expected, leaf.found, spread)
                if difference is not None:
                    left.append(_Unexplained(leaf, difference, spread))
                elif spread is not None and spread.isfinite().all():
                    size = change_size(leaf.old, leaf.expected)
                    if size > 0:
                        self._noise[leaf.index] = spread / size
            suspects = [leaf for leaf, *_ in left]
            if not self._ranks.any(bool(left)):
                break
        return left

    def _noisy(self, given: _Inputs, noise: RoundingNoise) -> list[Any] | None:
        """Returns the leaves of the result of the uncompiled step with noise, or None if it cannot run with it."""
        try:
            with noise:
                new, output = self._uncompiled(given)
        except (torch.OutOfMemoryError, MemoryError, FileInTraceError):
            raise
        except Exception as error:
            _log.debug("%r cannot run with noise in its operations.", self._step, exc_info=error)
            try:
                leaves, batch = ([noise.added_to(leaf) for leaf in part] for part in (given.leaves, given.batch))
                new, output = self._uncompiled(_Inputs(leaves, batch, given.generators))
            except (torch.OutOfMemoryError, MemoryError, FileInTraceError):
                raise
            except Exception:
                return None
        if noise.has_overflowed:
            raise _UncheckableError("a float16 result overflows, which a compiled step may avoid.")
        return [*new, *tree.leaves(output)]

    def _differs_at_each_call(
        self, given: _Inputs, found: tuple[Sequence[Tensor], Tree], differences: list[_Unexplained]
    ) -> bool:
        """Returns True if the compiled step, like the uncompiled one, reads something new at each call.

        Raises:
            MiscompiledError: Only the uncompiled one does, or neither.
        """
        is_frozen = self._calls > 0
        with other_samples():
            new, output = self._uncompiled(given._replace(generators=None))
            if self._ranks.any(_vary(differences, [*new, *tree.leaves(output)], expected=True)):
                leaves = [leaf.clone() for leaf in given.leaves] if self._is_in_place else given.leaves
                new, output = self._executable.run(leaves, given.batch)
                result = [*(leaves if self._is_in_place else new), *tree.leaves(output)]
                if self._ranks.any(_vary(differences, result, expected=False)):
                    _log.info("%r gives another result at each call, so it is not checked.", self._step)
                    return True
                is_frozen = True
        if not differences:
            raise self._error(["a place that another rank names"], "read its log", is_frozen=is_frozen)
        leaf, difference, _ = max(differences, key=_severity)
        place = "".join(f"[{', '.join(map(str, difference.index))}]" for _ in difference.index[:1])
        values = f"{difference.found!r}, expected {difference.expected!r} (tolerance {difference.tolerance:.1e})"
        paths = [f"{leaf.path}{place}", *(other.path for other, *_ in differences if other is not leaf)]
        raise self._error(paths, values, is_frozen=is_frozen)

    def _error(self, paths: Sequence[str], values: str, *, is_frozen: bool) -> MiscompiledError:
        return mismatch(self._step, paths, values, call=_CALLS[min(self._calls, 2)], is_frozen=is_frozen)


def _leave(mark: Path) -> None:
    with contextlib.suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _restore(leaves: Sequence[Tensor], old: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for leaf, value in zip(leaves, old, strict=True):
            leaf.copy_(value)


def _vary(differences: Sequence[_Unexplained], leaves: Sequence[Tensor], *, expected: bool) -> bool:
    """Whether the leaves of another call differ from those of the uncompiled (``expected``) or the compiled step."""
    return any(
        unexplained(leaf.old, leaf.expected if expected else leaf.found, leaves[leaf.index], spread) is not None
        for leaf, _, spread in differences
    )


def _severity(each: _Unexplained) -> float:
    _, difference, _ = each
    distance = abs(difference.expected - difference.found)
    return distance / difference.tolerance if difference.tolerance > 0 else math.inf
