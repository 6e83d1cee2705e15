"""The command ``fxtrain train``, which runs what a configuration or a function describes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
import tyro

import fxtrain as fx
from fxtrain.cli._arguments import Common, parse, read_text
from fxtrain.cli._calls import Call
from fxtrain.cli._errors import CommandError, ConfigError, message_of
from fxtrain.cli._factories import read
from fxtrain.cli._names import add_current_folder, function_at
from fxtrain.cli._overrides import override
from fxtrain.cli._ranks import check_parallel, is_main, joined, launch, num_processes, of_main
from fxtrain.cli._run_folder import make_folder, read_config, refuse_changes, write_config
from fxtrain.cli._training import DEFINING, training
from fxtrain.cli._yaml import dump, load
from fxtrain.core import describe, did_you_mean
from fxtrain.loop._plan import Plan

_FUNCTION = "function"
_LENGTH = ("steps", "epochs")
_OF_FIT = ("state", "step", "data", *(field.name for field in dataclasses.fields(Plan) if field.name != "resume"))
_WHY_FIXED = (
    "Model, optimizer, loss, data, seed and precision define the run. Its length, callbacks, observers, evaluations "
    "and checkpoints may change. Omit the others, or start a new run."
)
_WHY_FIXED_ARGUMENTS = (
    "Of the arguments of a function, only steps and epochs may change. Omit the change, or start a new run."
)


@dataclasses.dataclass(frozen=True)
class Options(Common):
    """Trains what a YAML file or a Python function describes. The run resumes exactly after Ctrl-C or a kill.

    A file has the arguments of a training. Objects are factories and their arguments, found by bare names in
    fxtrain.optim, fxtrain.callbacks, torch.nn and so on, or by dotted names anywhere:

      model: {my_package.Classifier: {width: 64}}
      optimizer: {adamw: {learning_rate: {cosine: {init_value: 1e-3, decay_steps: 1000}}}}
      loss: my_package.loss_fn
      data: {batches: {source: {my_package.load: {split: train}}, batch_size: 64}}
      callbacks: [{early_stopping: {metric: loss, patience: 3}}]
      epochs: 10

    The keys are the arguments of fxtrain.init, train_step, eval_step, compile and fit. --print-config shows them.

    A function returns a dict of the arguments of fxtrain.fit. Its own arguments are set by KEY=VALUE, or by a file
    with the key "function".

    In the shell, for example:

      fxtrain train run.yaml epochs=20 "callbacks[0].early_stopping.patience=5"
      fxtrain train my_package.runs:baseline width=128
      fxtrain train run.yaml --print-config > complete.yaml
      torchrun --standalone --nproc-per-node 2 -m fxtrain train run.yaml parallel=ddp
      fxtrain train --resume runs/train-20250101-120000 epochs=40
    """

    target: Annotated[
        str | None, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG|MODULE:FUNCTION|FILE.py:FUNCTION")
    ] = None
    """A YAML file, or a function: MODULE:FUNCTION or FILE.py:FUNCTION. With --resume, that of the run by default."""
    changes: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """Changes of the configuration, such as optimizer.adamw.learning_rate=1e-3. Values are YAML."""
    config: pathlib.Path | None = None
    """A YAML file with the arguments of the function. Without a function, the same as CONFIG."""
    runs: pathlib.Path = pathlib.Path("runs")
    """The folder in which the folder of the run is created."""
    resume: pathlib.Path | None = None
    """The folder of a run to resume."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the configuration with all defaults, which reproduces the run, and stop."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    options = _options(arguments)
    add_current_folder()
    saved = None if options.resume is None else read_config(options.resume, "train")
    call = _read(_config(options, saved))
    complete = _complete(call)
    if options.print_config:
        sys.stdout.write(dump(complete))
        return 0
    if saved is not None and options.resume is not None:
        _refuse_changes(options.resume, _complete(_read(copy.deepcopy(saved))), complete)
    if _FUNCTION not in complete:
        check_parallel(complete["parallel"], f"train {options.target or f'--resume {options.resume}'}", "parallel=")
    with _seeded(complete.get("seed", 0)):
        if options.resume is None:
            call.make_arguments()
        return _Session(call, complete, options).run()


class _Session:
    """One session of a run. Its folder is removed if the run fails before it begins."""

    def __init__(self, call: Call, complete: dict[str, Any], options: Options) -> None:
        self.call, self.complete = call, complete
        self.resumes = options.resume is not None
        self.creates_parent = not options.runs.exists()
        self.folder = options.resume or of_main(
            joined("ddp") if num_processes() > 1 else None,
            "the folder of the run",
            lambda: make_folder(options.runs, "train", complete),
        )
        self.has_begun = False
        call.context.folder = self.folder.absolute()

    def run(self) -> int:
        try:
            given = _of_fit(self.call)
            result = fx.fit(**self._with_folder(given))
        except BaseException:
            if is_main() and not self.has_begun and not self.resumes:
                shutil.rmtree(self.folder)
                if self.creates_parent:
                    with contextlib.suppress(OSError):  # another run has begun in it
                        self.folder.parent.rmdir()
            raise
        print(f"\nrun         {self.folder}")
        print(f"resume      {launch(f'train --resume {self.folder}')}")
        print(f"report      fxtrain report {self.folder}")
        return result.exit_code

    def _with_folder(self, given: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments of ``fit`` with the records of the run in its folder."""
        about = given.get("run") or fx.RunInfo()
        given = {name: value for name, value in given.items() if name not in ("observers", "run")}
        given.setdefault("progress", True)
        if given.get("checkpointer") is None:
            given["checkpointer"] = fx.checkpointer(self.folder / "checkpoints")
        observers = [
            fx.observers.write(fx.writers.jsonl(self.folder / "metrics.jsonl"), every=10),
            fx.observers.record_run(self.folder),
            fx.observers.summary(file=self.folder / "summary.txt"),
            self._begin,
            *_observers(self.call.make()),
        ]
        facts = {"name": self.folder.name, **about.given()}
        run = fx.RunInfo(**facts, config={**self.complete, **about.config})  # pyright: ignore[reportArgumentType]
        return {**given, "observers": observers, "run": run, "resume": self.resumes}

    def _begin(self, state: fx.TrainState, event: fx.FitBegin, control: fx.Control) -> None:
        self.has_begun = True
        print(f"run         {self.folder}\n", flush=True)
        if self.resumes:
            write_config(self.folder, self.complete)


def _options(arguments: Sequence[str]) -> Options:
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and name.replace("_", "-") not in _OPTIONS:
            remedy = did_you_mean(name, _OPTIONS) or f" A key of the configuration has no dashes: {name}=VALUE."
            raise CommandError(f"expected one of the options --{', --'.join(_OPTIONS)}, got {argument}.{remedy}")
    options = parse(Options, "train", arguments)
    if options.target is not None and _is_change(options.target):
        options = dataclasses.replace(options, target=None, changes=(options.target, *options.changes))
    if options.target is None and options.resume is None and options.config is None:
        raise CommandError("expected a YAML file or a function MODULE:FUNCTION, got none. See fxtrain train --help.")
    return options


_OPTIONS = ("config", "runs", "resume", "print-config", "debug", "help")


def _is_change(text: str) -> bool:
    return "=" in text and not pathlib.Path(text).exists()


def _config(options: Options, saved: Mapping[str, Any] | None) -> dict[str, Any]:
    target, file = options.target, options.config
    function = {_FUNCTION: target} if target is not None and ":" in target and not pathlib.Path(target).exists() else {}
    if target is not None and not function:
        if file is not None:
            raise CommandError(f"expected one configuration, got {target} and --config {file}. Give one of them.")
        file = pathlib.Path(target)
        if file.suffix == ".py":
            raise CommandError(f"expected YAML in {file}, got a Python file. Name its function: {file}:FUNCTION.")
    if file is not None:
        config = load(read_text(file), str(file))
        if not isinstance(config, dict):
            raise ConfigError(f"expected a mapping in {file}, got {describe(config)}. Write key: value.")
    else:
        config = {} if function or saved is None else copy.deepcopy(dict(saved))
    config |= function
    override(config, options.changes)
    return config


def _read(config: dict[str, Any]) -> Call:
    if _FUNCTION not in config:
        return read(config, training)
    target = config[_FUNCTION]
    function = function_at(target) if isinstance(target, str) else target
    if not callable(function):
        raise ConfigError(f"expected {_FUNCTION} to be MODULE:FUNCTION, got {describe(target)}. Name a function.")
    return read({name: value for name, value in config.items() if name != _FUNCTION}, function, str(target))


def _complete(call: Call) -> dict[str, Any]:
    complete = call.complete()
    return complete if call.function is training else {_FUNCTION: call.name, **complete}


def _refuse_changes(folder: pathlib.Path, saved: Mapping[str, Any], complete: Mapping[str, Any]) -> None:
    if _FUNCTION in complete or _FUNCTION in saved:
        fixed, why = {*saved, *complete} - {*_LENGTH}, _WHY_FIXED_ARGUMENTS
    else:
        fixed, why = DEFINING, _WHY_FIXED
    refuse_changes(folder, saved, complete, fixed=frozenset(fixed), why=why)


def _of_fit(call: Call) -> dict[str, Any]:
    """Returns the arguments of ``fit``, checked as far as they can be before the run."""
    given = call.make()
    what = f"expected {call.name} to return the arguments of fxtrain.fit"
    if not isinstance(given, Mapping):
        raise CommandError(f"{what}, got {describe(given)}. Return dict(state=..., step=..., data=..., steps=...).")
    for name in given:
        if name not in _OF_FIT:
            raise CommandError(f"{what}, got {name!r}.{did_you_mean(name, _OF_FIT) or ' Remove it.'}")
    size = num_processes()
    if size > 1 and given.get("mesh") is None:
        raise CommandError(
            f"{what} with a mesh in {size} processes, got none, which would train {size} times. Add "
            "mesh=fxtrain.distributed.mesh() to them and to train_step, or start the command without torchrun."
        )
    for name in ("state", "step", "data"):
        if name not in given:
            raise CommandError(f"{what}, got no {name}. Return dict(state=..., step=..., data=..., steps=...).")
    try:
        Plan(**{name: value for name, value in given.items() if name not in ("state", "step", "data")})
    except (TypeError, ValueError) as error:
        raise CommandError(message_of(error)) from error
    return dict(given)


def _observers(given: Mapping[str, Any]) -> list[Any]:
    observers = given.get("observers", ())
    return [observers] if callable(observers) else list(observers)


@contextlib.contextmanager
def _seeded(seed: object) -> Iterator[None]:
    """Seeds torch's global generator, from which modules initialize their weights. Restores it at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed if isinstance(seed, int) else 0)
        yield
