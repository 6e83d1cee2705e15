"""Trains ``fxtrain lm`` with every callback, and checks that a run killed at random times ends in the same state.

    python -m benchmarks.everything --steps 300 --kills 3

Each session is a separate process, killed by SIGKILL and resumed from its last checkpoint. All leaves of the last state
are compared, except the elapsed seconds in ``time_limit`` and ``throughput``, which differ between any two runs.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import xxhash

import fxtrain as fx
from benchmarks import lm
from fxtrain import callbacks as cb
from fxtrain import optim

CLOCKED = ("time_limit", "throughput")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
    parser.add_argument("--session", type=pathlib.Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.session is not None:
        print(json.dumps(train(given.session, given.steps)))
        return
    moments = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="everything-") as parent:
        whole = session(pathlib.Path(parent, "whole"), given.steps)
        assert whole is not None
        print(f"run without kills: {len(whole)} leaves", flush=True)
        folder, killed, got = pathlib.Path(parent, "killed"), 0, None
        while got is None:
            delay = moments.uniform(0.0, 8.0) if killed < given.kills else None
            got = session(folder, given.steps, kill_after=delay)
            if got is None:
                killed += 1
                step = max(fx.checkpointer(folder).steps())
                print(f"killed {delay:.1f} s after a checkpoint; the last checkpoint has step {step}", flush=True)
    different = sorted(path for path in whole.keys() | got.keys() if whole.get(path) != got.get(path))
    print(f"{killed} kills: {f'different: {different}' if different else 'all leaves are bitwise equal'}")
    raise SystemExit(bool(different) or killed < given.kills)


def session(folder: pathlib.Path, steps: int, kill_after: float | None = None) -> dict[str, str] | None:
    """Runs one session in a process, and returns the digests of its last state, or None if it was killed.

    Args:
        folder: The checkpoint folder.
        steps: Number of steps of the whole run.
        kill_after: Seconds from the session's first new checkpoint to the kill; None lets the session finish.
    """
    command = [sys.executable, "-m", "benchmarks.everything", "--session", str(folder), "--steps", str(steps)]
    checkpoints = fx.checkpointer(folder)
    before = max(checkpoints.steps(), default=0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while kill_after is not None and process.poll() is None:
            if max(checkpoints.steps(), default=0) > before:
                time.sleep(kill_after)
                process.kill()
                process.wait()
                return None
            time.sleep(0.05)
        output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"expected a session to exit with code 0, got {process.returncode}.")
    return json.loads(output.splitlines()[-1])


def train(folder: pathlib.Path, steps: int) -> dict[str, str]:
    """Trains one session, and returns the digest of each leaf of its last state."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(2)
    traced = in_step()
    tx = transform()
    loss_fn = fx.tap(lm.loss_fn, "blocks.?", cb.activation_stats)
    step = fx.compile(fx.train_step(loss_fn, tx, callbacks=traced))
    batches, held_out = lm.data()
    result = fx.fit(
        fx.init(lm.model(), tx),
        step,
        fx.data.prefetch(batches),
        callbacks=fx.compose(traced, in_loop()),
        eval_step=fx.compile(fx.eval_step(lm.loss_fn)),
        eval_data=held_out,
        eval_when=fx.every(40),
        eval_view=lambda state: cb.averaged(state, "ema"),
        steps=steps,
        snapshot_every=5,
        checkpointer=fx.checkpointer(folder, keep=2, best="loss"),
        resume=True,
    )
    assert result.reason == f"reached {steps} steps", result.reason
    state = result.continue_from.replace(
        slots={k: v for k, v in result.continue_from.slots.items() if k not in CLOCKED}
    )
    leaves = zip(fx.tree.paths(state, "state"), fx.tree.leaves(state), strict=True)
    return {
        path: xxhash.xxh3_64_hexdigest(leaf.contiguous().reshape(-1).view(torch.uint8).numpy()) for path, leaf in leaves
    }


def transform() -> optim.GradientTransformation:
    adamw = optim.inject_hyperparams(optim.adamw)(learning_rate=1e-3, weight_decay=0.1)
    slowly = optim.unfreeze(adamw, {"embedding*": 5, "*": 0})
    return optim.chain(
        optim.clip_by_global_norm(1.0),
        optim.lookahead(optim.every_k(slowly, lambda count: 1 + (count > 60)), period=6),
    )


def in_step() -> Any:
    """Returns the callbacks that are part of the compiled step."""
    return fx.compose(
        cb.nan_guard(),
        cb.spike_guard("grad_norm", deviations=8.0, rewind=5),
        cb.ema(0.99, debias=True),
        cb.swa(start=100, every=5),
        cb.epoch_mean("loss"),
        cb.grad_norms(layer="*"),
        cb.grad_flow(publish=fx.every(10)),
        cb.weight_stats(every=20),
        cb.update_ratios(publish=fx.every(50), worst=3),
        *[cb.histograms(of, every=50) for of in ("grads", "weights", "updates")],
        cb.stop_on_overfitting("loss", patience=50),
    )


def in_loop() -> Any:
    """Returns the callbacks that run only in the loop."""
    return fx.compose(
        cb.time_limit(hours=1),
        cb.early_stopping("loss", patience=100),
        cb.restore_best("loss"),
        cb.stop_at("loss", 0.01),
        cb.reduce_on_plateau("loss", patience=1, factor=0.7),
        cb.schedule_hyperparam("weight_decay", fx.schedules.linear(0.1, 0.01, transition_steps=300)),
        cb.throughput(samples=16, tokens=16 * 128),
        fx.when(fx.every(25), cb.save()),
        fx.when(fx.at(130), cb.evaluate()),
    )


if __name__ == "__main__":
    main()
