"""What notebooks show: HTML that is escaped, self-contained, short, and never fails."""

import html.parser
import re

import problem
import torch

import fxtrain as fx

HOSTILE = "</table><script>alert(1)</script><img src=x onerror=alert(1)>\"'\x1b[31m"
VOID = {"img", "br", "source"}


class Page(html.parser.HTMLParser):
    """Parses a view, and fails for tags that are not closed, scripts and external resources."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"{self.open} are not closed"

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "iframe", "link", "object", "embed"), tag
        for name, value in attrs:
            assert not name.startswith("on"), name
            assert name not in ("href", "src") or value.startswith("data:"), value
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def shown(value):
    """Returns the text of a view, on one line."""
    text = value._repr_html_()
    assert HOSTILE not in text
    assert "\x1b" not in text
    assert "url(" not in text
    return re.sub(r"\s+", " ", " ".join(Page(text).text))


def test_state_is_a_tree_with_totals_and_values_of_scalars():
    state = fx.init(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)), fx.optim.adam(0.1), seed=7)
    text = shown(state.replace(step=torch.tensor(120)))
    assert "step 120, seed 7, position 0; due: begin_epoch" in text
    assert "params 12 parameters in 4 tensors, 48 B, float32" in text
    assert "opt_state 28 elements in 9 tensors, 128 B, int64, float32" in text
    assert "num_batches_tracked [] int64 8 B 0" in text
    assert Page(state._repr_html_()).tags.count("details") > 4


def test_names_in_state_are_escaped():
    state = problem.start().replace(params={HOSTILE: torch.zeros(2)})
    assert "<script>alert(1)</script>" in shown(state.with_slot(HOSTILE, torch.tensor(1)))


def test_large_state_is_short():
    params = {f"blocks.{index}.{part}.weight": torch.zeros(8) for index in range(1000) for part in "abc"}
    state = problem.start().replace(params=params, opt_state=(params, params))
    assert len(state._repr_html_()) < 120_000
    assert "params 24,000 parameters in 3,000 tensors" in shown(state)
    assert "and 2850 more tensors" in shown(state).replace(",", "")
    assert len(repr(state).splitlines()) < 50


def test_donated_state_is_shown_as_such():
    state = problem.start()
    fx.core.invalidate(state, "<step train_step>")
    assert shown(state).strip() == "TrainState donated to <step train_step>, which reused its memory"


def test_freed_and_meta_tensors_are_shown_as_such():
    freed = torch.ones(1000)
    freed.untyped_storage().resize_(0)
    state = problem.start().replace(params={"freed": freed, "meta": torch.zeros(5, device="meta")})
    assert "freed [1000] float32 3.9 KiB memory freed" in shown(state)
    assert "meta [5] float32 20 B no value on meta" in shown(state)


def test_state_inside_transform_is_shown_without_values():
    state, pages = problem.start(), []

    def look(weight):
        pages.append(state.replace(params={"w": weight}, step=weight.sum())._repr_html_())
        return weight

    torch.func.vmap(look)(torch.ones(3, 2))
    assert "params" in pages[0]
    assert "cannot be shown" not in pages[0]


def test_error_while_drawing_is_shown_in_its_place(monkeypatch):
    monkeypatch.setattr(fx.core._state, "state_view", lambda state: 1 / 0)
    assert "TrainState cannot be shown: ZeroDivisionError: division by zero" in shown(problem.start())
