"""Configurations of ``fxtrain train``: factories, shared objects, changes on the command line, and texts of errors."""

import pathlib
import sys

import pytest
import torch
import yaml
from trainings import CONFIG, MODULE

from fxtrain.cli import main


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder with the package and the configuration, which is the current one."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


def printed(capsys, *arguments):
    """Returns what --print-config prints."""
    assert main(["train", *arguments, "--print-config"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys, *arguments):
    """Returns the error of a configuration, after which nothing is left on the disk."""
    assert main(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fxtrain train: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("fxtrain train: ").strip()


def test_printed_config_is_complete_and_prints_itself(shop, capsys):
    first = printed(capsys, "run.yaml")
    found = yaml.safe_load(first)
    assert found["seed"] == 0
    assert found["model"] == {"shop.Net": {"width": 16}}
    assert found["optimizer"]["chain"][0] == {"clip_by_global_norm": {"max_norm": 1.0}}
    assert found["optimizer"]["chain"][1]["adamw"]["weight_decay"] == 1e-4
    assert found["callbacks"][1] == {"shop.stop_when_good": {"threshold": 0.01}}
    (shop / "complete.yaml").write_text(first)
    assert printed(capsys, "complete.yaml") == first


def test_change_inside_an_empty_value_makes_a_mapping(shop, capsys):
    (shop / "complete.yaml").write_text(printed(capsys, "run.yaml"))
    found = yaml.safe_load(printed(capsys, "complete.yaml", "run.name=first"))
    assert found["run"] == {"name": "first"}


def test_printed_config_keeps_anchors(shop, capsys):
    text = printed(capsys, "run.yaml")
    assert "- &log\n      jsonl:" in text
    assert "- *log\n" in text


def test_scalars_are_those_of_yaml_1_2(shop, capsys):
    found = yaml.safe_load(printed(capsys, "run.yaml", "shared={on: off, no: 1e-3, time: 12:30, octal: 010}"))
    assert found["shared"] == {"on": "off", "no": 1e-3, "time": "12:30", "octal": 10}


def test_objects_with_an_anchor_are_made_once(shop, capsys):
    observers = "[&a {shop.Log: {}}, {shop.pair: [*a, {shop.Log: {}}]}]"
    assert main(["train", "run.yaml", f"observers={observers}", "steps=0"]) == 0
    first, other, pair = sys.modules["shop"].MADE
    assert pair == (first, other)
    assert first is not other


def test_shared_objects_may_be_defined_ahead(shop, capsys):
    (shop / "run.yaml").write_text("shared: &log {shop.Log: {}}\n" + CONFIG.split("observers:")[0] + "compile: false\n")
    with (shop / "run.yaml").open("a") as file:
        file.write("observers: [*log, {shop.pair: {first: *log, second: *log}}]\nsteps: 0\n")
    assert main(["train", "run.yaml"]) == 0
    first, pair = sys.modules["shop"].MADE
    assert pair == (first, first)


@pytest.mark.parametrize(
    "optimizer",
    [
        "{adamw: {learning_rate: 0.1, mask: shop.is_matrix}}",
        "{partition: {transforms: {matrix: {muon: [0.1]}, other: {sgd: [0.1]}}, labels: shop.label}}",
        "{from_torch: {optimizer: torch.optim.SGD, lr: 0.1}}",
        "{chain: {transforms: [{lion: [1e-3]}]}}",
    ],
)
def test_optimizers_take_functions_classes_and_mappings_of_optimizers(shop, capsys, optimizer):
    text = printed(capsys, "run.yaml", f"optimizer={optimizer}")
    (shop / "complete.yaml").write_text(text)
    assert printed(capsys, "complete.yaml") == text
    assert main(["train", "complete.yaml", "steps=1", "observers=[]", "eval_data=null", "callbacks=[]"]) == 0
    assert "reached 1 steps" in capsys.readouterr().out


def test_a_mapping_of_one_optimizer_is_no_call(shop, capsys):
    partition = "optimizer={partition: {transforms: {sgd: {adam: [0.1]}}, labels: shop.label}}"
    found = yaml.safe_load(printed(capsys, "run.yaml", partition))["optimizer"]["partition"]
    assert list(found["transforms"]["sgd"]) == ["adam"]


def test_data_may_be_a_loader_of_torch(shop, capsys):
    loader = "{torch.utils.data.DataLoader: {dataset: {shop.examples: }, batch_size: 8}}"
    changes = [f"data={loader}", "steps=1", "observers=[]", "eval_data=null", "callbacks=[]"]
    assert main(["train", "run.yaml", *changes]) == 0


def test_interrupt_while_objects_are_made_leaves_nothing(shop, capsys):
    assert main(["train", "run.yaml", "data={shop.interrupted: }"]) == 130
    assert capsys.readouterr().err == "\nfxtrain: interrupted.\n"
    assert not (shop / "runs").exists()


def test_values_without_a_literal_in_yaml_are_strings_and_lists(shop, capsys):
    text = "{path: $RUN/a, speed: FAST, dtype: torch.bfloat16, kind: shop.Net, rest: [1, 2.5], b: 3}"
    change = f"observers=[{{shop.typed: {text}}}]"
    found = yaml.safe_load(printed(capsys, "run.yaml", change))["observers"][0]["shop.typed"]
    assert found == yaml.safe_load(text)
    assert main(["train", "run.yaml", change, "steps=0"]) == 0
    [(path, speed, dtype, kind, rest, options)] = sys.modules["shop"].MADE
    assert path == next((shop / "runs").iterdir()) / "a"
    assert (speed.name, dtype, kind.__name__, rest, options) == ("FAST", torch.bfloat16, "Net", (1, 2.5), {"b": 3})


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("epochs=7", ("epochs",), 7),
        ("optimizer.chain[1].adamw.b1=0.8", ("optimizer", "chain", 1, "adamw", "b1"), 0.8),
        ("model.shop.Net.width=4", ("model", "shop.Net", "width"), 4),
        ("callbacks[0].early_stopping.min_delta=1", ("callbacks", 0, "early_stopping", "min_delta"), 1),
        ("callbacks[1].shop.stop_when_good={threshold: 1}", ("callbacks", 1, "shop.stop_when_good", "threshold"), 1),
        ("run.name=first", ("run", "name"), "first"),
        ("compile.mode=max-autotune", ("compile", "mode"), "max-autotune"),
    ],
)
def test_changes_on_the_command_line_have_priority(shop, capsys, change, path, value):
    if change.startswith("compile"):
        (shop / "run.yaml").write_text(CONFIG.replace("compile: false", ""))
    found = yaml.safe_load(printed(capsys, "run.yaml", change))
    for key in path:
        found = found[key]
    assert found == value


def test_config_option_has_the_arguments_of_a_function_or_the_configuration(shop, capsys):
    (shop / "arguments.yaml").write_text("width: 4\nlr: 1e-3\n")
    found = yaml.safe_load(printed(capsys, "shop:baseline", "--config", "arguments.yaml", "lr=1"))
    assert found == {"function": "shop:baseline", "width": 4, "steps": 20, "lr": 1}
    assert printed(capsys, "--config", "run.yaml", "epochs=2") == printed(capsys, "run.yaml", "epochs=2")
    error = refused(capsys, "run.yaml", "--config", "arguments.yaml")
    assert error == "expected one configuration, got run.yaml and --config arguments.yaml. Give one of them."


def test_function_takes_its_arguments_from_a_file_or_changes(shop, capsys):
    text = printed(capsys, "shop:baseline", "width=4", "lr=1e-3")
    assert yaml.safe_load(text) == {"function": "shop:baseline", "width": 4, "steps": 20, "lr": 1e-3}
    (shop / "function.yaml").write_text(text)
    assert printed(capsys, "function.yaml") == text
    assert yaml.safe_load(printed(capsys, "shop.py:baseline"))["function"] == "shop.py:baseline"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("modle=3", "expected an argument of the configuration, got modle. Did you mean 'model'?"),
        (
            "callbacks[0].early_stopping.pateince=5",
            "expected an argument of early_stopping, got callbacks[0].early_stopping.pateince. "
            "Did you mean 'patience'?",
        ),
        (
            "callbacks[0].early_stopping.patience=x",
            "expected callbacks[0].early_stopping.patience to be an int, got 'x'.",
        ),
        (
            "callbacks[0].early_stopping.patience=true",
            "expected callbacks[0].early_stopping.patience to be an int, got True.",
        ),
        (
            "callbacks[0].early_stopping.patience=0",
            "expected callbacks[0].early_stopping.patience to be a positive int, got 0.",
        ),
        (
            "callbacks[0].early_stopping={metric: loss}",
            "expected callbacks[0].early_stopping.patience, which early_stopping requires, got none. Give it.",
        ),
        (
            "callbacks=[{early_stoping: {metric: loss}}]",
            "expected callbacks[0] to be a Callback, got {'early_stoping': {'metric': 'loss'}}. "
            "Did you mean 'early_stopping'?",
        ),
        (
            "callbacks=[{nan_guard: 3}]",
            "expected the arguments of callbacks[0].nan_guard as a mapping or a list, got 3. Write nan_guard: [3].",
        ),
        (
            "callbacks=[nan_guard]",
            "callbacks: expected the result of fxtrain.callbacks.nan_guard(...), got the function itself. Call it.",
        ),
        ("callbacks={nan_guard: }", "expected callbacks to be a list of Callbacks, got a Handler."),
        (
            "callbacks=[{shop.stop_when_god: }]",
            "expected callbacks[0].shop.stop_when_god to name an object, got 'shop.stop_when_god', which shop "
            "lacks. Did you mean 'stop_when_good'?",
        ),
        (
            "callbacks=[{nowhere.callback: }]",
            "expected callbacks[0].nowhere.callback to name an object, got 'nowhere.callback', which cannot be "
            "imported (ModuleNotFoundError: No module named 'nowhere'). Check the name, and run the command in the "
            "folder of the package.",
        ),
        (
            "callbacks=[{math.pi: }]",
            "expected callbacks[0].math.pi to name a function or a class, got 3.141592653589793. Check the name.",
        ),
        (
            "optimizer={adamm: {learning_rate: 1}}",
            "expected optimizer to be a GradientTransformation, got {'adamm': {'learning_rate': 1}}. "
            "Did you mean 'adam'?",
        ),
        (
            "optimizer.chain[1].adamw.learning_rate={cosin: {init_value: 1}}",
            "expected optimizer.chain[1].adamw.learning_rate to be a number, a Tensor or a function, got {'cosin': "
            "{'init_value': 1}}. Did you mean 'cosine'?",
        ),
        (
            "optimizer.chain[1].adamw.learning_rate=-1",
            "expected optimizer.chain[1].adamw.learning_rate to be at least 0, got -1.",
        ),
        ("optimizer={chain: [3]}", "expected optimizer.chain[0] to be a GradientTransformation, got 3."),
        (
            "optimizer={chain: {transforms: 3}}",
            "expected optimizer.chain.transforms to be a list, got 3. Give a list.",
        ),
        ("model={shop.Wide: {width: x}}", "expected model.shop.Wide.width to be an int, got 'x'."),
        ("model=shop.Net", "expected model to be a Module, got shop.Net, which is the class Net."),
        (
            "model={Linear: [2]}",
            "expected model.Linear.out_features, which Linear requires, got none. Give it.",
        ),
        (
            "model={Linear: [2, 2, true, null, null, 4]}",
            "expected at most 5 positional arguments of model.Linear, got 6. Give the others by name, in a mapping: "
            "in_features, out_features, bias, device, dtype.",
        ),
        (
            "loss=loss_fn",
            "expected loss to be a name in torch.nn.functional, or a dotted name, got 'loss_fn'. Names of other "
            "packages have a dot: my_package.my_function.",
        ),
        (
            "loss=shop.los_fn",
            "expected loss to name an object, got 'shop.los_fn', which shop lacks. Did you mean 'loss_fn'?",
        ),
        ("observers=[{write: {writers: [3]}}]", "expected observers[0].write.writers[0] to be a Writer, got 3."),
        (
            "observers=[{shop.pair: {first: 1, second: 2, healthy: [1, a]}}]",
            "expected observers[0].shop.pair.healthy to be a list of numbers, got [1, 'a'].",
        ),
        ("observers=[&a {shop.pair: [*a, 1]}]", "alias inside of its own anchor. Remove it."),
        ("epochs=1.5", "expected epochs to be an int or null, got 1.5."),
        ("epochs=null", "expected epochs, steps or both, got neither. Give the length of the run."),
        ("precision=bf17", "expected precision to be 'fp32', 'bf16', 'fp16', None or an fxtrain.Policy, got 'bf17'."),
        (
            "differentiate=aut",
            "expected differentiate to be 'auto', 'func' or 'autograd', got 'aut'. Did you mean 'auto'?",
        ),
        ("device=abacus", "expected device to be available, got abacus ("),
        (
            "compile={fullgrap: true}",
            "expected an argument of compile, got compile.fullgrap. Did you mean 'fullgraph'?",
        ),
        ("run={nme: x}", "expected an argument of run, got run.nme. Did you mean 'name'?"),
        ("data.batches.batch_size=0", "expected data.batches.batch_size to be a positive int, got 0."),
        ("data={shop.broken: }", "data.shop.broken: KeyError: 'nothing' in "),
        (
            "callbacks[7].save.every=1",
            "expected an index below 3 in callbacks[7].save.every, got 7. Correct the index.",
        ),
        ("callbacks.save=1", "expected a mapping before 'save' in callbacks.save, got a list of length 3."),
        (
            "callbacks[0=1",
            "expected a key such as callbacks[0].early_stopping.patience, got 'callbacks[0'. Correct it.",
        ),
        ("steps", "expected KEY=VALUE, got 'steps'. Write a change as steps=100."),
        ("loss={", "expected YAML in the value of loss, got "),
        ("--steps=5", "expected one of the options --config, --runs, --resume, --print-config, --debug, --help, got "),
        ("--rusume", "got --rusume. Did you mean 'resume'?"),
    ],
)
def test_mistake_is_an_error_with_its_path_before_anything_is_created(shop, capsys, change, message):
    assert message in refused(capsys, "run.yaml", change)
    assert not (shop / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a YAML file or a function MODULE:FUNCTION, got none. See fxtrain train --help."),
        (["no.yaml"], "expected a readable YAML file, got no.yaml (No such file or directory). Check the path."),
        (["shop.py"], "expected YAML in shop.py, got "),
        (["shop.py"], "got a Python file. Name its function: shop.py:FUNCTION."),
        (["list.yaml"], "expected a mapping in list.yaml, got a list of length 1. Write key: value."),
        (["twice.yaml"], "expected YAML in twice.yaml, got the key 'a' twice in line 2. Correct the file."),
        (["shop:baselin"], "which shop lacks. Did you mean 'baseline'?"),
        (["shop:baseline", "widht=3"], "expected an argument of shop:baseline, got widht. Did you mean 'width'?"),
        (["shop:baseline", "width=3.5"], "expected width to be an int, got 3.5."),
        (["no.py:baseline"], "expected a Python file, got no.py, which does not exist. Check the path."),
        (["bad.py:run"], "expected bad.py to be imported, got ZeroDivisionError: division by zero. Correct the file."),
        (["json.py:run"], "expected a file with a new module name, got json.py, as json is loaded. Rename it."),
        (
            ["shop:nothing"],
            "expected shop:nothing to return the arguments of fxtrain.fit, got None. Return dict(state=",
        ),
        (["shop:incomplete"], "expected shop:incomplete to return the arguments of fxtrain.fit, got no step."),
        (["shop:misnamed"], "arguments of fxtrain.fit, got 'callback'. Did you mean 'callbacks'?"),
        (["shop:broken"], "KeyError: 'nothing' in "),
    ],
)
def test_wrong_target_is_an_error_before_anything_is_created(shop, capsys, arguments, message):
    (shop / "list.yaml").write_text("- 1\n")
    (shop / "twice.yaml").write_text("a: 1\na: 2\n")
    (shop / "bad.py").write_text("1 / 0\n")
    (shop / "json.py").write_text("def run(): ...\n")
    assert message in refused(capsys, *arguments)
    assert not (shop / "runs").exists()


def test_debug_shows_the_traceback_of_an_error(shop, capsys):
    assert main(["train", "run.yaml", "data={shop.broken: }", "--debug"]) == 2
    err = capsys.readouterr().err
    assert 'return {}["nothing"]' in err
    assert err.splitlines()[-1].startswith("fxtrain train: data.shop.broken: KeyError: 'nothing' in ")


GUIDE = (pathlib.Path(__file__).parents[1] / "notebooks/configuration.md").read_text()
GUIDE_MODULE = """
Classifier, load_all = Net, load


def load(split: str):
    return load_all(128 if split == "train" else 64)


def stop_when_accurate(threshold: float):
    return stop_when_good(1 - threshold)
"""


def test_configuration_of_the_guide_is_accepted(shop, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "my_package", raising=False)
    (shop / "my_package.py").write_text(MODULE + GUIDE_MODULE)
    (shop / "guide.yaml").write_text(GUIDE.split("```yaml\n")[1].split("```")[0])
    assert main(["train", "guide.yaml", "steps=1", "compile=false"]) == 0
    assert "reached 1 steps" in capsys.readouterr().out


def test_errors_of_the_guide_are_the_errors(shop, capsys):
    errors = GUIDE.split("```text\n")[1].split("```")[0].splitlines()
    assert refused(capsys, "run.yaml", "callbacks[0].early_stopping.pateince=5") == errors[0]
    assert refused(capsys, "run.yaml", "callbacks[0].early_stopping.patience=0") == errors[1]
    assert refused(capsys, "run.yaml", "optimizer.chain[1].adamw.learning_rate={cosin: {}}") == errors[2]


def test_rooms_of_the_guide_are_the_rooms(shop, capsys):
    for key, name in (
        ("model", "Linear"),
        ("optimizer", "cosine"),
        ("data", "windows"),
        ("callbacks", "every"),
        ("observers", "jsonl"),
        ("eval_when", "every"),
    ):
        error = refused(capsys, "run.yaml", f"{key}={{{name}: {{nothing: 1}}}}")
        assert error.startswith(f"expected an argument of {name}, got {key}.{name}.nothing."), error
