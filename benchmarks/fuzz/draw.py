"""Generates a random program from a seed. The same seed gives the same program on every machine."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from benchmarks.fuzz.program import Ask, Cut, Program, depends_on_sessions, rewinds, unknown_length

_TRAJECTORY = (
    "EpochBegin",
    "StepBegin",
    "StepEnd",
    "EvalBegin",
    "EvalStepBegin",
    "EvalStep",
    "EvalEnd",
    "EpochEnd",
    "Rewound",
)
_ASKABLE = {
    "EpochBegin": ("stop", "save", "rewind", "evaluate", "end_epoch"),
    "StepBegin": ("stop", "save", "rewind", "evaluate", "end_epoch", "skip_batch"),
    "StepEnd": ("stop", "save", "rewind", "evaluate", "end_epoch"),
    "EvalBegin": ("stop", "save", "rewind", "end_epoch"),
    "EvalStepBegin": ("stop", "save", "rewind", "end_epoch"),
    "EvalStep": ("stop", "save", "rewind", "end_epoch"),
    "EvalEnd": ("stop", "save", "rewind", "end_epoch"),
    "EpochEnd": ("stop", "save", "rewind", "evaluate"),
    "Rewound": ("stop",),
    "FitBegin": ("stop", "save"),
    "Saved": ("stop",),
}
# Requests that a program may make at every event of a type and still end.
_AT_EACH = {("StepEnd", "save"), ("EvalEnd", "save"), ("EpochEnd", "evaluate"), ("StepEnd", "rewind")}
_SOURCES = {
    "list": 6, "sequence": 4, "arrays": 4, "shuffled": 6, "prefetched": 1, "loader": 3, "generator": 4, "iterable": 3,
    "iterable_loader": 1, "stateful": 3, "torchdata": 1, "foreign": 2, "endless": 1, "iterator": 1,
}  # fmt: skip
_HOWS = {
    "SIGINT": 25, "SIGTERM": 8, "SIGUSR1": 4, "error": 30, "exit": 6, "leave": 8, "limit": 10, "epochs": 5, "kill": 3,
}  # fmt: skip
_WORKERS = 0.003  # rare, because worker processes are slow to start
_COMPILED_SOURCES = ("list", "shuffled", "generator", "stateful")


class _Random(random.Random):
    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def one(self, *choices: Any) -> Any:
        return self.choice(choices)

    def weighted(self, weights: dict[str, int]) -> str:
        return self.choices(list(weights), list(weights.values()))[0]

    def some(self, choices: Sequence[Any], probability: float) -> tuple[Any, ...]:
        return tuple(choice for choice in choices if self.chance(probability))


def draw(seed: int, *, compiled: bool = False) -> Program:
    """Returns a random program.

    Args:
        seed: Any integer.
        compiled: Whether the step is compiled. Compiled programs use fewer kinds of data.
    """
    random_ = _Random(f"{seed} {compiled}")
    program = Program(seed=seed, compiled=compiled)
    for part in (_model, _data, _limits, _evaluation, _callbacks, _asks, _running, _saving, _cuts):
        program = program.replace(**part(random_, program))
    return program


def _model(r: _Random, program: Program) -> dict[str, Any]:
    if r.chance(0.8):
        return {"rows": r.one(1, 2, 3)}
    return {
        "model": "mlp",
        "optimizer": r.one("sgd", "momentum", "adamw", "injected"),
        "rows": r.one(2, 4),
        "accumulate": r.one(1, 1, 2),
        "loss_scale": r.chance(0.15),
    }


def _data(r: _Random, program: Program) -> dict[str, Any]:
    # Batch norm needs at least two rows per microbatch.
    fits = {} if program.accumulate * 2 <= program.rows else {"accumulate": 1}
    if program.compiled:
        return {"source": r.one(*_COMPILED_SOURCES), "batches": r.randint(2, 5), **fits}
    source = "workers" if r.chance(_WORKERS) else r.weighted(_SOURCES)
    least = 4 if program.model == "mlp" else 2  # leaves at least three rows in a short batch for batch norm
    can_be_short = program.rows >= least and program.accumulate == 1 and source != "endless"
    changes: dict[str, Any] = {"source": source, "batches": r.randint(1, 5), "short": can_be_short and r.chance(0.2)}
    return {**changes, **fits}


def _limits(r: _Random, program: Program) -> dict[str, Any]:
    epochs, steps = r.randint(1, 4), r.randint(1, 14)
    if program.source == "endless":
        return {"steps": steps}
    if program.source == "iterator":  # an iterator can be read only once
        return {"epochs": 1}
    return r.one({"epochs": epochs}, {"steps": steps}, {"epochs": epochs, "steps": steps})


def _evaluation(r: _Random, program: Program) -> dict[str, Any]:
    if r.chance(0.35):
        return {}
    fractions = [] if unknown_length(program) else ["1 epochs", "0.5 epochs"]
    return {
        "evaluate": r.one("default", "default", "never", "1", "2", "3", *fractions),
        "eval_batches": r.randint(1, 3),
        "eval_unknown": not program.compiled and r.chance(0.2),
    }


def _callbacks(r: _Random, program: Program) -> dict[str, Any]:
    names: list[str] = []
    if program.evaluate:
        names += r.some(["early_stopping"], 0.15) or r.some(["restore_best"], 0.15)
        names += r.some(["save_at_evaluations"], 0.15)
        if program.optimizer == "injected":
            names += r.some(["plateau"], 0.6)
    names += r.some(["ema"], 0.2) + r.some(["epoch_mean"], 0.15) + r.some(["save"], 0.2)
    guards = r.some(["nan_guard"], 0.15) or r.some(["spike_guard"], 0.08 if program.source != "iterator" else 0.0)
    names += guards
    r.shuffle(names)
    return {
        "callbacks": tuple(names),
        "counted": _TRAJECTORY if r.chance(0.5) else r.some(_TRAJECTORY, 0.3),
        "bad": r.some(range(program.batches), 0.3) if guards else (),
        "eval_view": "ema" in names and bool(program.evaluate) and r.chance(0.5),
    }


def _asks(r: _Random, program: Program) -> dict[str, Any]:
    asks = tuple(_ask(r, program) for _ in range(r.one(0, 1, 1, 2, 3)))
    traced = tuple(_traced_ask(r) for _ in range(r.one(0, 0, 0, 1)))
    return {"asks": asks, "traced_asks": traced}


def _ask(r: _Random, program: Program) -> Ask:
    event = r.one(*(_TRAJECTORY if program.evaluate else ("EpochBegin", "StepBegin", "StepEnd", "EpochEnd")))
    if r.chance(0.03):
        event = r.one("FitBegin", "Saved")
    kinds = [kind for kind in _ASKABLE[event] if kind != "evaluate" or program.evaluate]
    if program.source == "iterator":
        kinds = [kind for kind in kinds if kind != "rewind"]
    kind = r.choice(kinds)
    # With by_step, end_epoch and evaluate could repeat the event that triggers them, so the run would never end.
    by_step = event in ("StepEnd", "EvalEnd") and kind not in ("end_epoch", "evaluate") and r.chance(0.3)
    at = r.randint(1, 8 if event in ("StepBegin", "StepEnd") else 4)
    if event in ("FitBegin", "Saved") or ((event, kind) in _AT_EACH and r.chance(0.15)):
        at = 0
    return Ask(
        kind=kind,
        event=event,
        at=at,
        by_step=by_step,
        steps=r.one(0, 1, 2, 4) if kind == "rewind" and r.chance(0.9) else 1,
        crosses=r.chance(0.7),
        final_save=not (kind == "stop" and r.chance(0.1)),
        tensor=r.chance(0.3),
    )


def _traced_ask(r: _Random) -> Ask:
    event = r.one("Microbatch", "Gradients", "Updated")
    kind = r.one("stop", "skip_update") if event != "Updated" else "stop"
    return Ask(kind=kind, event=event, at=r.randint(1, 10), final_save=r.chance(0.9))


def _running(r: _Random, program: Program) -> dict[str, Any]:
    begins = "StepBegin" in program.counted or any(ask.event == "StepBegin" for ask in program.asks)
    return {
        "snapshot_every": r.one(None, 1, 2, 3),
        "snapshots": r.one(1, 2, 3, 8),
        "snapshots_on_host": r.chance(0.1),
        "rewind_limit": r.one(1, 2, 3),
        "steps_per_call": 1 if begins else r.one(1, 1, 2, 3),
        "lag": r.one(0, 0, 1),
        "donate": r.chance(0.4),
        "observed": r.chance(0.85),
        "alternates": r.chance(0.2),
        "reuses": r.chance(0.25) and program.source != "iterator",
        "writers": r.some(["jsonl", "csv"], 0.35),
        "write_every": r.one(1, 1, 1, 2),
    }


def _saving(r: _Random, program: Program) -> dict[str, Any]:
    if r.chance(0.08):
        return {"saves": False}
    saved = any(ask.event == "Saved" for ask in program.asks)
    return {
        "save_keep": r.one(None, 1, 2, 3),
        "save_keep_every": r.one(None, None, 2),
        "save_best": bool(program.evaluate) and r.chance(0.3),
        # Background saves complete at unpredictable events, so requests at Saved would not be reproducible.
        "background": r.chance(0.6) and not saved,
    }


def _cuts(r: _Random, program: Program) -> dict[str, Any]:
    if not program.saves or depends_on_sessions(program):
        return {}
    return {"cuts": tuple(_cut(r, program) for _ in range(r.one(0, 1, 1, 1, 2, 2, 3)))}


def _cut(r: _Random, program: Program) -> Cut:
    cut = _undamaged(r, program)
    # With a damaged checkpoint a rewind would restore a different step, so rewinding programs get no damage.
    return dataclasses.replace(cut, damage=True) if r.chance(0.06) and not rewinds(program) else cut


def _undamaged(r: _Random, program: Program) -> Cut:
    how = r.weighted(_HOWS)
    if how == "epochs" and program.epochs is not None and program.steps is None:
        return Cut("epochs", at=r.randint(0, program.epochs))
    if how in ("SIGINT", "kill") and program.source != "prefetched" and r.chance(0.15):
        return Cut(how, "time", at=r.randint(1, 60))
    if how == "leave" and program.observed:
        return Cut("leave", at=r.randint(1, 40))
    if how in ("limit", "leave", "epochs"):
        # A limit shifts the boundaries of multi-step calls, so the result must not depend on them.
        # The default evaluation at the end of the run would also happen at the limit.
        fits = program.is_call_neutral and program.evaluate != "default"
        return Cut("limit", at=r.randint(0, 12)) if fits else Cut("SIGINT", "eval_data", at=1)
    if how == "kill" and (program.compiled or program.source in ("workers", "prefetched")):
        how = "error"
    inside = ["data"] * (program.source not in ("workers", "list")) + ["step", "eval_step"] * (not program.compiled)
    inside += ["eval_data"]
    where: str = r.one(*inside, *(["observer", "callback"] * 2 if program.observed else []))
    if where not in ("observer", "callback"):
        return Cut(how, where, at=r.randint(1, 14))
    if r.chance(0.5):
        return Cut(how, where, at=r.randint(1, 40))
    if r.chance(0.15):
        return Cut(how, where, event=r.one("FitBegin", "Restored", "Saved", "FitEnd"))
    events = [kind for kind in _TRAJECTORY if kind != "StepBegin" or where == "observer" or program.steps_per_call == 1]
    return Cut(how, where, at=r.randint(1, 8), event=r.choice(events))
