"""The observer that writes the weights of a run for other programs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

from fxtrain.checkpoint import CheckpointError
from fxtrain.core import (
    Control,
    EvalEnd,
    FitBegin,
    FitEnd,
    LoopEvent,
    Observer,
    StepEnd,
    TrainState,
    check_choice,
    warn,
)
from fxtrain.core._rank import rank
from fxtrain.core._slots import MEMBERS
from fxtrain.disk import make_folder, replace_file, replace_folder, restore_replaced
from fxtrain.fold import When, as_trigger
from fxtrain.observers._artifacts import ArtifactLog, best_step
from fxtrain.values import Artifact, jsonable, kind_of, plain_number, published
from fxtrain.writers import Writer

if TYPE_CHECKING:
    from fxtrain.interop._save_weights import Format

_METRICS = "metrics.json"


def export(
    folder: str | os.PathLike[str],
    at: str | When = "best",
    *,
    best: str = "save_best",
    format: Format = "auto",  # noqa: A002 -- the word of the field
    view: Callable[[TrainState], TrainState] | None = None,
    convert: Callable[[Any], Any] | None = None,
    writers: Sequence[Writer] = (),
) -> Observer:
    """Writes the weights to a folder at the best evaluation, at the end or at chosen steps, as ``save_weights`` does.

    The folder is complete whenever it exists. Another export replaces it, unless its name has ``{step}``. It also has
    ``metrics.json`` with the step, the epoch and the scalars published at that event and at the last evaluation, by
    names such as ``eval/loss``. Training waits until the files are written. A failed export, such as one to a full
    disk, causes a warning, and later ones are tried.

    With several processes, only rank 0 writes.

    Args:
        folder: The folder to write. ``"best-{step}"`` keeps the exports of all steps.
        at: ``"best"``, at each ``EvalEnd`` that improves the metric of a callback; ``"end"``, at ``FitEnd``, after
            ``restore_best``; or when to export: a number of steps or a trigger, evaluated at ``StepEnd``.
        best: For ``"best"``, the slot of ``save_best``, ``restore_best`` or ``early_stopping``.
        format: As in ``save_weights``: ``"auto"``, ``"safetensors"``, ``"state_dict"`` or ``"save_pretrained"``.
        view: Maps the state to the one that is written: ``lambda state: fx.callbacks.averaged(state, "ema")``. A batch
            of runs needs one: ``lambda state: fx.ensemble.member(state, 0)``.
        convert: Maps a copy of the module to the one that is written, as in ``save_weights``.
        writers: Writers that get each export as the artifact ``model``, with the alias ``best`` for ``"best"``.

    Raises:
        TypeError: ``at`` is neither a string, an int nor a trigger.
        ValueError: ``at`` or ``format`` is unknown. At run time, if there is no slot ``best``, or no ``view`` for a
            batch of runs.

    Example:
        >>> import json, pathlib, tempfile, torch, fxtrain as fx
        >>> loss_fn = lambda model, batch: model(batch).square().mean()
        >>> tx, batch = fx.optim.sgd(0.1), torch.ones(2, 3)
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> result = fx.fit(
        ...     fx.init(torch.nn.Linear(3, 1), tx), fx.train_step(loss_fn, tx), [batch], epochs=2,
        ...     eval_step=fx.eval_step(loss_fn), eval_data=[batch],
        ...     callbacks=fx.callbacks.early_stopping("loss", patience=1),
        ...     observers=fx.observers.export(folder / "best", best="early_stopping"),
        ... )
        >>> json.loads((folder / "best" / "metrics.json").read_text())["step"]
        2
        >>> state = fx.load_weights(result.state, folder / "best")
    """
    # Imported here and below, because only runs that export weights need the other formats.
    from fxtrain.interop._save_weights import Format

    check_choice("format", format, get_args(Format))
    options = {"format": format, "convert": convert}
    if isinstance(at, str):
        check_choice("at", at, ("best", "end"))
        return Export(folder, at, best, view, options, writers)
    return ExportAtSteps(folder, as_trigger(at, "at"), best, view, options, writers)


class Export:
    """Writes weights at evaluations or at the end. Created by ``export``."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        at: str | Callable[[Any], Any],
        best: str,
        view: Callable[[TrainState], TrainState] | None,
        options: dict[str, Any],
        writers: Sequence[Writer],
    ) -> None:
        self._folder, self._at, self._best = os.fspath(folder), at, best
        self._view, self._options = view, options
        self._log = ArtifactLog("export", writers)
        self._evaluated: dict[int, tuple[float | None, dict[str, Any]]] = {}  # epoch and metrics by step
        self._failure: Exception | None = None
        self.flush, self.close = self._log.flush, self._log.close

    def __call__(self, state: TrainState, event: FitBegin | EvalEnd | FitEnd, control: Control) -> None:
        if rank() != 0:
            return
        match event:
            case FitBegin():
                self._begin(state, event)
            case EvalEnd():
                self._evaluated[event.step] = event.epoch, self._scalars(event, control)
                if self._at == "best" and best_step(self._of_run(state), self._best) == event.step:
                    self._export(state, event, event.step, ("best",))
            case FitEnd() if self._at == "end":
                from fxtrain.callbacks._restore_best import RestoreBestState

                # The parameters may be those of an earlier step.
                slots = self._of_run(state).slots.values()
                restored = [int(slot.step) for slot in slots if isinstance(slot, RestoreBestState)]
                self._export(state, event, restored[-1] if restored and restored[-1] >= 0 else event.step, ())
            case _:
                pass

    def take_failure(self) -> Exception | None:
        """Returns the error of a failed export since the last call, or of a writer."""
        failure, self._failure = self._failure, None
        return failure or self._log.take_failure()

    def _begin(self, state: TrainState, event: FitBegin) -> None:
        self._log.begin(event)
        if MEMBERS in state.slots and self._view is None:
            raise ValueError(
                "expected export to have a view that takes one run out of a batch of runs, got none. Choose a member: "
                "export(folder, view=lambda state: fxtrain.ensemble.member(state, 0))."
            )
        if self._at == "best":
            best_step(self._of_run(state), self._best)  # raises before the first step
        if "{step}" not in self._folder:
            restore_replaced(Path(self._folder))
            self._refuse_other_folder(Path(self._folder))

    def _of_run(self, state: TrainState) -> TrainState:
        """Returns the state whose slots count: that of a run, or of the member that the view takes out of a batch."""
        return self._view(state) if self._view is not None and MEMBERS in state.slots else state

    def _refuse_other_folder(self, folder: Path) -> None:
        if folder.exists() and not (folder / _METRICS).exists():
            raise FileExistsError(
                f"expected a new folder or an earlier export, got {folder}, which has no {_METRICS}. Choose another "
                "name, because an export replaces the folder."
            )

    def _scalars(self, event: LoopEvent, control: Control) -> dict[str, Any]:
        return {
            name: plain_number(value) for name, value in published(event, control).items() if kind_of(value) is float
        }

    def _export(
        self,
        state: TrainState,
        event: LoopEvent,
        step: int,
        aliases: tuple[str, ...],
        metrics: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        folder = Path(self._folder.replace("{step}", str(step)))
        try:
            self._write(state, folder, self._facts(event, step, metrics))
        except (OSError, CheckpointError) as error:
            self._failure = self._failure or error
            warn(
                f"The weights of step {step} could not be exported to {folder}: {error} Later exports are tried.",
                RuntimeWarning,
            )
            return
        self._log.add(event, step, "model", Artifact(folder, "model", aliases))

    def _facts(self, event: LoopEvent, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        if step == event.step:
            _, evaluated = next(reversed(self._evaluated.values()), (None, {}))
            return {"step": step, "epoch": event.epoch, "metrics": {**evaluated, **metrics}}
        epoch, evaluated = self._evaluated.get(step, (None, {}))  # unknown if it was in an earlier session
        return {"step": step, "epoch": epoch, "metrics": evaluated}

    def _write(self, state: TrainState, folder: Path, facts: dict[str, Any]) -> None:
        from fxtrain.interop._save_weights import save_weights

        self._refuse_other_folder(folder)
        new = folder.with_name(f".new-{folder.name}")
        shutil.rmtree(new, ignore_errors=True)  # of a killed session
        make_folder(folder.parent)
        save_weights(new, state if self._view is None else self._view(state), **self._options)
        replace_file(new / _METRICS, json.dumps(jsonable(facts), indent=2).encode() + b"\n")
        replace_folder(new, folder)


class ExportAtSteps(Export):
    """Writes weights after steps. Created by ``export`` with a trigger."""

    def __call__(self, state: TrainState, event: FitBegin | StepEnd | EvalEnd, control: Control) -> None:
        if not isinstance(event, StepEnd):
            super().__call__(state, event, control)
        elif rank() == 0 and callable(self._at) and self._at(event):
            self._export(state, event, event.step, (), self._scalars(event, control))
