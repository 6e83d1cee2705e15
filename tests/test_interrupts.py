"""Signal handling: ends a run between steps, saves, leaves a compilation, and sets the exit code of the process."""

import os
import signal
import weakref

import problem
import processes
import pytest
import torch

import fxtrain as fx
from fxtrain import testing


def fit(**options):
    return fx.fit(problem.start(), **{"step": problem.step(), "data": problem.data(), "steps": 6, **options})


def send(*kinds, after=fx.StepEnd, step=2):
    """Returns an observer that sends signals to this process."""

    def observe(state, event, control):
        if isinstance(event, after) and event.step == step:
            for kind in kinds:
                os.kill(os.getpid(), kind)

    return observe


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ignored_signal_does_not_end_run(kind):
    before = signal.signal(kind, signal.SIG_IGN)
    try:
        result = fit(observers=[send(kind)])
    finally:
        signal.signal(kind, before)
    assert (result.exit_code, result.reason) == (0, "reached 6 steps")


@pytest.mark.parametrize(
    ("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 128 + signal.SIGUSR1)]
)
def test_signal_ends_run_with_final_save(tmp_path, kind, code):
    checkpoints = fx.checkpointer(tmp_path)
    before = signal.getsignal(kind)
    result = fit(observers=[send(kind)], checkpointer=checkpoints)
    assert (result.exit_code, result.reason) == (code, f"interrupted by {signal.Signals(kind).name}")
    assert checkpoints.steps() == [2]
    assert signal.getsignal(kind) is before


def test_repeated_termination_signals_keep_final_save(tmp_path):
    checkpoints = fx.checkpointer(tmp_path)
    result = fit(observers=[send(signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)], checkpointer=checkpoints)
    assert result.reason == "interrupted by SIGUSR1"
    assert checkpoints.steps() == [2]


def test_ctrl_c_after_another_signal_raises_keyboard_interrupt():
    with pytest.raises(KeyboardInterrupt):
        fit(observers=[send(signal.SIGTERM, signal.SIGINT)])


def test_signal_with_user_handler_does_not_end_run(tmp_path):
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        result = fit(observers=[send(signal.SIGUSR1)])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]
    assert result.reason == "reached 6 steps"


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGUSR1])
def test_no_session_starts_after_termination_signal(kind, caplog):
    assert fit(observers=[send(kind)]).exit_code == 128 + kind
    started = []
    with pytest.raises(SystemExit) as ended:
        fit(observers=[lambda state, event, control: started.append(event)])
    assert (ended.value.code, started) == (128 + kind, [])
    assert f"received {kind.name} in an earlier session" in caplog.text
    assert fit().exit_code == 0  # SystemExit is raised once per signal


def test_steps_does_not_start_after_termination_signal():
    fit(observers=[send(signal.SIGTERM)])
    with pytest.raises(SystemExit):
        fx.steps(problem.start(), problem.step(), problem.data(), steps=6)


def test_signal_at_fit_end_sets_exit_code_and_ends_next_session():
    result = fit(observers=[send(signal.SIGTERM, after=fx.FitEnd, step=6)])
    assert (result.exit_code, result.reason) == (128 + signal.SIGTERM, "reached 6 steps")
    with pytest.raises(SystemExit, match="143"):
        fit()


def test_session_after_ctrl_c_starts():
    assert fit(observers=[send(signal.SIGINT)]).exit_code == 130
    assert fit().exit_code == 0


def test_user_handler_is_called_after_final_save(tmp_path):
    checkpoints, heard = fx.checkpointer(tmp_path), []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append((number, checkpoints.steps())))
    try:
        assert fit(observers=[send(signal.SIGTERM)], checkpointer=checkpoints).exit_code == 143
        assert heard == [(signal.SIGTERM, [2])]
        assert fit().exit_code == 0
    finally:
        signal.signal(signal.SIGTERM, before)


def test_signal_ends_nested_and_outer_run():
    def inner(state, event: fx.StepEnd, control):
        if event.step == 1:
            assert fit(observers=[send(signal.SIGTERM, step=3)]).reason == "interrupted by SIGTERM"

    outer = fit(observers=[fx.observers.required(inner)])
    assert (outer.exit_code, int(outer.state.step)) == (143, 1)
    with pytest.raises(SystemExit):
        fit()


class Slow:
    """A slow compiler that sends SIGTERM to this process while it compiles."""

    def __init__(self, calls=0):
        self.finished, self.calls = False, calls

    def __call__(self, graph, inputs):
        if self.calls:
            self.calls -= 1
            return graph
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # Python runs the handler between bytecodes
            pass
        self.finished = True
        return graph


def test_signal_during_compilation_saves_state_before_the_step(tmp_path, own_handler):
    torch._dynamo.reset()
    slow = Slow()
    checkpoints = fx.checkpointer(tmp_path)
    result = fit(step=fx.compile(problem.step(), backend=slow), checkpointer=checkpoints)
    assert not slow.finished
    assert result.reason == "interrupted by SIGTERM"
    assert checkpoints.steps() == [0]
    with pytest.warns(UserWarning, match="compiled by: Slow at the save, eager now"):
        resumed = fit(step=fx.compile(problem.step(), backend="eager"), checkpointer=checkpoints, resume=True)
    whole = fit(step=fx.compile(problem.step(), backend="eager"))
    testing.assert_equal(resumed.state, whole.state, "resumed after a compilation was left")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signal_in_a_weakref_callback_of_the_compiler_ends_run_after_the_step(tmp_path, own_handler):
    torch._dynamo.reset()

    def compile_graph(graph, inputs):
        part = torch.nn.Module()
        dropped = weakref.ref(part, lambda _: os.kill(os.getpid(), signal.SIGTERM))  # Python ignores exceptions there
        del part
        assert dropped() is None
        return graph

    checkpoints = fx.checkpointer(tmp_path)
    result = fit(step=fx.compile(problem.step(), backend=compile_graph), checkpointer=checkpoints)
    assert result.reason == "interrupted by SIGTERM"
    assert checkpoints.steps() == [1]


def test_signal_during_compilation_of_evaluation_keeps_it_due(tmp_path, own_handler):
    torch._dynamo.reset()
    slow = Slow()
    options = {
        "eval_data": problem.data(1),
        "eval_when": fx.every(2),
        "checkpointer": fx.checkpointer(tmp_path),
    }
    result = fit(eval_step=fx.compile(problem.eval_step, backend=slow), **options)
    assert not slow.finished
    assert int(result.state.step) == 2
    seen = []
    fit(
        eval_step=problem.eval_step,
        resume=True,
        observers=[lambda state, event, control: seen.append((type(event).__name__, event.step))],
        **options,
    )
    assert [step for kind, step in seen if kind == "EvalEnd"] == [2, 4, 6]


def test_signal_does_not_interrupt_compilation_in_observer():
    torch._dynamo.reset()
    slow = Slow()
    compiled = torch.compile(lambda x: x + 1, backend=slow)

    def observe(state, event: fx.StepEnd, control):
        compiled(torch.ones(1))

    result = fit(observers=[observe])
    assert slow.finished
    assert result.reason == "interrupted by SIGTERM"


PROGRAM = """
import sys, torch, fxtrain as fx
from torch._inductor.graph import GraphLowering

lower = GraphLowering.run

def run(self, *args):
    print("compiling", flush=True)
    lowered = lower(self, *args)
    print("compiled", flush=True)
    return lowered

GraphLowering.run = run
torch.set_num_threads(1)
torch._inductor.config.force_disable_caches = True
module = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(8 + i, 9 + i), torch.nn.Tanh()) for i in range(8)])
tx = fx.optim.adamw(1e-3)
options = {"backend": sys.argv[2]} if sys.argv[2] else {}
step = fx.compile(fx.train_step(lambda model, batch: model(batch).square().mean(), tx), **options)
result = fx.fit(
    fx.init(module, tx), step, [torch.ones(4, 8)], steps=9, checkpointer=fx.checkpointer(sys.argv[1])
)
print(result.reason)
sys.exit(result.exit_code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["", "inductor"])
def test_signal_interrupts_inductor_compilation(tmp_path, backend):
    with processes.Process(["-c", PROGRAM, tmp_path, backend]) as process:
        assert process.stdout.readline() == "compiling\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert (out, process.returncode) == ("interrupted by SIGTERM\n", 143), err
    assert fx.checkpointer(tmp_path).steps() == [0]
