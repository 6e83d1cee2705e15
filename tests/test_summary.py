"""The summary observer's page of a run, on each output, and the summary of a state alone."""

import io
import os
import re
import sys

import pytest
import torch
from summary_pages import NOTHING, facts, panels, printed
from torch import nn

import fxtrain as fx
from fxtrain import observers
from fxtrain.core import Control, FitBegin


def test_summary_page_is_complete(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tx = fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.adamw(fx.schedules.cosine(1e-2, 100)))
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)
    module[0].bias.requires_grad_(False)
    stopping = fx.callbacks.early_stopping("loss", patience=3)
    state = fx.attach(fx.init(module, tx, seed=7), fx.compose(stopping))
    fires = frozenset({fx.Updated, fx.Gradients})
    page = printed(state, total_steps=1000, total_epochs=2, epoch_length=1500, fires=fires)
    device = re.compile(r"  host .*\n  threads .*\n  torch .*\n  python .*\n")
    assert len(device.findall(page)) == 1
    assert device.sub("", page) == (
        "run\n"
        "  length       1,000 steps or 2 epochs, whichever comes first\n"
        "  seed         7\n"
        "  events       Gradients, Updated in the step\n"
        "model\n"
        "  parameters   24 in 4 tensors: 20 trainable, 4 frozen\n"
        "  buffers      9 in 3 tensors\n"
        "  dtype        bfloat16\n"
        "  state        294 B: params 48 B, buffers 24 B, opt_state 152 B, slots 32 B, other 38 B\n"
        "data\n"
        "  epoch        1,500 batches\n"
        "training\n"
        "  opt_state    scale_by_adam 144 B, scale_by_schedule 8 B\n"
        "  callbacks    early_stopping 32 B\n"
        "distributed\n"
        "  processes    one\n"
        "device\n"
        "  device       cpu\n"
        "modules\n"
        "  +---------+-------------+------------+--------+-----------+----------+\n"
        "  | Module  | Type        | Parameters | Share  | Trainable | Dtype    |\n"
        "  +---------+-------------+------------+--------+-----------+----------+\n"
        "  | (model) | Sequential  |         24 | 100.0% | some      | bfloat16 |\n"
        "  |   0     | Linear      |         16 |  66.7% | some      | bfloat16 |\n"
        "  |   1     | BatchNorm1d |          8 |  33.3% | all       | bfloat16 |\n"
        "  +---------+-------------+------------+--------+-----------+----------+\n"
        "tensors\n"
        "  +----------+--------+----------+------+\n"
        "  | Tensor   | Shape  | Dtype    | Size |\n"
        "  +----------+--------+----------+------+\n"
        "  | 0.bias   | (4,)   | bfloat16 |    4 |\n"
        "  | 0.weight | (4, 3) | bfloat16 |   12 |\n"
        "  | 1.bias   | (4,)   | bfloat16 |    4 |\n"
        "  | 1.weight | (4,)   | bfloat16 |    4 |\n"
        "  +----------+--------+----------+------+\n"
    )


def test_device_panel_matches_torch():
    told = facts(printed(fx.init(nn.Linear(1, 1))), "device")
    assert told["device"] == "cpu"
    assert told["threads"] == str(torch.get_num_threads())
    assert told["torch"].startswith(torch.__version__)
    assert re.fullmatch(rf"[\d.]+ [MGT]iB, {os.cpu_count()} cores?", told["host"])


# Runs


def test_resumed_run_shows_its_start():
    state = fx.init(nn.Linear(1, 1)).replace(step=torch.tensor(1040))
    page = printed(state, position=1040, epoch_length=100, total_epochs=20, resumed=True)
    assert facts(page, "run") == {"length": "20 epochs", "begins": "after step 1,040, resumed", "seed": "0"}
    assert facts(page, "data") == {"epoch": "100 batches", "position": "after 40 batches of epoch 11"}
    assert facts(printed(state, position=1), "data") == {"position": "after 1 batch"}
    assert facts(printed(fx.init(nn.Linear(1, 1)), total_steps=1), "run")["length"] == "1 step"


def test_process_count_is_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    page = printed(fx.init(nn.Linear(1, 1)))
    assert facts(page, "distributed")["processes"] == "4, this is rank 0; torch.distributed is not initialized"
    monkeypatch.setenv("RANK", "1")
    assert printed(fx.init(nn.Linear(1, 1))) == ""


def test_fit_writes_the_page_to_a_file(tmp_path):
    path = tmp_path / "run" / "summary.txt"
    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
    state = fx.init(nn.Linear(1, 1), tx)
    observing = {"observers": [observers.required(observers.summary(file=path))]}
    result = fx.fit(state, step, [torch.ones(4, 1)], steps=2, **observing)
    page = path.read_text()
    assert facts(page, "run")["events"] == "Microbatch, Gradients, Updated in the step"
    fx.fit(result.state, step, [torch.ones(4, 1)], steps=4, **observing)
    assert facts(path.read_text(), "run")["begins"] == "after step 2, resumed"
    observers.summary(file=os.fspath(path))(state, FitBegin(step=0), NOTHING)
    assert "begins" not in path.read_text()
    assert path.read_text().endswith("+\n")


# Output


def test_pipe_gets_plain_text_and_terminal_gets_boxes(monkeypatch, capsys):
    import rich

    monkeypatch.delenv("FORCE_COLOR", raising=False)
    state = fx.init(nn.Linear(1, 1))
    observers.summary()(state, FitBegin(step=0), NOTHING)
    plain = capsys.readouterr().out
    assert plain == printed(state)
    for width, boxed in ((120, True), (60, False)):
        monkeypatch.setattr(rich, "_console", rich.console.Console(force_terminal=True, width=width, _environ={}))
        observers.summary()(state, FitBegin(step=0), NOTHING)
        shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
        if boxed:
            assert shown.startswith("╭─ run ─")
            inside = [line.strip("│ ") for line in shown.splitlines() if line.startswith("│")]
            assert inside == [line.strip() for line in plain.splitlines() if line.startswith("  ")]
        else:
            assert shown == plain


def test_missing_clu_omits_only_the_tables(monkeypatch):
    monkeypatch.setitem(sys.modules, "clu", None)
    page = printed(fx.init(nn.Linear(1, 1)))
    assert panels(page)["modules"][0].startswith("(no table, because clu cannot be imported: ")
    assert panels(page)["modules"][0].endswith("pip install clu)")
    assert facts(page, "model")["parameters"] == "2 in 2 tensors, all trainable"


def test_parameter_names_are_escaped_in_the_terminal(capsys):
    state = fx.init({"a\x1b[2J\n\u202e": torch.zeros(2)}, fx.optim.sgd(0.1))
    observers.summary()(state, FitBegin(step=0), Control())
    text = capsys.readouterr().out
    assert "a\\x1b[2J\\n\\u202e" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


# Optimizer, batch and configuration


def fitted(step, data=None, **options):
    file = io.StringIO()
    state = fx.init(nn.Linear(1, 1), TX)
    data = [torch.ones(4, 1)] if data is None else data
    fx.fit(state, step, data, steps=1, observers=[observers.summary(file=file)], **options)
    return file.getvalue()


TX = fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.adamw(fx.schedules.cosine(0.001, 900)))


def loss_fn(model, batch):
    return (model(batch) - 1).square().mean()


def test_summary_shows_optimizer_learning_rate_batch_and_precision():
    data = fx.data.batches(torch.ones(70, 1), 8)
    page = fitted(fx.train_step(loss_fn, TX, accumulate=2, precision="bf16"), data)
    found = facts(page, "training")
    assert found["loss"] == "loss_fn"
    assert found["optimizer"].startswith("chain(clip_by_global_norm(1.0), adamw(cosine(0.001, 900)")
    assert found["lr"] == "cosine(0.001, 900)"
    assert found["batch"] == "8 examples in 2 microbatches of 4"
    assert found["precision"] == "bf16"
    assert found["opt_state"].startswith("scale_by_adam ")
    assert "loop/" not in page
    assert facts(page, "data") == {"epoch": "8 batches", "examples": "70"}


def test_summary_names_functions_for_readers():
    def _squares(model, batch):
        return model(batch).square().mean()

    data = [torch.ones(4, 1)]
    assert facts(fitted(fx.train_step(_squares, TX), data), "training")["loss"] == "squares"
    page = fitted(fx.train_step(lambda model, batch: _squares(model, batch), TX), data)
    assert "loss" not in facts(page, "training")


def test_summary_shows_the_rate_of_each_group_and_the_settings_of_other_steps():
    described = {"learning_rate/body": 0.1, "learning_rate/head": 0.5, "margin": 0.2}
    page = printed(fx.init(nn.Linear(1, 1), TX), step_description={k: str(v) for k, v in described.items()})
    found = facts(page, "training")
    assert (found["lr"], found["margin"]) == ("body 0.1, head 0.5", "0.2")


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "text"),
    [
        (8, "1", "8 examples"),
        (None, "1", None),
        (None, "2", "2 microbatches"),
        (9, "2", "9 examples in 2 microbatches"),
    ],
)
def test_summary_batch_leaves_unknown_sizes_out(batch_size, accumulate, text):
    state = fx.init(nn.Linear(1, 1), TX)
    page = printed(state, batch_size=batch_size, step_description={"accumulate": accumulate})
    assert facts(page, "training").get("batch") == text


def test_summary_shows_names_and_configuration_of_the_run():
    config = {
        "model": {"width": 64},
        "decay": None,
        "lr": 3e-3 / 20,
        "betas": [0.9, None],
        "a": "x\ny",
        "rest": {str(i): i for i in range(9)},
    }
    run = fx.RunInfo(project="digits", name="baseline", tags=["a", "b"], description="Two\nlines.", config=config)
    page = printed(fx.init(nn.Linear(1, 1), TX), rows=5, run=run)
    assert page.startswith(
        "run\n  project      digits\n  name         baseline\n  tags         a, b\n  description  Two lines.\n"
    )
    assert panels(page)["config"] == [
        "model/width  64",
        "lr           0.00015",
        "betas        [0.9, None]",
        "a            x y",
        "rest/0       0",
        "...          and 8 more",
    ]


def test_summary_aligns_long_keys_of_a_configuration():
    run = fx.RunInfo(config={"optimizer": {"weight_decay": 0.1}, "lr": 1})
    page = printed(fx.init(nn.Linear(1, 1), TX), run=run)
    assert panels(page)["config"] == ["optimizer/weight_decay  0.1", "lr                      1"]


@pytest.mark.parametrize(
    ("k", "text"),
    [
        (1, "4 examples"),
        (3, "4 examples, 12 in 3 steps per update"),
        (lambda count: 2, "4 examples, variable steps per update"),
    ],
)
def test_summary_shows_the_effective_batch_of_accumulating_optimizers(k, text):
    tx = fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.every_k(k=k, tx=fx.optim.sgd(0.1)))
    file = io.StringIO()
    run = {"steps": 1, "observers": [observers.summary(file=file)]}
    fx.fit(fx.init(nn.Linear(1, 1), tx), fx.train_step(loss_fn, tx), [torch.ones(4, 1)], **run)
    assert facts(file.getvalue(), "training")["batch"] == text


def test_summary_counts_steps_of_unknown_batches():
    described = {"accumulate": "2", "steps_per_update": "3"}
    page = printed(fx.init(nn.Linear(1, 1), TX), step_description=described)
    assert facts(page, "training")["batch"] == "2 microbatches, 3 steps per update"


# Of a state alone


def test_summary_of_state_has_the_tables_of_the_page():
    state = fx.init(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), fx.optim.adam(0.1))
    found = fx.summary(state, depth=1)
    page = printed(state, depth=1)
    shared = repr(found)[repr(found).index("modules\n") :].strip()
    assert shared
    assert shared in page
    assert {row["part"]: row["bytes"] for row in found.parts} == {
        "params": "48 B",
        "buffers": "24 B",
        "opt_state": "128 B",
        "other": "38 B",
    }


def test_summary_in_notebook_has_the_same_tables():
    found = fx.summary(fx.init(nn.Linear(3, 2), fx.optim.adam(0.1)))._repr_html_()
    for text in ("scale_by_adam 80 B", "opt_state</td>", ">(2, 3)</td>", ">100.0%</td>"):
        assert text in found


def test_summary_in_notebook_escapes_names():
    state = fx.init({"<b>\x1b": torch.zeros(2)})
    assert "<b>\x1b" not in fx.summary(state)._repr_html_()
    assert "\x1b" not in repr(fx.summary(state))


def test_summary_of_large_model_is_short():
    state = fx.init(nn.Sequential(*(nn.Linear(2, 2) for _ in range(300))))
    assert len(repr(fx.summary(state, rows=10)).splitlines()) < 30
    assert len(fx.summary(state)._repr_html_()) < 15_000


def test_summary_reads_no_values():
    state = fx.init({"w": torch.zeros(3, device="meta")})
    assert fx.summary(state).tensors[0]["shape"] == "(3,)"


def test_error_for_another_object_says_how_to_make_a_state():
    with pytest.raises(TypeError, match=r"to summarize, got a Linear. Make one with fxtrain.init"):
        fx.summary(nn.Linear(1, 1))
