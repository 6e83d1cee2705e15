"""Cells of a notebook that are interrupted, run twice, or run again in another kernel."""

import notebook
import pytest

pytestmark = pytest.mark.slow

TRAIN = """
    import os, signal, torch, fxtrain as fx
    torch.manual_seed(0)
    tx = fx.optim.adam(0.1)
    step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
    state = fx.init(torch.nn.Linear(1, 1), tx)
    data = list(torch.linspace(-1, 1, 40).reshape(10, 4, 1))

    def train(**options):
        result = fx.fit(state, step, data, epochs=3, **options)
        return [float(leaf) for leaf in result.state.params.values()], int(result.state.step), result.reason
"""


def lines(outputs):
    return [line.split("   ")[0] for line in outputs[0].data["text/plain"].splitlines()]


def test_cell_gives_the_same_result_again_and_after_an_interruption(tmp_path):
    _, first, again, interrupted, later = notebook.outputs(
        tmp_path,
        TRAIN,
        "train()",
        "train()",
        """
        def interrupt(state, event: fx.StepBegin, control):
            if event.step == 15:
                os.kill(os.getpid(), signal.SIGINT)  # as the stop button does
        train(observers=interrupt)[1:]
        """,
        "train()",
    )
    assert first[1].data == again[1].data == later[1].data
    assert lines(first)[:-1] == lines(again)[:-1] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert interrupted[1].data["text/plain"] == "(15, 'interrupted by SIGINT')"
    assert lines(interrupted)[0] == "epoch 1/3"
    assert lines(interrupted)[-1].startswith("end  step 15: interrupted by SIGINT, in ")


def test_run_resumes_in_another_kernel_after_the_first_one_died(tmp_path):
    options = "callbacks=save, checkpointer=fx.checkpointer('run'), resume=True"
    save = """
        def save(state, event: fx.EpochEnd):
            return state, fx.Control(save=True)
    """
    die = """
        def die(state, event: fx.Saved, control):
            if event.step == 20:
                os._exit(1)
    """
    nbclient = pytest.importorskip("nbclient")
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with pytest.raises(nbclient.exceptions.DeadKernelError):
        notebook.outputs(tmp_path / "first", TRAIN, save, die, f"train(observers=die, {options})", folder=tmp_path)
    _, _, resumed, whole = notebook.outputs(
        tmp_path / "second", TRAIN, save, f"train({options})", "train()", folder=tmp_path
    )
    assert lines(resumed)[:-1] == ["resuming from step 20", "epoch 3/3"]
    assert resumed[1].data == whole[1].data
