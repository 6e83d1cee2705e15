"""Text generation with the cache of a model, in batches, and by the ``generate`` of transformers."""

import copy
import random
import types
from itertools import takewhile

import numpy as np
import pytest
import torch
from torch import nn
from zoo.operators import import_without_operators

import fxtrain as fx
from fxtrain.callbacks._textgen import continuations
from fxtrain.cli._transformer import Config, Transformer

PROMPTS = ["a", "def f(", "im"]
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

GPT2 = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 256, "tie_word_embeddings": False}


class Bytes:
    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens, **options):
        return bytes(tokens).decode("latin-1")


def markdown(state, prompts=PROMPTS, step=10, **options):
    callback = fx.callbacks.textgen(prompts, Bytes(), **{"length": 64, "max_tokens": 12, **options})
    after, control = callback(state, fx.EvalEnd(step=step, metrics={}))
    assert after is state
    return control.log["textgen"].value.markdown


def tokens(state, prompts=PROMPTS, length=64, step=10, **options):
    """Returns the generated tokens, a list of sequences for each prompt."""
    encoded = [Bytes().encode(prompt) for prompt in prompts]
    return continuations(state, step, encoded, options, length=length, tokenizer=Bytes())


def varied(module):
    """Scales the weights, so that greedy texts do not repeat one token."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def transformer(**changes):
    shape = Config(**{"layers": 2, "width": 16, "heads": 2, "length": 32, **changes})
    return varied(Transformer(shape, torch.Generator().manual_seed(0)))


class TestOwnModels:
    @pytest.mark.parametrize("length", [3, 10, 32])
    @pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_p": 0.9}])
    def test_cached_texts_equal_uncached_ones_past_the_context(self, length, options):
        state = fx.init(transformer())
        given = {"length": length, "max_new_tokens": 40, **options}
        cached = tokens(state, **given)
        assert cached == tokens(state, **given, use_cache=False)
        assert len({token for [text] in cached for token in text}) > 5

    def test_each_text_of_a_batch_equals_the_text_alone(self):
        state = fx.init(transformer())
        for use_cache in (True, False):
            given = {"length": 10, "max_new_tokens": 20, "use_cache": use_cache}
            alone = [tokens(state, [prompt], **given)[0] for prompt in PROMPTS]
            assert tokens(state, **given) == alone

    def test_texts_of_a_batch_end_at_their_own_stop_tokens(self):
        state = fx.init(transformer())
        whole = tokens(state, max_new_tokens=20, length=32)
        stop = whole[0][0][3], whole[2][0][9]
        given = {"max_new_tokens": 20, "length": 32, "eos_token_id": list(stop)}
        expected = [text[: next((at for at, t in enumerate(text) if t in stop), 20)] for [text] in whole]
        assert len({len(text) for text in expected}) > 1
        for use_cache in (True, False):
            assert [text for [text] in tokens(state, **given, use_cache=use_cache)] == expected

    def test_cache_gets_shortest_prompt_and_then_single_tokens(self):
        shapes = []

        class Watched(Transformer):
            def forward(self, tokens, cache=None):
                shapes.append((cache is not None, *tokens.shape))
                return super().forward(tokens, cache)

        module = Watched(Config(layers=1, width=8, heads=1, length=32), torch.Generator().manual_seed(0))
        tokens(fx.init(module), ["def", "import"], max_new_tokens=4)
        assert shapes == [(True, 2, 3), *[(True, 2, 1)] * 6]
        shapes.clear()
        tokens(fx.init(module), ["def", "import"], max_new_tokens=4, length=4)
        assert shapes == [(True, 2, 3), (True, 2, 1), *[(False, 2, 4)] * 2, *[(False, 1, 4)] * 2]

    def test_recurrent_state_can_be_the_cache(self):
        class Recurrent(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding, self.rnn, self.head = nn.Embedding(256, 8), nn.GRU(8, 8), nn.Linear(8, 256)

            def init_cache(self, batch_size):
                return self.head.weight.new_zeros(1, batch_size, 8)

            def forward(self, tokens, cache=None):
                y, new = self.rnn(self.embedding(tokens).transpose(0, 1), cache)
                logits = self.head(y).transpose(0, 1)
                return logits if cache is None else (logits, new)

        state = fx.init(varied(Recurrent()))
        assert tokens(state, max_new_tokens=20) == tokens(state, max_new_tokens=20, use_cache=False)

    def test_dropout_is_off_and_no_graph_is_kept(self):
        kept = []

        class Watched(Transformer):
            def forward(self, tokens, cache=None):
                logits, cache = super().forward(tokens, cache)
                kept.append(logits.requires_grad or self.training)
                return logits, cache

        shape = Config(layers=1, width=8, heads=1, length=32, dropout=0.5)
        tokens(fx.init(Watched(shape, torch.Generator().manual_seed(0))), max_new_tokens=4)
        assert kept
        assert not any(kept)

    def test_models_of_a_tree_are_refused(self):
        state = fx.init({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
        with pytest.raises(TypeError, match="expected a state of one model for textgen, got a dict with keys 'a', 'b'"):
            markdown(state)

    @pytest.mark.parametrize(
        ("forward", "message"),
        [
            (lambda self, tokens: self.logits(tokens), r"to take model\(tokens, cache=cache\), got a forward without"),
            (
                lambda self, tokens, cache=None: self.logits(tokens),
                r"expected \(logits, cache\) from .*float32 tensor",
            ),
            (lambda self, tokens, cache=None: (tokens, cache), r"expected logits \[N, T, vocabulary\] from model\(tok"),
        ],
    )
    def test_model_that_breaks_the_cache_protocol_is_rejected(self, forward, message):
        class Broken(nn.Module):
            def __init__(self):
                super().__init__()
                self.logits = nn.Embedding(256, 256)

            def init_cache(self, batch_size):
                return ()

        Broken.forward = forward
        with pytest.raises(TypeError, match=message):
            markdown(fx.init(Broken()))


class TestOptions:
    def test_config_and_arguments_give_equal_texts(self):
        state = fx.init(transformer())
        config = {"max_new_tokens": 9, "do_sample": True, "temperature": 0.7, "top_k": 50, "eos_token_id": 7}
        plain = markdown(state, length=32, max_tokens=9, temperature=0.7, top_k=50, stop=[7])
        assert markdown(state, length=32, max_tokens=None, generation_config=config) == plain
        mixed = {name: config[name] for name in ("top_k", "eos_token_id")}
        assert markdown(state, length=32, max_tokens=9, temperature=0.7, generation_config=mixed) == plain

    def test_config_is_greedy_without_do_sample(self):
        state = fx.init(transformer())
        greedy = markdown(state, length=32, temperature=0)
        assert markdown(state, length=32, generation_config={}) == greedy
        assert markdown(state, length=32, generation_config={"do_sample": True}) != greedy

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                {"num_beams": 4},
                r"only, because the model has no generate of transformers, got 'num_beams'\. Remove",
            ),
            ({"temperatur": 4}, "got 'temperatur'. Did you mean 'temperature'"),
            ({"top_p": 0.9}, "expected generation_config to have do_sample=True with top_p, got none"),
            ({"do_sample": True, "top_p": 2}, r"expected generation_config\['top_p'\] to be at most 1, got 2"),
            ({"do_sample": True, "top_k": -1}, r"generation_config\['top_k'\] to be an int of at least 0, got -1"),
            ({"max_new_tokens": 0}, r"generation_config\['max_new_tokens'\] to be a positive int, got 0"),
        ],
    )
    def test_config_that_the_model_does_not_take_stops_fit_at_the_start(self, config, message, tmp_path):
        tx = fx.optim.sgd(0.1)
        callback = fx.when(100, fx.callbacks.textgen(["a"], Bytes(), length=8, generation_config=config))
        step = fx.train_step(lambda model, batch: model(batch).mean(), tx)
        seen = []
        with pytest.raises(ValueError, match=message):
            fx.fit(
                fx.init(transformer(), tx),
                step,
                [torch.zeros(1, 4, dtype=torch.int64)] * 2,
                steps=2,
                callbacks=callback,
                observers=[lambda state, event, control: seen.append(event)],
            )
        assert not seen

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"max_tokens": 3, "generation_config": {"max_new_tokens": 3}},
                r"max_tokens or generation_config\['max",
            ),
            ({"temperature": 1, "generation_config": {"do_sample": True}}, "expected temperature or generation_config"),
            (
                {"stop": [1], "generation_config": {"eos_token_id": 1}},
                r"expected stop or generation_config\['eos",
            ),
            ({"generation_config": {"max_time": 2.0}}, "without max_time, because a resumed run .* got 2.0"),
        ],
    )
    def test_contradictory_options_are_rejected(self, options, message):
        with pytest.raises(ValueError, match=message):
            fx.callbacks.textgen(["a"], Bytes(), length=8, **options)

    def test_config_of_another_type_is_rejected(self):
        with pytest.raises(TypeError, match="to be a dict or a GenerationConfig of transformers, got 'greedy'"):
            fx.callbacks.textgen(["a"], Bytes(), length=8, generation_config="greedy")


def test_generating_changes_nothing_in_training():
    tx = fx.optim.adamw(0.01)
    step = fx.train_step(lambda model, batch: model(batch)[..., 0].mean(), tx)
    data = [torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

    def trained(callbacks):
        state = fx.init(transformer(dropout=0.5), tx)
        return fx.fit(state, step, data, steps=4, callbacks=callbacks).state.params

    plain = trained([])
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    writing = trained([fx.when(2, fx.callbacks.textgen(PROMPTS, Bytes(), length=32, on=fx.StepEnd))])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2][1]).all()
    assert all(map(torch.equal, fx.tree.leaves(plain), fx.tree.leaves(writing)))


@pytest.fixture(scope="module")
def transformers():
    import_without_operators()
    found = pytest.importorskip("transformers")
    found.logging.set_verbosity_error()
    return found


KINDS = ("gpt2", "llama")


def decoder(transformers, kind):
    if kind == "gpt2":
        config = transformers.GPT2Config(**GPT2)
        return varied(transformers.GPT2LMHeadModel(config)).eval()
    return varied(transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, **TINY))).eval()


def own_generate(module, prompt, **options):
    """Returns the sequences that the model generates for one prompt, without padding, up to token 255."""
    config = copy.deepcopy(module.generation_config)
    config.update(**options, eos_token_id=255, pad_token_id=0)
    encoded = torch.tensor([Bytes().encode(prompt)])
    found = module.generate(input_ids=encoded, attention_mask=torch.ones_like(encoded), generation_config=config)
    return [[*takewhile(lambda token: token != 255, row)] for row in found[:, encoded.shape[1] :].tolist()]


class TestTransformers:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
            {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        ],
    )
    def test_padded_batch_equals_the_models_own_texts(self, transformers, kind, options):
        module = decoder(transformers, kind)
        given = {"max_new_tokens": 12, **options}
        expected = [own_generate(module, prompt, **given) for prompt in PROMPTS]
        given["eos_token_id"], state = 255, fx.init(module)
        assert tokens(state, **given) == expected
        assert tokens(state, **given, use_cache=False) == expected

    def test_min_length_delays_the_stop_token(self, transformers):
        state = fx.init(decoder(transformers, "llama"))
        [[text]] = tokens(state, ["def f("], max_new_tokens=12, eos_token_id=0)
        short, stop = next((at, token) for at, token in enumerate(text) if at and token not in text[:at])
        given = {"max_new_tokens": 12, "eos_token_id": stop}
        [[early]], [[late]] = tokens(state, ["def f("], **given), tokens(state, ["def f("], **given, min_new_tokens=8)
        assert early == text[:short]
        assert len(late) >= 8
        assert stop not in late[:8]

    def test_sampled_texts_depend_only_on_seed_and_step(self, transformers):
        state = fx.init(decoder(transformers, "gpt2"))
        before = torch.get_rng_state()
        text = markdown(state, ["a", "a"])
        assert text == markdown(state, ["a", "a"])
        assert text != markdown(state, ["a", "a"], step=11)
        assert text != markdown(state.replace(seed=state.seed + 1), ["a", "a"])
        first, second = text.split("**prompt**")[1:]
        assert first.strip() != second.strip()
        assert torch.equal(torch.get_rng_state(), before)

    def test_sequences_of_a_prompt_are_numbered(self, transformers):
        config = transformers.GenerationConfig(num_beams=2, num_return_sequences=2, max_new_tokens=5)
        state = fx.init(decoder(transformers, "llama"))
        text = markdown(state, max_tokens=None, generation_config=config)
        assert text.count("**continuation 1 of 2**") == text.count("**continuation 2 of 2**") == len(PROMPTS)
        assert text == markdown(state, max_tokens=5, generation_config={"num_beams": 2, "num_return_sequences": 2})

    def test_stop_string_ends_a_text(self, transformers):
        vocabulary = {chr(index): index for index in range(1, 256)} | {"<pad>": 0}
        tokenizers = pytest.importorskip("tokenizers")
        fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
        fast.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        fast.decoder = tokenizers.decoders.Fuse()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>")
        state = fx.init(decoder(transformers, "gpt2"))
        encoded = [tokenizer.encode(prompt) for prompt in ("a", "b")]
        given = {"max_new_tokens": 12, "pad_token_id": 0}
        [[first], [second]] = continuations(state, 1, encoded, given, length=64, tokenizer=tokenizer)
        given["stop_strings"] = [tokenizer.decode(first[3:5])]
        [[stopped], [other]] = continuations(state, 1, encoded, given, length=64, tokenizer=tokenizer)
        assert stopped == first[:5]
        assert other == second

    def test_encoder_and_decoder_continue_each_prompt_as_alone(self, transformers):
        sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 256}
        config = transformers.T5Config(**sizes, decoder_start_token_id=0)
        state = fx.init(varied(transformers.T5ForConditionalGeneration(config)))
        given = {"max_new_tokens": 12, "eos_token_id": 255}
        together = tokens(state, **given)
        assert [len(text) for [text] in together] == [12] * 3
        assert together == [tokens(state, [prompt], **given)[0] for prompt in PROMPTS]

    def test_model_without_masks_gets_prompts_of_one_length_at_a_time(self, transformers):
        calls = []

        class Unmasked(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(1))
                self.config, self.generation_config = types.SimpleNamespace(), transformers.GenerationConfig()

            def forward(self, input_ids):
                raise NotImplementedError

            def generate(self, input_ids, generation_config):
                calls.append(input_ids.tolist())
                return torch.cat([input_ids, input_ids[:, :1] + 1], dim=1)

        assert tokens(fx.init(Unmasked()), ["ab", "c", "de"], max_new_tokens=1) == [[[98]], [[100]], [[101]]]
        assert calls == [[[99]], [[97, 98], [100, 101]]]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"generation_config": {"num_beam": 2}}, "of GenerationConfig, got 'num_beam'. Did you mean 'num_beams'"),
            ({"generation_config": {"streamer": 1}}, "of GenerationConfig, got 'streamer'"),
            ({"generation_config": {"num_return_sequences": 3}}, "Greedy methods"),
            ({"max_tokens": 60}, r"fit into length=64, because .* got 6 and 60 tokens\. Generate fewer tokens, or"),
            ({"length": 99, "max_tokens": 60}, "to fit into the model's max_position_embeddings=64, because"),
        ],
    )
    def test_options_that_the_model_does_not_take_stop_fit_at_the_start(self, transformers, options, message):
        tx = fx.optim.sgd(0.1)
        callback = fx.callbacks.textgen(PROMPTS, Bytes(), **{"length": 64, "on": fx.StepEnd, **options})
        state, step = fx.init(decoder(transformers, "gpt2"), tx), fx.train_step(lambda model, _: model.weight, tx)
        with pytest.raises(ValueError, match=message):
            fx.fit(state, step, [torch.zeros(1, 4).long()], steps=1, callbacks=callback)

    def test_text_of_a_resumed_run_is_equal(self, transformers, tmp_path):
        tx = fx.optim.sgd(0.1)
        step = fx.train_step(lambda model, batch: model(batch, labels=batch).loss, tx)
        data = [torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

        def texts(folder, steps, **options):
            found = {}

            def look(state, event, control):
                if "textgen" in control.log:
                    found[event.step] = control.log["textgen"].value.markdown

            writing = fx.callbacks.textgen(PROMPTS, Bytes(), length=64, max_tokens=8, on=fx.StepEnd)
            state, checkpointer = fx.init(decoder(transformers, "llama"), tx), fx.checkpointer(tmp_path / folder)
            given = {"callbacks": writing, "checkpointer": checkpointer, "observers": [look]}
            fx.fit(state, step, data, steps=steps, **given, **options)
            return found

        whole = texts("whole", 4)
        assert len(set(whole.values())) == 4
        assert texts("parts", 2) | texts("parts", 4, resume=True) == whole
