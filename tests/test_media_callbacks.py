"""Media callbacks: generated text and samples.

What they log depends only on the state and the event.
"""

import re

import numpy as np
import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import callbacks as cb
from fxtrain import report, writers
from fxtrain.callbacks._decoding import Sampling, draw
from fxtrain.values import Image, Video


class Bytes:
    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


def language_model():
    return fx.init(nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 256)), fx.optim.sgd(0.1))


def generated(state, step=10, **options):
    callback = cb.textgen(["def ", "import"], Bytes(), length=8, **{"max_tokens": 12, **options})
    after, control = callback(state, fx.EvalEnd(step=step, metrics={}))
    assert after is state
    return control.log["textgen"].value.markdown


class TestTextgen:
    def test_text_depends_only_on_step_and_seed(self):
        state = language_model()
        assert generated(state) == generated(state)
        assert generated(state) != generated(state, step=11)
        assert generated(state) != generated(state.replace(seed=state.seed + 1))

    def test_equal_prompts_get_different_random_samples(self):
        callback = cb.textgen(["a", "a"], Bytes(), length=8, max_tokens=20)
        _, control = callback(language_model(), fx.EvalEnd(step=1, metrics={}))
        first, second = control.log["textgen"].value.markdown.split("**prompt**")[1:]
        assert first.strip() != second.strip()

    def test_stop_token_ends_text_and_is_hidden(self):
        model = nn.Sequential(nn.Embedding(256, 256), nn.Identity())
        with torch.no_grad():
            model[0].weight.copy_(100 * torch.eye(256).roll(1, 1))  # the next token is the token plus 1
        callback = cb.textgen(["a"], Bytes(), length=8, max_tokens=9, temperature=0, stop=[ord("e")])
        _, control = callback(fx.init(model), fx.EvalEnd(step=1, metrics={}))
        assert "\nbcd\n" in control.log["textgen"].value.markdown

    def test_output_object_with_logits_is_accepted(self):
        class Output(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Embedding(256, 256)

            def forward(self, tokens):
                return type("Output", (), {"logits": self.inner(tokens)})()

        assert "```text\ndef \n```" in generated(fx.init(Output()))

    @pytest.mark.parametrize("prompt", ["def ", "**a** # `b`\n\n- c", "```python\nx", "a `````` b"])
    def test_prompts_are_escaped_in_markdown(self, prompt, tmp_path):
        callback = cb.textgen([prompt], Bytes(), length=8, max_tokens=1, stop=range(256))
        _, control = callback(language_model(), fx.EvalEnd(step=1, metrics={}))
        writer = writers.jsonl(tmp_path / "metrics.jsonl")
        writer.write(1, {"textgen": control.log["textgen"].value})
        writer.close()
        shown = report.page(report.read_run(tmp_path))
        assert re.findall("<pre>(.*?)</pre>", shown, re.DOTALL) == [prompt, ""]

    def test_non_logits_output_is_rejected(self):
        with pytest.raises(TypeError, match=r"expected logits \[N, T, vocabulary\].*tensor of shape \[2, 6\]"):
            generated(fx.init(nn.Sequential(nn.Embedding(256, 1), nn.Flatten())))

    @pytest.mark.parametrize(
        "options", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}, {"max_tokens": 0}]
    )
    def test_out_of_range_options_are_rejected(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            generated(language_model(), **options)

    def test_string_and_empty_prompts_are_rejected(self):
        with pytest.raises(TypeError, match="a sequence of at least one string, got 'def'"):
            cb.textgen("def", Bytes(), length=8)
        with pytest.raises(ValueError, match="expected prompts with at least one token, got '' with none"):
            cb.textgen([""], Bytes(), length=8)


class TestDraw:
    LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    @pytest.mark.parametrize(
        ("options", "shares"),
        [
            ({}, [0.5, 0.3, 0.15, 0.05]),
            ({"temperature": 0}, [1, 0, 0, 0]),
            ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
            ({"top_k": 2}, [0.625, 0.375, 0, 0]),
            ({"top_p": 0.8}, [0.625, 0.375, 0, 0]),
            ({"top_p": 0.81}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
            ({"top_p": 1e-9}, [1, 0, 0, 0]),
            ({"top_k": 3, "top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ],
    )
    def test_token_frequencies_match_probabilities(self, options, shares):
        order = torch.tensor([2, 0, 3, 1])  # the vocabulary is not sorted by probability
        drawn = draw(self.LOGITS[order].expand(4000, 4), [(i + 0.5) / 4000 for i in range(4000)], Sampling(**options))
        found = np.bincount(order[drawn].numpy(), minlength=4) / 4000
        assert np.abs(found - shares).max() < 1e-3


def test_resumed_run_generates_same_texts(tmp_path):
    tx = fx.optim.sgd(0.5)
    module = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 256))
    step = fx.train_step(
        lambda model, batch: nn.functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()), tx
    )
    data = [torch.randint(0, 256, (4, 8), generator=torch.Generator().manual_seed(i)) for i in range(5)]

    def run(folder, steps, resume=False):
        seen = {}

        def look(state, event, control):
            if "textgen" in control.log:
                seen[event.step] = control.log["textgen"].value.markdown

        writing = fx.when(3, cb.textgen(["ab"], Bytes(), length=8, max_tokens=8, on=fx.StepEnd))
        checkpointer = fx.checkpointer(tmp_path / folder)
        fx.fit(
            fx.init(module, tx),
            step,
            data,
            steps=steps,
            callbacks=writing,
            checkpointer=checkpointer,
            resume=resume,
            observers=[look],
        )
        return seen

    whole = run("whole", 12)
    parts = run("parts", 5) | run("parts", 12, resume=True)
    assert sorted(whole) == [3, 6, 9, 12]
    assert parts == whole


def test_samples_depend_only_on_seed_and_step():
    def noise(model, key):
        return {"noise": Image(fx.rng.uniform(key, (2, 4, 4, 1))), "mean": model(torch.ones(1, 1)).mean()}

    state = fx.init(nn.Linear(1, 1))
    callback = cb.samples(noise)

    def made(state, step):
        _, control = callback(state, fx.EvalEnd(step=step, metrics={}))
        return control.log["samples/noise"].value.frames

    assert (made(state, 5) == made(state, 5)).all()
    assert (made(state, 5) != made(state, 6)).any()
    assert (made(state, 5) != made(state.replace(seed=state.seed + 1), 5)).any()


def test_samples_may_be_videos():
    class Film(nn.Module):
        def __init__(self):
            super().__init__()
            self.light = nn.Parameter(torch.tensor(0.5))

        def generate(self, count):
            assert not self.training
            return self.light * torch.linspace(0, 1, 6).view(1, 6, 1, 1, 1).expand(count, 6, 4, 5, 3)

    callback = cb.samples(lambda model, key: Video(model.generate(2), fps=30), name="films")
    _, control = callback(fx.init(Film()), fx.EvalEnd(step=1, metrics={}))
    video = control.log["films"].value
    assert (video.frames.shape, video.fps) == ((2, 6, 4, 5, 3), 30)
    assert video.frames[0, :, 0, 0, 0].tolist() == [0, 26, 51, 77, 102, 128]
    assert not video.pixels.requires_grad
