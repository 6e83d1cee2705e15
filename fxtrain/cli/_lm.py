"""The command ``fxtrain lm``, which trains a small byte-level transformer from scratch and compares it to baselines."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import fxtrain as fx
from fxtrain.callbacks._generation_options import generation_options
from fxtrain.callbacks._textgen import continuations
from fxtrain.cli import _baselines as baselines
from fxtrain.cli._arguments import Configurable, parse, read_options, saved_options
from fxtrain.cli._corpus import check_fits, read_corpus
from fxtrain.cli._device import device_named
from fxtrain.cli._errors import CommandError, ConfigError, FailedError
from fxtrain.cli._ranks import Parallel, check_parallel, is_main, joined, launch, num_processes, of_main, placed
from fxtrain.cli._run_folder import (
    CONFIG,
    make_folder,
    read_config,
    read_json,
    refuse_changes,
    write_config,
    write_json,
)
from fxtrain.cli._transformer import PLAN, Config, Transformer
from fxtrain.core import pluralize
from fxtrain.data import Source

STEPS = 1000  # default if neither steps nor epochs are given
MUON_LR_RATIO = 20 / 3  # to AdamW's learning rate
PROMPT = "def "
TEMPERATURE = 0.8
_CORPUS = "corpus.json"
_MAX_OPTION = 2**31  # for integers; a product of two fits into 64 bits
_FIXED = frozenset(
    ("dataset", "steps", "epochs", "batch_size", "length", "layers", "width", "heads", "dropout", "lr", "seed")
)
_WHY_FIXED = (
    "Text, model, optimizer and length, over which the learning rate decays, are those of the whole run. Omit it, or "
    "start a new run."
)


@dataclasses.dataclass(frozen=True)
class Options(Configurable):
    """Trains a small byte-level transformer on real text, from scratch.

    Example: fxtrain lm --dataset "src/**/*.py" --epochs 3 --early-stopping

    The folder of the run has its metrics, its checkpoints, and all options in config.yaml, for --config. Ctrl-C saves
    the run, and fxtrain lm --resume FOLDER continues it.
    """

    dataset: Annotated[str | None, tyro.conf.arg(aliases=["--text"])] = None
    """A file, a folder, a glob, or a name: stdlib (the source of the Python standard library, the default), sklearn
    (scikit-learn's descriptions of its data sets), wikitext[:CONFIG], or datasets:NAME[:CONFIG]. The last two are read
    by the package datasets."""
    steps: int | None = None
    """Total number of steps. Defaults to 1000 without --epochs. If both are given, the shorter applies."""
    epochs: int | None = None
    """Total number of epochs."""
    batch_size: int = 16
    """Sequences per batch."""
    length: int = 128
    """Bytes per sequence."""
    layers: int = 4
    """Number of transformer blocks."""
    width: int = 128
    """Channels of the residual stream."""
    heads: int = 4
    """Attention heads per block."""
    dropout: float = 0.0
    """Dropout probability in training."""
    lr: float = 3e-3
    """Peak learning rate of AdamW; Muon's is 20/3 of it. Warmup takes a tenth of the steps; cosine decay follows."""
    seed: int = 0
    """Seed of weights, data order and dropout."""
    eval_interval: int = 200
    """Steps between evaluations, each on a part of the validation text."""
    snapshot_interval: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Number of checkpoints kept: the newest ones. The one with the lowest validation loss is kept as well."""
    early_stopping: bool = False
    """Stop when the validation loss stops improving."""
    patience: Annotated[int, tyro.conf.arg(aliases=["--early-stop-patience"])] = 5
    """With --early-stopping, how long without improvement before the run stops, in units of --patience-unit."""
    patience_unit: Literal["evaluations", "steps", "epochs"] = "evaluations"
    """The unit of --patience."""
    min_delta: Annotated[float, tyro.conf.arg(aliases=["--early-stop-min-delta"])] = 0.0
    """With --early-stopping, minimum decrease of the validation loss, in nats per byte, that is an improvement."""
    restore_best: bool = True
    """With --early-stopping, end with the best weights instead of the last."""
    gradient_monitor: bool = False
    """Log gradient norms and gradient flow per layer at each checkpoint."""
    gradient_monitor_interval: int | None = None
    """With --gradient-monitor, also log them at this interval of steps."""
    monitor_at_epochs: bool = False
    """With --gradient-monitor, also log them at the end of each epoch."""
    compile: bool = True
    """Compile each step into one graph. This takes up to a minute and makes steps faster."""
    device: str = "auto"
    """The device: cpu, cuda, or auto, which uses cuda if available."""
    parallel: Parallel = "none"
    """How several processes, which torchrun starts, train one model: ddp splits each batch among them. fsdp also splits
    large parameters and their optimizer state. tp splits the attention heads and the perceptrons of each block. The
    results are those of one process up to rounding."""
    runs: pathlib.Path = pathlib.Path("runs")
    """The folder in which the folder of the run is created."""
    resume: pathlib.Path | None = None
    """The folder of a run to resume, with its options. Options of evaluations, checkpoints, monitors, early stopping,
    compilation, device and parallelism may change; the others cannot."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    before = torch.are_deterministic_algorithms_enabled()
    # Threads sum the embedding's gradient in a nondeterministic order by default, which would change the last bits of a
    # resumed run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return _Job(_options(arguments)).run()
    finally:
        torch.use_deterministic_algorithms(before)


def _options(arguments: Sequence[str]) -> Options:
    """Returns the given options, or those of the run to resume."""
    given = parse(Options, "lm", [each for each in arguments if each.replace("_", "-") != "--print-config"])
    if given.resume is None:
        return parse(Options, "lm", arguments)
    try:
        options = read_options(Options, read_config(given.resume, "lm"), CONFIG, resume=given.resume)
    except ConfigError as error:
        raise FailedError(
            f"expected the options of this version of fxtrain in {given.resume / CONFIG}. {error} Resume with the "
            "version that started the run, or start a new run."
        ) from None
    again = parse(Options, "lm", arguments, default=options)
    refuse_changes(given.resume, saved_options(options), saved_options(again), fixed=_FIXED, why=_WHY_FIXED)
    return again


class _Job:
    """One session of a run, from its options to its report."""

    def __init__(self, options: Options) -> None:
        self.options = options
        _validate(options)
        self.mesh = joined(options.parallel)
        self.device = device_named(options.device, "--device", self.mesh)
        self.corpus = read_corpus(options.dataset)
        if self.mesh is not None and len(set(self.mesh.gather(self.corpus.digest, "digests of the text"))) > 1:
            raise FailedError("expected the same text in all processes, got several. Give all the same files.")
        check_fits(self.corpus, batch_size=options.batch_size, length=options.length)
        self.data = fx.data.windows(self.corpus.train, options.length, options.batch_size, seed=options.seed)
        self.steps = _steps(options, self.data.epoch_length)
        self.folder = of_main(self.mesh, "the folder of the run", self._start_folder)
        self.checkpoints = fx.checkpointer(self.folder / "checkpoints", keep=options.keep, best="loss")
        if is_main() and options.resume is not None and not self.checkpoints.steps():
            print(f"{self.folder} has no checkpoint yet, so the run starts at its first step.", file=sys.stderr)

    def run(self) -> int:
        options = self.options
        self._print_header()
        tx = self._transform()
        start = fx.init(self._model(), tx, seed=options.seed, device=self.device)
        state = placed(start, self.mesh, options.parallel, PLAN)
        step = fx.train_step(_cross_entropy, tx, mesh=self.mesh)
        eval_step = fx.eval_step(_cross_entropy, mesh=self.mesh)
        if options.compile:
            step, eval_step = fx.compile(step), fx.compile(eval_step)
        tokens = options.batch_size * options.length
        callbacks = [
            self._monitors(),
            fx.callbacks.throughput(tokens=tokens),
            fx.callbacks.textgen([PROMPT, "import "], Bytes(), length=options.length, temperature=TEMPERATURE),
            fx.callbacks.save(every=options.snapshot_interval),
        ]
        if options.early_stopping:
            stopping = fx.callbacks.early_stopping(
                "loss", patience=options.patience, unit=options.patience_unit, min_delta=options.min_delta
            )
            callbacks += [fx.callbacks.stop_on_divergence("loss"), stopping]
            if options.restore_best:
                callbacks.append(fx.callbacks.restore_best("loss"))
        bits = {"bits/byte": lambda metrics: metrics["loss"] / math.log(2)}
        result = fx.fit(
            state,
            step,
            fx.data.prefetch(self.data if self.mesh is None else fx.distributed.rows(self.data, self.mesh)),
            callbacks=callbacks,
            eval_step=eval_step,
            eval_data=self._part_of_validation(),
            eval_when=lambda event: event.step % options.eval_interval == 0 or event.step == self.steps,
            steps=self.steps,
            checkpointer=self.checkpoints,
            resume=options.resume is not None,
            observers=[
                fx.observers.progress(rate=("tokens", tokens), extra=bits),
                fx.observers.write(
                    fx.writers.jsonl(self.folder / "metrics.jsonl"),
                    fx.writers.tensorboard(self.folder),
                    every=10,
                ),
                fx.observers.record_run(self.folder),
                fx.observers.summary(file=self.folder / "summary.txt"),
            ],
            mesh=self.mesh,
            run=fx.RunInfo(project="fxtrain lm", name=self.folder.name, config=saved_options(options)),
        )
        if not result.exit_code:
            self._report(result.state, eval_step)
        self._print_commands()
        return result.exit_code

    def _model(self) -> Transformer:
        options = self.options
        shape = Config(options.layers, options.width, options.heads, options.length, options.dropout)
        return Transformer(shape, torch.Generator().manual_seed(options.seed))

    def _transform(self) -> fx.optim.GradientTransformation:
        """Returns Muon for block matrices and AdamW for embedding and norms, with warmup and cosine decay."""

        def schedule(peak: float) -> fx.schedules.Schedule:
            warmup = max(1, self.steps // 10)
            decay = max(self.steps, warmup + 1)  # a run of one step consists of warmup
            return fx.schedules.warmup_cosine_decay(
                init_value=0.0, peak_value=peak, warmup_steps=warmup, decay_steps=decay, end_value=peak / 20
            )

        return fx.optim.muon(
            schedule(MUON_LR_RATIO * self.options.lr),
            weight_decay=0.1,
            muon_mask=_is_block_matrix,
            adam_learning_rate=schedule(self.options.lr),
            adam_b2=0.95,
        )

    def _monitors(self) -> fx.Composed:
        """Returns the gradient monitors, which publish at checkpoints so that each checkpoint includes its values."""
        options = self.options
        if not options.gradient_monitor:
            return fx.compose()
        due = fx.every(options.gradient_monitor_interval or options.snapshot_interval)
        if options.monitor_at_epochs:
            due = due | fx.every(epochs=1)
        return fx.compose(
            fx.callbacks.grad_norms(layer="*", publish=due, at_saves=True),
            fx.callbacks.grad_flow(publish=due, at_saves=True),
        )

    def _validation(self) -> Source:
        """Returns windows over the validation text, in order."""
        size = min(64, (len(self.corpus.validation) - 1) // self.options.length)
        return fx.data.windows(self.corpus.validation, self.options.length, size, shuffle=False)

    def _part_of_validation(self, batches: int = 16) -> Source:
        """Returns a few batches spread evenly over the validation text, for cheap evaluations during training."""
        whole = self._validation()
        length = whole.epoch_length
        if length is None or batches >= length:
            return whole
        return fx.data.sequence([whole[index * length // batches] for index in range(batches)])

    def _print_header(self) -> None:
        options = self.options
        count = sum(leaf.numel() for leaf in self._model().parameters())
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        ranks = "" if self.mesh is None else f", {self.mesh.world_size} processes"
        how = "each step compiled into one graph" if options.compile else "not compiled"
        print(f"corpus      {self.corpus.description}")
        print(f"model       {pluralize(options.layers, 'layer')} of width {options.width}: {count:,} parameters")
        print(f"device      {self.device}{threads}{ranks}, {how}")
        print(f"run         {self.folder}\n", flush=True)

    def _report(self, state: fx.TrainState, eval_step: Callable[..., fx.StepOutput]) -> None:
        whole = self._validation()
        # All models are measured on the bytes of the full batches.
        text = self.corpus.validation[: whole.epoch_length * whole[0]["x"].numel() + 1]
        print("\nevaluating  this model and baselines on the validation text", flush=True)
        ours = fx.evaluate(state, eval_step, whole, mesh=self.mesh)["loss"] / math.log(2)
        if self.mesh is not None:
            state = fx.distributed.gathered(state)  # for the sample
        if not is_main():
            return
        marks = {
            "this model": ours,
            "xz -9": baselines.xz_bits(text),
            "trigrams": baselines.trigram_bits(self.corpus.train, text),
            "unigrams": baselines.unigram_bits(self.corpus.train, text),
        }
        write_json(self.folder / "result.json", {"bits_per_byte": marks, "step": int(state.step)})
        print(f"validation  bits per byte of {len(text) / 1e6:.2f} MB held out:")
        for name, value in marks.items():
            print(f"            {value:6.3f}  {name}")
        print("\nsample")
        for line in self._sample(state).splitlines():
            print(f"  | {line}")

    def _sample(self, state: fx.TrainState) -> str:
        options = generation_options(None, max_tokens=240, temperature=TEMPERATURE)
        prompts, shared = [Bytes().encode(PROMPT)], {"length": self.options.length, "tokenizer": Bytes()}
        [[generated]] = continuations(state, int(state.step), prompts, options, **shared)
        return PROMPT + Bytes().decode(generated)

    def _print_commands(self) -> None:
        print(f"\nrun         {self.folder}")
        print(f"resume      {launch(f'lm --resume {self.folder}')}")
        print(f"report      fxtrain report {self.folder}")

    def _start_folder(self) -> pathlib.Path:
        """Creates a new folder, or checks that of the run to resume."""
        folder, options = self.options.resume, saved_options(self.options)
        if folder is None:
            folder = make_folder(self.options.runs, "lm", options)
            write_json(folder / _CORPUS, {"digest": self.corpus.digest, "description": self.corpus.description})
            return folder
        if read_json(folder, _CORPUS, "lm").get("digest") != self.corpus.digest:
            raise CommandError(
                f"expected the text that {folder} was started with, got another one ({self.corpus.description}). "
                "Restore the text, or start a new run."
            )
        write_config(folder, options)
        return folder


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def encode(self, text: str, /) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int], /) -> str:
        return bytes(tokens).decode(errors="replace")


def _cross_entropy(model: Callable[[Tensor], Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Returns the cross entropy in nats per byte."""
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


def _is_block_matrix(path: Sequence[object], leaf: Tensor) -> bool:
    return leaf.ndim == 2 and "blocks" in path


def _validate(options: Options) -> None:
    whole = ("steps", "epochs", "batch_size", "length", "eval_interval", "snapshot_interval", "keep", "patience")
    for name in (*whole, "gradient_monitor_interval"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise CommandError(f"expected --{name.replace('_', '-')} to be at least 1, got {value}.")
        if value is not None and value > _MAX_OPTION:
            raise CommandError(f"expected --{name.replace('_', '-')} to be at most {_MAX_OPTION}, got {value}.")
    if not options.lr > 0:
        raise CommandError(f"expected --lr to be above 0, got {options.lr}.")
    if not math.isfinite(options.lr):
        raise CommandError("expected --lr to be finite, got inf.")
    if not 0 <= options.min_delta < math.inf:
        raise CommandError(f"expected --min-delta to be finite and at least 0, got {options.min_delta}.")
    if not -(2**63) <= options.seed < 2**63:
        raise CommandError(f"expected --seed to fit in a signed 64-bit integer, got {options.seed}.")
    try:
        Config(options.layers, options.width, options.heads, options.length, options.dropout)
    except ValueError as error:
        raise CommandError(str(error)) from None
    check_parallel(options.parallel, "lm", "--parallel ")
    size = num_processes()
    if options.parallel == "tp" and options.heads % size:
        raise CommandError(
            f"expected --heads to be a multiple of the {size} processes with --parallel tp, got {options.heads}. Start "
            "another number of processes, or use --parallel ddp."
        )


def _steps(options: Options, epoch_length: int | None) -> int:
    by_epochs = None if options.epochs is None else options.epochs * (epoch_length or 1)
    return min((count for count in (options.steps, by_epochs) if count is not None), default=STEPS)
