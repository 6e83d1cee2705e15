"""Packed rows in models of transformers: the loss and the gradients equal those of single texts."""

import random

import pytest
import torch
import torch.nn.functional as F

import fxtrain as fx
from fxtrain.data import attention_mask, next_tokens, packed, pad
from zoo.operators import import_without_operators

SIZES = {"vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}


def llama(transformers):
    config = transformers.LlamaConfig(**SIZES, intermediate_size=16, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config)


def gpt2(transformers):
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=30, n_embd=8, n_head=2, n_layer=2, n_positions=32, **none)
    )


def loss_fn(model, batch):
    segments = batch.get("segments", batch["mask"])
    labels = next_tokens(batch["x"], segments, shift=False)
    positions = batch.get("positions", torch.arange(segments.shape[1])[None])
    mask = attention_mask(segments, dtype=torch.float64)
    output = model(input_ids=batch["x"], attention_mask=mask, position_ids=positions, labels=labels)
    # The loss is recomputed in float64, because transformers computes it in float32.
    targets = next_tokens(batch["x"], segments)
    exact = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    return fx.weighted(exact, (labels != -100).sum()), {"own": output.loss}


# The tolerance of Llama is larger, because its norms are computed in float32 in a model of any dtype.
@pytest.mark.parametrize(("make", "atol"), [(llama, 1e-7), (gpt2, 1e-12)])
def test_packed_rows_train_as_texts_one_by_one(make, atol):
    import_without_operators()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    generator = random.Random(0)
    texts = [[generator.randrange(1, 30) for _ in range(generator.randint(2, 9))] for _ in range(8)]
    state, find = fx.init(make(transformers).double()), fx.gradients(loss_fn)
    rows = packed(texts, 16, 2, drop_last=False)
    together = fx.step.mean_gradient(find(state, rows[index]) for index in range(rows.epoch_length))
    alone = fx.step.mean_gradient(find(state, pad([text])) for text in texts)
    assert rows.epoch_length > 1
    assert int(together.weight) == int(alone.weight) == sum(len(text) - 1 for text in texts)
    torch.testing.assert_close(together.loss, alone.loss, rtol=0, atol=atol)
    torch.testing.assert_close(together.metrics["own"], alone.metrics["own"], rtol=1e-6, atol=0)
    torch.testing.assert_close(together.grads, alone.grads, rtol=0, atol=atol)
