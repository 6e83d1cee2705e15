"""Folders of transformers, diffusers, peft, timm and open_clip, loaded and saved as these libraries do."""

import pytest
import torch
from zoo.operators import import_without_operators

import fxtrain as fx
from fxtrain import testing, tree

TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 12}
VISION = {**{key: TEXT[key] for key in TEXT if key != "vocab_size"}, "image_size": 4, "patch_size": 2}
KV = {"num_key_value_heads": 2}


@pytest.fixture(autouse=True, scope="module")
def _operators():
    import_without_operators()


@pytest.fixture
def transformers():
    found = pytest.importorskip("transformers", minversion="5")
    found.logging.set_verbosity_error()
    return found


MODELS = {
    "tied": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**TEXT, **KV, tie_word_embeddings=True)),
    "merged experts": lambda t: t.MixtralForCausalLM(t.MixtralConfig(**TEXT, **KV, num_local_experts=2)),
    "renamed": lambda t: t.ViTForImageClassification(t.ViTConfig(**VISION)),
    "tied with bias": lambda t: t.BertForMaskedLM(t.BertConfig(**TEXT)),
    "tied three times": lambda t: t.T5ForConditionalGeneration(
        t.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=12)
    ),
}


def different(state):
    """Returns the state with different weights."""
    return state.replace(params=tree.map(lambda leaf: leaf + 1, state.params))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_pretrained_folder_loads_like_from_pretrained(transformers, make, shards, tmp_path):
    torch.manual_seed(0)
    module = make(transformers)
    module.save_pretrained(tmp_path / "w", **({"max_shard_size": "2KB"} if shards else {}))
    assert (tmp_path / "w" / "model.safetensors.index.json").exists() == shards
    before = torch.get_rng_state()
    state = fx.load_weights(different(fx.init(module)), tmp_path / "w")
    assert torch.equal(torch.get_rng_state(), before)
    loaded = type(module).from_pretrained(tmp_path / "w")
    testing.assert_equal(fx.state_dict(state), dict(loaded.state_dict()), "what from_pretrained loads")


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_from_pretrained_loads_saved_weights(transformers, make, tmp_path):
    torch.manual_seed(0)
    state = fx.init(make(transformers))
    path = fx.save_weights(tmp_path / "w", state)
    loaded = type(make(transformers)).from_pretrained(path)
    testing.assert_equal(dict(loaded.state_dict()), fx.state_dict(state), "what was saved")
    testing.assert_equal(fx.load_weights(different(state), path).params, state.params, "what comes back")


def test_pretrained_body_loads_with_a_new_head(transformers, tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(**TEXT)
    transformers.BertModel(config).save_pretrained(tmp_path / "w")
    state = fx.init(transformers.BertForSequenceClassification(config))
    with pytest.raises(ValueError, match=r"missing \(2\): classifier"):
        fx.load_weights(state, tmp_path / "w")
    found = fx.load_weights(state, tmp_path / "w", strict=False, report=True)
    assert sorted(found.missing) == ["classifier.bias", "classifier.weight"]
    assert torch.equal(found.state.params["classifier.weight"], state.params["classifier.weight"])
    body = transformers.BertModel.from_pretrained(tmp_path / "w").state_dict()
    assert all(torch.equal(found.state.params[f"bert.{name}"], body[name]) for name in ("pooler.dense.weight",))


def test_part_loads_like_from_pretrained(transformers, tmp_path):
    torch.manual_seed(0)
    backbone = transformers.ViTModel(transformers.ViTConfig(**VISION))
    backbone.save_pretrained(tmp_path / "w")
    module = torch.nn.ModuleDict({"backbone": backbone, "head": torch.nn.Linear(8, 2)})
    found = fx.load_weights(different(fx.init(module)), tmp_path / "w", part="backbone", report=True)
    for name, value in backbone.state_dict().items():
        assert torch.equal(found.state.params[f"backbone.{name}"], value), name
    assert torch.equal(found.state.params["head.bias"], module["head"].bias + 1)


def test_head_with_another_class_count_is_reported(transformers, tmp_path):
    torch.manual_seed(0)
    transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=5)).save_pretrained(
        tmp_path / "w"
    )
    state = fx.init(transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=3)))
    with pytest.raises(ValueError, match=r"classifier.weight: expected \[3, 8\], got \[5, 8\]"):
        fx.load_weights(state, tmp_path / "w")
    found = fx.load_weights(state, tmp_path / "w", ignore_mismatched_sizes=True, report=True)
    assert sorted(found.mismatched) == ["classifier.bias", "classifier.weight"]
    assert torch.equal(found.state.params["classifier.weight"], state.params["classifier.weight"])


def test_cast_loads_a_float32_folder_into_a_bfloat16_model(transformers, tmp_path):
    torch.manual_seed(0)
    module = MODELS["renamed"](transformers)
    module.save_pretrained(tmp_path / "w")
    state = fx.init(MODELS["renamed"](transformers), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected bfloat16, got float32"):
        fx.load_weights(state, tmp_path / "w")
    found = fx.load_weights(state, tmp_path / "w", cast=True, report=True)
    assert set(found.cast.values()) == {(torch.float32, torch.bfloat16)}
    values = module.state_dict()
    assert all(torch.equal(value, values[name].bfloat16()) for name, value in found.state.params.items())
    path = fx.save_weights(tmp_path / "low", found.state)
    assert fx.load_weights(fx.init(module), path, cast=True).params["classifier.bias"].dtype == torch.float32


@pytest.fixture
def peft(transformers):
    return pytest.importorskip("peft")


def adapted(peft, transformers, seed=0, **options):
    torch.manual_seed(seed)
    base = MODELS["tied"](transformers)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "init_lora_weights": False, **options}
    return peft.get_peft_model(base, peft.LoraConfig(**{"r": 2, **options}))


def test_adapter_is_saved_and_loaded_alone(peft, transformers, tmp_path):
    state = fx.init(adapted(peft, transformers), fx.optim.adamw(0.1))
    path = fx.save_weights(tmp_path / "w", state)
    other = different(state)
    found = fx.load_weights(other, path, report=True)
    trained = [name for name in state.params if "lora_" in name or "modules_to_save" in name]
    assert sorted(found.loaded) == sorted(trained)
    for name, value in found.state.params.items():
        assert torch.equal(value, (state if name in trained else other).params[name]), name
    loaded = peft.PeftModel.from_pretrained(MODELS["tied"](transformers), path)
    theirs = peft.get_peft_model_state_dict(loaded)
    testing.assert_equal(dict(theirs), dict(peft.get_peft_model_state_dict(adapted(peft, transformers))), "by peft")
    loaded.save_pretrained(tmp_path / "theirs")
    testing.assert_equal(fx.load_weights(other, tmp_path / "theirs").params, found.state.params, "written by peft")


def test_optimizer_state_covers_only_the_adapter(peft, transformers):
    state = fx.init(adapted(peft, transformers), fx.optim.adamw(0.1))
    paths = tree.paths(state.opt_state, "opt_state")
    assert paths
    assert all("lora_" in path or "modules_to_save" in path for path in paths if "mu" in path or "nu" in path)


def test_adapter_with_another_configuration_is_refused(peft, transformers, tmp_path):
    path = fx.save_weights(tmp_path / "w", fx.init(adapted(peft, transformers)))
    with pytest.raises(ValueError, match=r"expected lora_alpha=16 in .*, as in the module, got 8"):
        fx.load_weights(fx.init(adapted(peft, transformers, lora_alpha=16)), path)
    with pytest.raises(ValueError, match=r"The folder contains an adapter. Pass a module adapted by peft"):
        fx.load_weights(fx.init(MODELS["tied"](transformers)), path)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"bias": "all"}, {"trainable_token_indices": [1, 2]}, {"modules_to_save": ["embed_tokens"]}],
    ids=str,
)
def test_adapter_variants_round_trip(peft, transformers, tmp_path, options):
    module = adapted(peft, transformers, **options).eval()
    path = fx.save_weights(tmp_path / "w", fx.init(module))
    state = fx.load_weights(fx.init(adapted(peft, transformers, **options)), path)
    tokens = torch.arange(6)[None]
    assert torch.equal(fx.view(state)(tokens).logits, module(tokens).logits)


def test_adapter_added_by_transformers_round_trips(peft, transformers, tmp_path):
    torch.manual_seed(0)
    module = MODELS["tied"](transformers)
    try:
        module.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} refuses peft {peft.__version__}: {error}")
    state = fx.init(module)
    found = fx.load_weights(different(state), fx.save_weights(tmp_path / "w", state), report=True)
    assert len(found.loaded) == 2
    assert all(torch.equal(found.state.params[name], state.params[name]) for name in found.loaded)


def test_prompt_adapter_is_refused(peft, transformers, tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    module = peft.get_peft_model(MODELS["tied"](transformers), config)
    module.save_pretrained(tmp_path / "w")
    with pytest.raises(ValueError, match=r"expected an adapter with weights, got a PromptTuningConfig\. Load"):
        fx.load_weights(fx.init(module), tmp_path / "w")


def test_merged_weights_give_the_outputs_of_the_adapted_model(peft, transformers, tmp_path):
    module = adapted(peft, transformers).eval()
    state = fx.init(module)
    before = state.copy()
    path = fx.save_weights(tmp_path / "w", state, convert=lambda model: model.merge_and_unload())
    testing.assert_equal(state, before, "the state")
    merged = transformers.LlamaForCausalLM.from_pretrained(path).eval()
    tokens = torch.arange(6)[None]
    assert torch.allclose(merged(tokens).logits, module(tokens).logits, atol=1e-5)
    fx.save_weights(tmp_path / "again", state)  # the module of the state was not merged


def test_resumed_lora_run_equals_the_uninterrupted_run(peft, transformers, tmp_path):
    tx, data = fx.optim.adamw(0.1), [torch.arange(6)[None] + i for i in range(4)]

    def loss_fn(model, batch):
        return model(batch, labels=batch).loss

    def run(state, steps):
        return fx.fit(state, fx.train_step(loss_fn, tx), data, steps=steps).state

    whole = run(fx.init(adapted(peft, transformers), tx), 4)
    path = fx.save(tmp_path / "c", run(fx.init(adapted(peft, transformers), tx), 2))
    testing.assert_equal(run(fx.restore(path, like=fx.init(adapted(peft, transformers, 5), tx)), 4), whole, "resumed")
    with pytest.raises(fx.CheckpointError, match=r"Only the checkpoint has LoRA parameters.*merge_and_unload"):
        fx.restore(path, like=fx.init(MODELS["tied"](transformers), tx))


def test_diffusers_folder_round_trips(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    options = {"block_out_channels": (4, 4), "norm_num_groups": 2, "layers_per_block": 1, "sample_size": 4}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    torch.manual_seed(0)
    module = diffusers.UNet2DModel(**options, **blocks, add_attention=False)
    module.save_pretrained(tmp_path / "w")
    state = fx.load_weights(different(fx.init(module)), tmp_path / "w")
    testing.assert_equal(fx.state_dict(state), dict(module.state_dict()), "a folder of diffusers")
    path = fx.save_weights(tmp_path / "v", state)
    loaded = diffusers.UNet2DModel.from_pretrained(path)
    testing.assert_equal(dict(loaded.state_dict()), dict(module.state_dict()), "a folder for diffusers")


def test_timm_folder_loads(tmp_path):
    timm = pytest.importorskip("timm")
    module = timm.create_model("resnet10t", num_classes=2)
    timm.models.save_for_hf(module, tmp_path / "w", model_config=None)
    state = fx.load_weights(different(fx.init(module)), tmp_path / "w")
    testing.assert_equal(fx.state_dict(state), dict(module.state_dict()), "a folder of timm")


def test_open_clip_folder_loads(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    vision = {"image_size": 8, "layers": 1, "width": 8, "head_width": 4, "patch_size": 4}
    text = {"context_length": 6, "vocab_size": 12, "width": 8, "heads": 2, "layers": 1}
    module = open_clip.CLIP(8, vision, text)
    (tmp_path / "w").mkdir()
    weights = {name: value.contiguous() for name, value in module.state_dict().items()}
    save_file(weights, tmp_path / "w" / "open_clip_model.safetensors")
    state = fx.load_weights(different(fx.init(module)), tmp_path / "w")
    testing.assert_equal(fx.state_dict(state), dict(module.state_dict()), "a folder of open_clip")
