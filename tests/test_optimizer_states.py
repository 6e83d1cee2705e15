"""Optimizer states of ``torch.optim``, loaded and converted back: further steps equal those of torch."""

import json

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from zoo.operators import import_without_operators

import fxtrain as fx
from fxtrain import optim

BEFORE, AFTER = 3, 4


class Net(nn.Module):
    """A model with tied weights, a frozen parameter and an unused parameter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.hidden = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3, bias=False).requires_grad_(False)
        self.idle = nn.Linear(3, 1)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.frozen(torch.tanh(self.hidden(self.norm(self.embedding(tokens))))))


def net(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    module = Net()
    for value in module.parameters():
        value.data = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(dtype)
    return module


def batch(step):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, 5, (2, 4), generator=generator)


def loss_fn(model, tokens):
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def plain_loop(module, optimizer, steps, scheduler=None):
    for step in steps:
        optimizer.zero_grad()
        loss_fn(module, batch(step)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def trained(state, tx, steps):
    step = fx.train_step(loss_fn, tx)
    for index in steps:
        state, _ = step(state, batch(index))
    return state


def assert_same(state, module, tolerance=1e-12):
    for name, value in module.named_parameters():
        torch.testing.assert_close(
            state.params[name], value.detach(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )


CASES = {
    "SGD": {"lr": 0.1},
    "SGD momentum": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "SGD dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    "Adam": {"lr": 0.01, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "AdamW amsgrad": {"lr": 0.01, "amsgrad": True},
    "Adamax": {"lr": 0.01},
    "NAdam": {"lr": 0.01, "weight_decay": 0.1},
    "RAdam": {"lr": 0.01},
    "RMSprop": {"lr": 0.01},
    "RMSprop momentum": {"lr": 0.01, "centered": True, "momentum": 0.9},
    "Adagrad": {"lr": 0.01},
    "Adagrad decay": {"lr": 0.01, "lr_decay": 0.1},
    "Adadelta": {"lr": 0.5},
    "ASGD": {"lr": 0.1, "lambd": 0.1, "t0": 2.0},
    "Rprop": {"lr": 0.01},
    "Adafactor": {"lr": 0.1, "weight_decay": 0.1},
}


def made(case, params):
    return getattr(torch.optim, case.partition(" ")[0])(params, **CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_steps_after_loading_equal_torch(case, double):
    module = net()
    optimizer = made(case, module.parameters())
    tx = optim.from_torch(type(optimizer), **CASES[case])
    plain_loop(module, optimizer, range(BEFORE))
    state = fx.load_optimizer_state(fx.init(module, tx), optimizer)
    plain_loop(module, optimizer, range(BEFORE, BEFORE + AFTER))
    assert_same(trained(state, tx, range(BEFORE, BEFORE + AFTER)), module)


@pytest.mark.parametrize("case", CASES)
def test_torch_continues_from_the_converted_state(case, double):
    module = net()
    tx = optim.from_torch(getattr(torch.optim, case.partition(" ")[0]), **CASES[case])
    state = trained(fx.init(module, tx), tx, range(BEFORE))
    module.load_state_dict(fx.state_dict(state))
    optimizer = made(case, module.parameters())
    optimizer.load_state_dict(fx.optimizer_state_dict(state, optimizer))
    plain_loop(module, optimizer, range(BEFORE, BEFORE + AFTER))
    assert_same(trained(state, tx, range(BEFORE, BEFORE + AFTER)), module)


def test_muon_state_converts_both_ways(double):
    module = nn.Linear(3, 4, bias=False, dtype=torch.float64)
    optimizer = torch.optim.Muon(module.parameters(), lr=0.1)

    def loss_fn(model, rows):
        return model(rows).square().mean()

    def loop(steps):
        for index in steps:
            optimizer.zero_grad()
            loss_fn(module, torch.full((2, 3), 1.0 + index)).backward()
            optimizer.step()

    loop(range(2))
    tx = optim.from_torch(torch.optim.Muon, lr=0.1)
    state = fx.load_optimizer_state(fx.init(module, tx), optimizer)
    saved = fx.optimizer_state_dict(state, optimizer)
    torch.testing.assert_close(
        saved["state"][0]["momentum_buffer"], optimizer.state_dict()["state"][0]["momentum_buffer"]
    )
    loop([2])
    state, _ = fx.train_step(loss_fn, tx)(state, torch.full((2, 3), 3.0))
    torch.testing.assert_close(state.params["weight"], module.weight.detach(), rtol=1e-12, atol=1e-12)


def test_state_of_complex_parameters_converts_both_ways(double):
    module = nn.Linear(2, 2, bias=False, dtype=torch.complex128)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    tx = optim.from_torch(torch.optim.Adam, lr=0.1)

    def loss_fn(model, rows):
        return model(rows).abs().square().sum()

    def loop(steps):
        for index in steps:
            optimizer.zero_grad()
            loss_fn(module, torch.full((1, 2), 1.0 + index + 1j)).backward()
            optimizer.step()

    loop(range(2))
    state = fx.load_optimizer_state(fx.init(module, tx), optimizer)
    back = fx.optimizer_state_dict(state, optimizer)["state"][0]
    for key, value in optimizer.state_dict()["state"][0].items():
        torch.testing.assert_close(back[key], value)
    loop([2])
    state, _ = fx.train_step(loss_fn, tx)(state, torch.full((1, 2), 3.0 + 1j))
    torch.testing.assert_close(state.params["weight"], module.weight.detach(), rtol=1e-12, atol=1e-12)


def test_update_counts_are_per_parameter():
    module = net(torch.float32)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    plain_loop(module, optimizer, range(BEFORE))
    state = fx.load_optimizer_state(fx.init(module, optim.adamw(0.01, weight_decay=0.01)), optimizer)
    count = state.opt_state[0].count
    assert (int(count["hidden.weight"]), int(count["idle.weight"])) == (BEFORE, 0)
    assert ("frozen.weight",) not in count.paths


def test_missing_momentum_buffers_start_at_the_next_gradient(double):
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, dampening=0.3)
    saved = optimizer.state_dict()
    saved["state"] = {index: {"momentum_buffer": None} for index in saved["param_groups"][0]["params"][:4]}
    tx = optim.from_torch(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.3)
    state = fx.load_optimizer_state(fx.init(module, tx), saved, step=0)
    optimizer.load_state_dict(saved)
    plain_loop(module, optimizer, range(2))
    assert_same(trained(state, tx, range(2)), module)


def decay_groups(module):
    trainable = [value for value in module.parameters() if value.requires_grad]
    return [
        {"params": [value for value in trainable if value.ndim > 1], "weight_decay": 0.1},
        {"params": [value for value in trainable if value.ndim <= 1], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("container", ["file", "entry", "trainer", "lightning"])
def test_checkpoint_with_groups_and_schedule_continues(container, double, tmp_path):
    module = net()
    optimizer = torch.optim.AdamW(decay_groups(module), lr=0.01)
    scheduler = lr_scheduler.StepLR(optimizer, 2, 0.5)
    plain_loop(module, optimizer, range(BEFORE), scheduler)
    path = tmp_path / "last.ckpt"
    if container == "file":
        torch.save(optimizer.state_dict(), path)
    elif container == "entry":
        torch.save({"model": {}, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, path)
    elif container == "lightning":
        contents = {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [scheduler.state_dict()]}
        torch.save({"state_dict": {}, "global_step": BEFORE, **contents}, path)
    else:
        path = tmp_path
        torch.save(optimizer.state_dict(), path / "optimizer.pt")
        torch.save(scheduler.state_dict(), path / "scheduler.pt")
        (path / "trainer_state.json").write_text(json.dumps({"global_step": BEFORE}))
    tx = optim.adamw(
        fx.schedules.exponential(0.01, 2, decay_rate=0.5, staircase=True),
        weight_decay=0.1,
        mask=lambda name, leaf: leaf.ndim > 1,
    )
    state = fx.load_optimizer_state(fx.init(module, tx), path)
    plain_loop(module, optimizer, range(BEFORE, BEFORE + AFTER), scheduler)
    assert_same(trained(state, tx, range(BEFORE, BEFORE + AFTER)), module)


def test_partition_groups_convert_both_ways(double):
    module = net()
    groups = [
        {"params": list(module.hidden.named_parameters("hidden")), "lr": 0.1},
        {
            "params": [
                (name, value)
                for name, value in module.named_parameters()
                if value.requires_grad and not name.startswith("hidden.")
            ]
        },
    ]
    optimizer = torch.optim.Adam(groups, lr=0.01)
    tx = optim.partition(
        {"hidden": optim.adam(0.1), "rest": optim.adam(0.01)},
        lambda path, leaf: "hidden" if path.startswith("hidden.") else "rest",
    )
    plain_loop(module, optimizer, range(BEFORE))
    state = fx.load_optimizer_state(fx.init(module, tx), optimizer)
    back = fx.optimizer_state_dict(state, optimizer)
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            torch.testing.assert_close(back["state"][index][key], value)
    plain_loop(module, optimizer, range(BEFORE, BEFORE + AFTER))
    assert_same(trained(state, tx, range(BEFORE, BEFORE + AFTER)), module)


def test_injected_hyperparameters_equal_those_of_the_groups(double):
    module = net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, betas=(0.8, 0.9))
    plain_loop(module, optimizer, range(BEFORE))
    optimizer.param_groups[0]["lr"] = 0.002
    tx = optim.inject_hyperparams(optim.adamw)(learning_rate=0.01, b1=0.9, b2=0.9, weight_decay=0.01)
    state = fx.load_optimizer_state(fx.init(module, tx), optimizer)
    plain_loop(module, optimizer, range(BEFORE, BEFORE + AFTER))
    assert_same(trained(state, tx, range(BEFORE, BEFORE + AFTER)), module)


def test_bfloat16_second_moments_are_widened_to_float32():
    module = net(torch.bfloat16)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    plain_loop(module, optimizer, range(BEFORE))
    state = fx.load_optimizer_state(fx.init(module, optim.adamw(0.01, weight_decay=0.01)), optimizer)
    entry = optimizer.state[module.hidden.weight]
    kept = state.opt_state[0]
    assert (kept.mu["hidden.weight"].dtype, kept.nu["hidden.weight"].dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(kept.mu["hidden.weight"], entry["exp_avg"])
    assert torch.equal(kept.nu["hidden.weight"], entry["exp_avg_sq"].float())
    optimizer.load_state_dict(fx.optimizer_state_dict(state, optimizer))
    assert torch.equal(optimizer.state[module.hidden.weight]["exp_avg_sq"], entry["exp_avg_sq"])


@pytest.mark.parametrize(
    ("tx", "change", "words"),
    [
        (optim.sgd(0.1, momentum=0.9), None, "expected momentum_buffer in the optimizer state of 'embedding.weight'"),
        (optim.sgd(0.1), None, "'embedding.weight' to have nothing, got exp_avg, exp_avg_sq as well"),
        (optim.lion(0.1), None, "to have exp_avg, got exp_avg_sq as well"),
        (optim.adam(0.1, amsgrad=True), None, "expected max_exp_avg_sq"),
        (optim.adamax(0.1), None, "expected exp_inf"),
        (optim.rmsprop(0.1, momentum=0.9), None, "applies it after. Use fx.optim.from_torch(torch.optim.RMSprop"),
        (optim.chain(optim.ema(0.9), optim.sgd(0.1)), None, "in torch.optim, got EmaState, which has none"),
        (optim.adam(0.1), lambda saved: saved["param_groups"][0].update(params=[0, 1]), "differ in number"),
        (
            optim.adam(0.1),
            lambda saved: saved["state"][0].update(exp_avg=torch.zeros(2), exp_avg_sq=torch.zeros(2)),
            "differ in number or shape",
        ),
        (
            optim.adam(0.1),
            lambda saved: saved["state"][0].update(exp_avg_sq=torch.zeros(2)),
            "expected exp_avg_sq of 'embedding.weight' to have shape [5, 3], got [2]",
        ),
        (
            optim.adam(0.1),
            lambda saved: saved["state"].update({5: {"step": 1.0, "exp_avg": torch.zeros(3, 3)}}),
            "got state for 'frozen.weight', which is frozen",
        ),
    ],
)
def test_mismatched_optimizer_states_are_refused_by_name(tx, change, words):
    module = net(torch.float32)
    optimizer = torch.optim.Adam(module.parameters())
    plain_loop(module, optimizer, range(1))
    saved = optimizer.state_dict()
    if change is not None:
        change(saved)
    state = fx.init(module, tx)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        fx.load_optimizer_state(state, saved)
    assert words in str(caught.value)


def test_loss_scale_is_loaded_from_a_checkpoint(tmp_path):
    module = net(torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = {
        "scale": 1024.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 7,
    }
    torch.save({"optimizer": optimizer.state_dict(), "scaler": scaler}, tmp_path / "last.pt")
    tx = optim.sgd(0.1)
    state = fx.load_optimizer_state(fx.init(module, tx), tmp_path / "last.pt")
    expected = fx.attach(fx.init(module, tx), fx.train_step(loss_fn, tx, precision="fp16"))
    assert fx.tree.structure(state.slots) == fx.tree.structure(expected.slots)
    assert [float(leaf) for leaf in fx.tree.leaves(state.slots)] == [1024.0, 7.0]


def test_ambiguous_groups_require_names():
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(
        [{"params": module["b"].parameters()}, {"params": module["a"].parameters()}], lr=0.1, momentum=0.9
    )
    for value in module.parameters():
        value.grad = torch.ones_like(value)
    module["b"].weight.grad *= 2
    optimizer.step()
    state = fx.init(module, optim.sgd(0.1, momentum=0.9))
    with pytest.raises(ValueError, match="Pass their names, in the optimizer's order, as names="):
        fx.load_optimizer_state(state, optimizer)
    names = ["b.weight", "b.bias", "a.weight", "a.bias"]
    state = fx.load_optimizer_state(state, optimizer, names=names)
    assert float(state.opt_state[0].trace["b.weight"][0, 0]) == 2.0


def test_optimizer_state_of_a_peft_adapter_continues():
    import_without_operators()
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    module = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0", "2"], r=2)).double()
    optimizer = torch.optim.AdamW([value for value in module.parameters() if value.requires_grad], lr=0.01)

    def loss_fn(model, rows):
        return model(rows).square().mean()

    rows = torch.ones(2, 3, dtype=torch.float64)

    def loop(count):
        for _ in range(count):
            optimizer.zero_grad()
            loss_fn(module, rows).backward()
            optimizer.step()

    loop(2)
    tx = optim.adamw(0.01, weight_decay=0.01)
    state = fx.load_optimizer_state(fx.init(module, tx), optimizer)
    loop(2)
    step = fx.train_step(loss_fn, tx)
    for _ in range(2):
        state, _ = step(state, rows)
    assert_same(state, module, 1e-9)  # float32 counts in torch, because the default dtype is float32
