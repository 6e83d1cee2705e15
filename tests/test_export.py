"""Exports of a run's weights: at the best, at the end and at chosen steps, whole after a kill, with their metrics."""

import json
import re
import warnings

import pytest
import torch
from zoo.operators import import_without_operators

import fxtrain as fx
from fxtrain import callbacks, observers, testing

TX = fx.optim.sgd(0.75)
STEP = fx.train_step(lambda model, batch: (model["w"] - batch).square(), TX)


def run(*given, steps=5, rules=(), **options):
    """Trains w, which is 1.5, 0.75, 1.125, 0.9375, 1.03125 after steps 1 to 5, with an evaluation at each."""
    return fx.fit(
        fx.init({"w": torch.tensor(0.0)}, TX),
        STEP,
        [torch.tensor(1.0)],
        steps=steps,
        callbacks=[callbacks.save_best("far"), *rules],
        observers=given,
        eval_step=fx.eval_step(lambda model, batch: {"far": (model["w"] - 0.8).abs()}),
        eval_data=[torch.tensor(1.0)],
        **{"checkpointer": None, **options},
    )


def weights(folder):
    return float(fx.load_weights(fx.init({"w": torch.tensor(0.0)}), folder).params["w"])


def facts(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(autouse=True)
def _without_checkpoints():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "expected a checkpointer for a save requested by a callback")
        yield


def test_best_weights_are_exported_with_their_metrics(tmp_path):
    run(observers.export(tmp_path / "best"))
    assert weights(tmp_path / "best") == 0.75
    found = facts(tmp_path / "best")
    assert (found["step"], found["epoch"]) == (2, 2.0)
    assert found["metrics"] == {"eval/far": pytest.approx(0.05)}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_best_of_an_earlier_session_is_not_replaced_by_a_worse_one(tmp_path):
    for steps in (3, 5):
        run(
            observers.export(tmp_path / "best"),
            steps=steps,
            checkpointer=fx.checkpointer(tmp_path / "checkpoints"),
            resume=True,
        )
    assert (weights(tmp_path / "best"), facts(tmp_path / "best")["step"]) == (0.75, 2)


@pytest.mark.parametrize(
    ("rule", "slot"),
    [(callbacks.restore_best("far"), "restore_best"), (callbacks.early_stopping("far", patience=9), "early_stopping")],
)
def test_other_callbacks_with_a_best_value_decide_too(rule, slot, tmp_path):
    run(observers.export(tmp_path / "best", best=slot), rules=[rule])
    assert weights(tmp_path / "best") == 0.75


def test_missing_slot_is_reported_before_the_first_step(tmp_path):
    with pytest.warns(RuntimeWarning, match=r"failed at FitBegin(.|\n)*got 'save_bset'\. Did you mean 'save_best'\?"):
        run(observers.export(tmp_path / "best", best="save_bset"))


def test_folder_name_with_step_keeps_every_export(tmp_path):
    run(observers.export(tmp_path / "best_model_step_{step}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best_model_step_1", "best_model_step_2"]


def test_trigger_exports_after_steps_with_metrics_of_the_step(tmp_path):
    run(observers.export(tmp_path / "{step}", at=2))
    assert [weights(tmp_path / name) for name in ("2", "4")] == [0.75, 0.9375]
    assert facts(tmp_path / "4")["metrics"].keys() >= {"eval/far", "train/loss"}


def test_end_exports_the_last_weights(tmp_path):
    run(observers.export(tmp_path / "last", at="end"))
    found = facts(tmp_path / "last")
    assert (weights(tmp_path / "last"), found["step"]) == (1.03125, 5)
    assert found["metrics"]["eval/far"] == pytest.approx(0.23125)


def test_end_after_restore_best_names_the_step_of_the_weights(tmp_path):
    run(observers.export(tmp_path / "last", at="end"), rules=[callbacks.restore_best("far")])
    found = facts(tmp_path / "last")
    assert (weights(tmp_path / "last"), found["step"], found["epoch"]) == (0.75, 2, 2.0)
    assert found["metrics"]["eval/far"] == pytest.approx(0.05)


def test_averaged_weights_are_exported_through_a_view(tmp_path):
    def averaged(state):
        return callbacks.averaged(state, "ema")

    result = run(observers.export(tmp_path / "last", at="end", view=averaged), rules=[callbacks.ema(0.5)])
    assert weights(tmp_path / "last") == float(averaged(result.state).params["w"]) != 1.03125


def test_state_dict_format_is_of_torch_save(tmp_path):
    run(observers.export(tmp_path / "best", format="state_dict"))
    assert float(torch.load(tmp_path / "best" / "pytorch_model.bin")["w"]) == 0.75
    assert weights(tmp_path / "best") == 0.75


def test_kill_between_the_renames_of_a_replacement_is_repaired(tmp_path):
    run(observers.export(tmp_path / "best"))
    (tmp_path / "best").rename(tmp_path / ".replaced-best")
    (tmp_path / ".new-best").mkdir()
    state = fx.init({"w": torch.tensor(0.0)}, TX)
    observers.export(tmp_path / "best", at="end")(state, fx.FitBegin(step=0), fx.Control())
    assert weights(tmp_path / "best") == 0.75
    run(observers.export(tmp_path / "best", at="end"))
    assert weights(tmp_path / "best") == 1.03125
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_folder_that_is_no_export_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.warns(
        RuntimeWarning, match=r"expected a new folder or an earlier export, got .*, which has no metrics"
    ):
        run(observers.export(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_failed_export_warns_and_later_ones_succeed(tmp_path):
    class Full:
        left = 1

    def view(state):
        if Full.left:
            Full.left -= 1
            raise OSError(28, "No space left on device")
        return state

    with pytest.warns(RuntimeWarning, match=r"weights of step 1 could not be exported .* No space left on device"):
        run(observers.export(tmp_path / "best", view=view))
    assert weights(tmp_path / "best") == 0.75
    Full.left = 1
    with pytest.raises(OSError, match="No space"), pytest.warns(RuntimeWarning, match="could not be exported"):
        run(observers.required(observers.export(tmp_path / "best", view=view)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": "finish"}, "expected at to be one of 'best', 'end', got 'finish'"),
        (
            {"format": "onnx"},
            "expected format to be one of 'auto', 'safetensors', 'state_dict', 'save_pretrained', got 'onnx'",
        ),
    ],
)
def test_unknown_option_is_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        observers.export(tmp_path, **arguments)


def test_save_pretrained_needs_a_module_that_has_it(tmp_path):
    with pytest.raises(TypeError, match=r"expected a module with save_pretrained, got .*Pass format='safetensors'"):
        fx.save_weights(tmp_path / "w", fx.init(torch.nn.Linear(2, 1)), format="save_pretrained")
    assert not list(tmp_path.iterdir())


def test_from_pretrained_loads_the_exported_best_model(tmp_path):
    import_without_operators()
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 12}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    module.generation_config.max_new_tokens = 7

    def loss_fn(model, batch):
        return model(input_ids=batch, labels=batch).loss

    tx, data = fx.optim.sgd(0.1), [torch.arange(12).reshape(2, 6)]
    result = fx.fit(
        fx.init(module, tx),
        fx.train_step(loss_fn, tx),
        data,
        steps=2,
        callbacks=callbacks.save_best("loss"),
        observers=observers.export(tmp_path / "best", format="save_pretrained"),
        eval_step=fx.eval_step(loss_fn),
        eval_data=data,
    )
    loaded = type(module).from_pretrained(tmp_path / "best")
    testing.assert_equal(dict(loaded.state_dict()), fx.state_dict(result.state), "what was exported")
    assert loaded.generation_config.max_new_tokens == 7
    assert facts(tmp_path / "best")["step"] == 2
