"""Errors for classes and arguments of Keras, Lightning and transformers name the counterpart, whatever those offer."""

import ast
import dataclasses
import importlib
import inspect
import json
import os
import re

import pytest
import test_seeds
import torch
from torch import nn

import fxtrain as fx

os.environ["KERAS_BACKEND"] = "torch"  # before Keras is imported
TX = fx.optim.sgd(0.1)
STEP = fx.train_step(lambda model, batch: model(batch).mean(), TX)
OPTIONS = inspect.signature(fx.fit).parameters


def package(name):
    """Imports a package, or skips the test if it is missing."""
    return pytest.importorskip(name)


def error_of(function, *args, **kwargs):
    with pytest.raises(TypeError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def fit(**options):
    return fx.fit(fx.init(nn.Linear(1, 1), TX), STEP, [torch.ones(2, 1)], **{"epochs": 1, **options})


def snippets(text):
    """Returns the code in a message, from each ``fxtrain.`` to the end of its parentheses."""
    for start in re.finditer(r"(?<![\w.])fxtrain\.[a-z]", text):
        end = re.match(r"[\w.]*\w", text[start.start() :]).end() + start.start()
        depth, position = 0, end
        while text[position : position + 1] == "(" or depth:
            depth += {"(": 1, ")": -1}.get(text[position], 0)
            position += 1
        yield text[start.start() : position].replace("fxtrain.", "fx.")


def mistakes(text):
    return [(code, test_seeds.mistake(code)) for code in snippets(text) if test_seeds.mistake(code)]


def test_mistakes_in_advice_are_found():
    assert mistakes("Use fxtrain.callbacks.early_stop(3).")
    assert mistakes("Use fxtrain.fit(state, step, data, epoch=3), then stop.")
    assert list(snippets("Use fxtrain.optim.chain(fxtrain.optim.sgd(1.0), tx) or (fxtrain.find_batch_size).")) == [
        "fx.optim.chain(fx.optim.sgd(1.0), tx)",
        "fx.optim.sgd(1.0)",
        "fx.find_batch_size",
    ]


def classes(library):
    if library == "keras":
        return [each for each in vars(package("keras").callbacks).values() if inspect.isclass(each)]
    if library == "lightning":
        package("lightning")
        from lightning.pytorch import callbacks, loggers

        return [getattr(room, name) for room in (callbacks, loggers) for name in room.__all__]
    package("transformers")
    from transformers import integrations, trainer_callback
    from transformers.integrations import integration_utils

    found = [each for room in (trainer_callback, integration_utils, integrations) for each in vars(room).values()]
    kinds = [each for each in found if inspect.isclass(each) and issubclass(each, trainer_callback.TrainerCallback)]
    return sorted(set(kinds), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("library", ["keras", "lightning", "transformers"])
def test_every_callback_and_logger_has_advice(library):
    kinds = classes(library)
    assert len(kinds) > 12
    for kind in kinds:
        for argument in ("callbacks", "observers"):
            message = error_of(fit, **{argument: [kind]})
            assert f"got {kind.__name__} of {library}. " in message
            assert "See fxtrain.callbacks" not in message, kind
            # Their own names are no names of fxtrain.
            assert not mistakes(message.replace(f"{kind.__name__}(...)", "callback")), message


def test_callback_of_transformers_is_told_the_direct_way():
    transformers = package("transformers")

    class Mine(transformers.TrainerCallback):
        pass

    assert error_of(fit, callbacks=[Mine()]).endswith(
        "Give fxtrain.interop.hf(Mine(...)) as a callback, which runs it as it is."
    )
    message = error_of(fit, callbacks=[transformers.EarlyStoppingCallback(3)])
    assert "hf(EarlyStoppingCallback(...))" in message
    assert "Or use fxtrain.callbacks.early_stopping(" in message


def test_subclass_of_a_foreign_callback_has_the_advice_on_its_base():
    keras = package("keras")

    class Mine(keras.callbacks.EarlyStopping):
        pass

    assert "got Mine of keras. Use fxtrain.callbacks.early_stopping(" in error_of(fit, callbacks=[Mine()])


def arguments(source):
    if source.startswith("keras"):
        model = package("keras").Model
        return [*inspect.signature(model.fit).parameters, *inspect.signature(model.compile).parameters]
    if source == "lightning":
        trainer = package("lightning").Trainer
        return [*inspect.signature(trainer.__init__).parameters, *inspect.signature(trainer.fit).parameters]
    transformers = package("transformers")
    if source == "Trainer":
        return list(inspect.signature(transformers.Trainer.__init__).parameters)
    return [field.name for field in dataclasses.fields(transformers.TrainingArguments)]


@pytest.mark.parametrize("source", ["keras", "lightning", "Trainer", "TrainingArguments"])
def test_every_argument_of_other_trainers_has_advice(source):
    names = {*arguments(source)} - {"self", *OPTIONS}
    assert len(names) > 8
    for name in names:
        message = error_of(fit, **{name: 1})
        advice = message.partition(f"got {name!r}.")[2]
        assert advice, f"{name} has no advice"
        assert "Did you mean" not in advice, f"{name}: {advice}"
        assert not mistakes(advice), (name, mistakes(advice))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fit(accumulate_grad_batches=4),
            r"got 'accumulate_grad_batches'\. Use fxtrain\.train_step\(.*accumulate=4",
        ),
        (lambda: fit(epoch=4), r"fit: expected the arguments callbacks, .*, got 'epoch'\. Did you mean 'epochs'\?"),
        (lambda: fx.train_step(None, TX, gradient_accumulation_steps=2), r"train_step: .* Use .*accumulate=4"),
        (lambda: fx.train_step(None, TX, acumulate=2), r"got 'acumulate'\. Did you mean 'accumulate'\?"),
        (lambda: fx.eval_step(None, metrics=["mae"]), r"eval_step: .* Return metrics with the loss"),
        (lambda: fx.init(None, optimizer=TX), r"init: .* Give the optimizer to both fxtrain\.init"),
        (
            lambda: fx.callbacks.early_stopping(monitor="loss"),
            r"got 'monitor'\. The metric comes first: .*early_stopping",
        ),
        (
            lambda: fx.callbacks.early_stopping("loss", patience=1, restore_best_weights=True),
            r"Add fxtrain\.callbacks\.res",
        ),
        (lambda: fx.callbacks.reduce_on_plateau("loss", min_lr=0), r"reduce_on_plateau\(\"loss\", minimum="),
        (lambda: fx.callbacks.save_best("loss", save_top_k=2), r"fxtrain\.checkpointer\(folder, keep=3\)"),
        (lambda: fx.callbacks.save(save_freq=2), r"fxtrain\.callbacks\.save\(every="),
        (lambda: fx.callbacks.time_limit(duration="1h"), r"time_limit\(hours="),
        (lambda: fx.callbacks.swa(swa_epoch_start=1), r"swa\(start="),
        (lambda: fx.callbacks.ema(momentum=1), r"ema\(0\.999\)"),
        (lambda: fx.checkpointer(dirpath="x"), r"The folder comes first"),
        (lambda: fx.data.batches([], 2, num_workers=2), r"batches: .* fxtrain\.data\.from_loader"),
        (lambda: fx.optim.adamw(lr=0.1), r"adamw: .* The learning rate comes first: fxtrain\.optim\.adamw\(1e-3\)"),
        (lambda: fx.optim.adam(0.1, betas=(0.9, 0.99)), r"b1=0\.9, b2=0\.999"),
        (lambda: fx.optim.sgd(0.1, weight_decay=0.1), r"fxtrain\.optim\.add_decayed_weights"),
    ],
)
def test_argument_of_another_library_is_told_where_it_went(call, message):
    found = error_of(call)
    assert re.search(message, found), found
    assert not mistakes(found), mistakes(found)


def test_error_for_an_unknown_argument_is_printed_alone():
    with pytest.raises(TypeError) as raised:
        fx.callbacks.early_stopping(monitor="loss")
    assert raised.value.__context__ is None


def test_type_errors_of_right_arguments_stay():
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'patience'"):
        fx.callbacks.early_stopping("loss")


def counterparts(library):
    """Returns pairs of a function of fxtrain and the class or function whose place it takes."""
    if library == "torch":
        yield fx.callbacks.reduce_on_plateau, torch.optim.lr_scheduler.ReduceLROnPlateau
        yield fx.data.batches, torch.utils.data.DataLoader
        for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "RAdam", "NAdam", "Adamax"):
            yield getattr(fx.optim, name.lower()), getattr(torch.optim, name)
    elif library == "keras":
        callbacks = package("keras").callbacks
        yield fx.callbacks.early_stopping, callbacks.EarlyStopping
        yield fx.callbacks.reduce_on_plateau, callbacks.ReduceLROnPlateau
        yield fx.checkpointer, callbacks.ModelCheckpoint
    else:
        package("lightning")
        from lightning.pytorch import callbacks

        yield fx.callbacks.early_stopping, callbacks.EarlyStopping
        yield fx.checkpointer, callbacks.ModelCheckpoint
        yield fx.callbacks.time_limit, callbacks.Timer


@pytest.mark.parametrize("library", ["torch", "keras", "lightning"])
def test_every_argument_of_a_counterpart_has_advice(library):
    for ours, theirs in counterparts(library):
        parameters = inspect.signature(theirs.__init__).parameters.values()
        named = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
        for name in named - {"self", *inspect.signature(ours).parameters}:
            advice = error_of(ours, **{name: 1}).partition(f"got {name!r}.")[2]
            assert advice, f"{ours.__name__}({name}=) has no advice"
            assert "Did you mean" not in advice, f"{ours.__name__}: {name}{advice}"
            assert not mistakes(advice), (name, mistakes(advice))


def test_metrics_of_torchmetrics_are_told_to_be_adapted():
    torchmetrics = package("torchmetrics")
    measure = fx.eval_step(lambda model, batch: {"mean": torchmetrics.MeanMetric()})
    advice = "Make its class once, Measure = fxtrain.interop.torchmetric"
    assert advice in error_of(measure, fx.init(nn.Linear(1, 1)), torch.ones(1, 1))
    assert advice in error_of(fx.metrics.Collection.create, mean=torchmetrics.MeanMetric)


def test_other_foreign_objects_are_told_their_counterparts():
    keras = package("keras")
    assert "got Adam of Keras. Use fx.optim.adam with" in error_of(
        fx.init, nn.Linear(1, 1), keras.optimizers.Adam(1e-3)
    )
    decay = keras.optimizers.schedules.CosineDecay(1e-3, 100)
    assert "got CosineDecay of Keras. Use fx.schedules.cosine" in error_of(fx.optim.adam, decay)
    message = error_of(fit, checkpointer=keras.callbacks.ModelCheckpoint("x.keras"))
    assert "checkpointer: expected a checkpointer, got ModelCheckpoint of keras" in message


def test_every_optimizer_and_schedule_of_keras_has_a_counterpart():
    keras = package("keras")
    names = [name for name, kind in vars(keras.optimizers).items() if inspect.isclass(kind)]
    schedules = [name for name, kind in vars(keras.optimizers.schedules).items() if inspect.isclass(kind)]
    for room, found in ((keras.optimizers, names), (keras.optimizers.schedules, schedules)):
        for name in found:
            message = error_of(fx.init, nn.Linear(1, 1), getattr(room, name))
            assert f"got {getattr(room, name).__name__} of Keras. Use " in message, name


def test_trainer_is_told_that_fit_takes_its_place():
    lightning = package("lightning")
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, barebones=True)
    assert "got Trainer of lightning. The trainer is fxtrain.fit(" in error_of(fx.fit, trainer, STEP, [], epochs=1)
    logger = lightning.pytorch.loggers.CSVLogger("unused")
    assert "write: expected writers of fxtrain.writers, got CSVLogger of lightning" in error_of(
        fx.observers.write, logger
    )


NOTEBOOK = json.loads((test_seeds.PAGE.parent / "12_other_trainers.ipynb").read_text())
NAMES = {"fit": fx.fit, "train_step": fx.train_step, "early_stopping": fx.callbacks.early_stopping}
NAMES |= {"save_best": fx.callbacks.save_best}


def rows(title):
    """Returns the cells of the table below a title of the notebook."""
    text = next(text for cell in NOTEBOOK["cells"] if f"## {title}\n" in (text := "".join(cell["source"])))
    lines = [line for line in text.partition(f"## {title}\n")[2].splitlines() if line.startswith("|")]
    return [[part.strip() for part in line.strip("|").split(" | ")] for line in lines[2:]]


def test_code_in_the_table_of_the_notebook_is_valid(monkeypatch):
    monkeypatch.setattr(test_seeds, "NAMES", {**test_seeds.NAMES, **NAMES})
    table = [row for row in rows("Classes and arguments") if not row[0].startswith("**")]
    assert len(table) > 60
    here = [code for row in table for code in test_seeds.code(row[1]) if re.search(r"fx\.|fit\(|_step\(|_stop", code)]
    here = [
        f"dict({code})" if code.startswith("checkpointer=") else code for code in here if not code.startswith("def ")
    ]
    assert not [(code, found) for code in here if (found := test_seeds.mistake(code))]


def default(path):
    """Returns the default of ``package.function(argument)``, or skips the test if the package is missing."""
    name, argument = path.strip("`)").split("(")
    root, *attributes = name.split(".")
    found = fx if root == "fx" else package(root)
    for index, attribute in enumerate(attributes):
        if not hasattr(found, attribute):
            importlib.import_module(".".join([root, *attributes[: index + 1]]))
        found = getattr(found, attribute)
    return inspect.signature(found).parameters[argument].default


@pytest.mark.parametrize("row", rows("Defaults that differ"), ids=lambda row: f"{row[0]} {row[2]}")
def test_defaults_that_differ_are_those_of_the_installed_versions(row):
    ours, stated, theirs, other = row
    assert default(ours) == ast.literal_eval(stated.strip("`"))
    assert default(theirs) == ast.literal_eval(other.strip("`"))
    assert stated != other


def test_patience_and_clipping_are_as_the_notebook_says():
    patience = fx.callbacks.early_stopping
    assert inspect.signature(patience).parameters["patience"].default is inspect.Parameter.empty
    assert default("keras.callbacks.EarlyStopping(patience)") == 0
    assert default("lightning.pytorch.callbacks.EarlyStopping(patience)") == 3
    assert default("transformers.TrainingArguments(max_grad_norm)") == 1.0


@pytest.mark.parametrize(
    "place",
    [fx.writers.asynchronous, fx.writers.multi, fx.observers.write, fx.observers.required, fx.observers.rank_zero],
)
def test_logger_of_another_library_is_refused_in_place_of_a_writer_or_an_observer(place):
    logger = type("WandbLogger", (), {"__module__": "lightning.pytorch.loggers"})()
    assert "got WandbLogger of lightning. Use observers=[fxtrain.observers.write(" in error_of(place, logger)
