"""Checks of every case: parity with a plain loop, compiled with uncompiled runs, and exact saves and exports."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
import tempfile
import time
from typing import Any

import torch
from torch import Tensor

import fxtrain as fx
from fxtrain import tree
from zoo.case import Case
from zoo.operators import import_without_operators

STEPS = 3
SEED = 5
DROPOUT = 0.2
EXACT = 1e-9  # uncompiled against a plain loop, float64
CLOSE = 1e-4  # compiled against uncompiled, float32
# Adam divides by the size of a gradient, so the rounding errors of gradients that are zero, such as those of biases of
# attention keys, grow to 1e-7 / eps of a step, which has to stay below CLOSE.
ADAM = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1}


class CheckError(AssertionError):
    """Raised if a case fails a check."""


def made(case: Case, dropout: float, seed: int = SEED) -> Any:
    if case.package != "torch":
        import_without_operators()
    torch.manual_seed(seed)
    modules = case.build(dropout)
    return tree.map(lambda module: module.train(), modules)


def batches(case: Case, dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(SEED + 1)
    found = [case.batch() for _ in range(STEPS)]
    return [tree.map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, batch) for batch in found]


def transformation(modules: Any) -> Any:
    """AdamW, or a dict of AdamW for a dict of modules."""
    tx = fx.optim.adamw(ADAM["lr"], eps=ADAM["eps"], weight_decay=ADAM["weight_decay"])
    return dict.fromkeys(modules, tx) if isinstance(modules, dict) else tx


def built_step(case: Case, tx: Any) -> fx.Step:
    return case.step(tx) if case.step else fx.train_step(case.loss, tx)


def train_plainly(case: Case, modules: Any, data: list[Any]) -> list[Tensor]:
    """Trains ``modules`` in place in a plain PyTorch loop; returns the losses."""
    parts = modules if isinstance(modules, dict) else {"": modules}
    optimizers = {
        name: torch.optim.AdamW([p for p in part.parameters() if p.requires_grad], **ADAM)
        for name, part in parts.items()
    }
    losses = []
    for batch in data:
        if case.plain:
            losses.append(case.plain(modules, optimizers, batch).detach())
            continue
        loss = case.loss(modules, batch)
        optimizers[""].zero_grad()
        loss.backward()
        optimizers[""].step()
        losses.append(loss.detach())
    return losses


def parity(case: Case) -> float:
    """Trains uncompiled and in a plain loop, in float64, and returns the largest relative difference.

    Raises:
        CheckError: If the difference is above ``EXACT``, or if no parameter changed.
    """
    plain, before = (tree.map(lambda module: module.double(), made(case, 0.0)) for _ in range(2))
    data = batches(case, torch.float64)
    tx = transformation(plain)
    state = fx.init(before, tx, seed=SEED)
    step = built_step(case, tx)
    losses = []
    for batch in data:
        state, output = step(state, copy.deepcopy(batch))
        losses.append(output.metrics["loss"])
    wanted = train_plainly(case, plain, data)
    if not all(loss.isfinite() for loss in wanted):
        raise CheckError(f"the plain loop's losses are {[float(loss) for loss in wanted]}: mend the case.")
    difference = max(relative(loss, like) for loss, like in zip(losses, wanted, strict=True))
    where = "the loss"
    for name, value in named(fx.state_dict(state)).items():
        like = named(weights(plain))[name]
        if like.is_floating_point() and (found := relative(value, like)) > difference:
            difference, where = found, name
    if all(torch.equal(value, named(weights(before))[name]) for name, value in named(weights(plain)).items()):
        raise CheckError("the plain loop changed no parameter: mend the case.")
    if not difference <= EXACT:
        raise CheckError(f"differs from a plain loop by {difference:.1e} in {where}; {EXACT:.0e} is allowed.")
    return difference


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Results of a compiled run: its largest relative difference, its route and the seconds of its first step."""

    difference: float
    route: str
    first_seconds: float


def compiled(case: Case) -> Compiled:
    """Trains uncompiled and compiled, with dropout, in float32, then saves, restores and exports the state.

    Raises:
        CheckError: If the two runs differ, a restored run ends with other bits, or exported weights give another loss.
    """
    modules = made(case, DROPOUT if case.dropout else 0.0)
    data = batches(case, torch.float32)
    tx = transformation(modules)
    step = built_step(case, tx)
    start = fx.init(modules, tx, seed=SEED)
    refuse_missing_dropout(case, step, start, data[0])

    state, wanted = start, []
    for batch in data:
        state, output = step(state, batch)
        wanted.append(output.metrics["loss"])
    eager = state

    fast = fx.compile(step)
    began = time.perf_counter()
    first, output = fast(start, data[0])
    seconds = time.perf_counter() - began
    state, losses = first, [output.metrics["loss"]]
    for batch in data[1:]:
        state, output = fast(state, batch)
        losses.append(output.metrics["loss"])
    pairs = {f"loss {index}": pair for index, pair in enumerate(zip(losses, wanted, strict=True), 1)}
    like = named(fx.state_dict(eager))
    pairs.update((name, (value, like[name])) for name, value in named(fx.state_dict(state)).items())
    differences = {name: relative(*pair) for name, pair in pairs.items()}
    where = max(differences, key=lambda name: differences[name])
    if not differences[where] <= CLOSE:
        raise CheckError(f"compiled differs from uncompiled by {differences[where]:.1e} in {where}.")

    refuse_lost_bits(case, fast, first, data[1:], state)
    refuse_lost_weights(case, state, data[0])
    return Compiled(differences[where], route_of(fast), seconds)


def refuse_missing_dropout(case: Case, step: fx.Step, state: fx.TrainState, batch: Any) -> None:
    """Requires that the loss depends on the seed if and only if the case has dropout."""
    state, _ = step(state, batch)  # because heads initialized to zero hide the dropout before them
    losses = {float(step(state.replace(seed=state.seed + number), batch)[1].metrics["loss"]) for number in range(5)}
    if (len(losses) > 1) != case.dropout:
        raise CheckError(f"expected dropout={case.dropout}, got losses {losses} of five seeds. Mend the case.")


def refuse_lost_bits(case: Case, step: Any, first: fx.TrainState, data: list[Any], end: fx.TrainState) -> None:
    """Requires that a run saved and restored after its first step ends bitwise equal."""
    fresh = made(case, DROPOUT if case.dropout else 0.0, seed=SEED + 2)
    with tempfile.TemporaryDirectory() as folder:
        path = fx.save(pathlib.Path(folder) / "first", first)
        state = fx.restore(path, like=fx.init(fresh, transformation(fresh)))
    for batch in data:
        state, _ = step(state, batch)
    paths = tree.paths(end, "state")
    for path, value, like in zip(paths, tree.leaves(state), tree.leaves(end), strict=True):
        if not torch.equal(bits(value), bits(like)):
            raise CheckError(f"a restored run ends with other bits in {path}.")


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8) if value.numel() else value


def refuse_lost_weights(case: Case, state: fx.TrainState, batch: Any) -> None:
    """Requires that exported weights compute the same loss in a new module and are kept by another state."""
    dropout = DROPOUT if case.dropout else 0.0
    exported = fx.state_dict(state)
    fresh, other = made(case, dropout, seed=SEED + 3), made(case, dropout, seed=SEED + 4)
    loaded = fx.load_state_dict(fx.init(other, transformation(other)), exported)
    for name, value in named(fx.state_dict(loaded)).items():
        if not torch.equal(value, named(exported)[name]):
            raise CheckError(f"fx.load_state_dict changed {name}.")
    if isinstance(fresh, dict):
        for name, part in fresh.items():
            part.eval().load_state_dict(exported[name])
    else:
        fresh.eval().load_state_dict(exported)
    measure = case.measure or case.loss
    wanted = fx.eval_step(measure)(state, batch).metrics["loss"]
    found = measure(fresh, batch).detach()
    if not torch.allclose(found, wanted, rtol=1e-6, atol=1e-7):
        raise CheckError(f"the exported weights give {float(found)}, and the state {float(wanted)}.")


def route_of(step: Any) -> str:
    return step.route


def relative(value: Tensor, like: Tensor) -> float:
    """The largest difference, relative to the larger of the largest value and an optimizer step."""
    if torch.equal(value, like):  # also true for equal infinities
        return 0.0
    size = max(float(like.abs().max()), ADAM["lr"])
    difference = float((value.double() - like.double()).abs().max())
    return difference / size if difference == difference else float("inf")


def weights(modules: Any) -> Any:
    return tree.map(lambda module: module.state_dict(), modules)


def named(dicts: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dicts by their dotted names."""
    found: dict[str, Tensor] = {}
    for name, value in dicts.items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, dict):
            found.update(named(value, f"{prefix}{name}."))
    return found
