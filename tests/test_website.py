"""The website: its pages, and its search for dead links. ``.ci/run`` builds it."""

import importlib

import pytest

import fxtrain as fx
from fxtrain import core
from notebooks.website import _links, _names, _pages


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    _pages.write_sources(folder)
    return folder


def test_each_public_name_is_documented_once(sources):
    text = "\n".join(path.read_text() for path in sources.glob("reference/*.rst"))
    directives = [line.split(":: ")[1] for line in text.splitlines() if line.startswith((".. auto", ".. py:type"))]
    assert len(directives) == len(set(directives))
    for package in _names.packages():
        exported = set(importlib.import_module(package.path).__all__)
        assert exported == {*package.names, *package.repeated}
        assert set(package.names.values()) | {package.path} <= set(directives)


def test_names_have_the_path_by_which_users_write_them():
    paths = {path for package in _names.packages() for path in package.names.values()}
    assert {"fxtrain.fit", "fxtrain.optim.adamw", "fxtrain.EvalEnd", "fxtrain.checkpoint.DamagedError"} <= paths
    assert not {"fxtrain.loop.fit", "fxtrain.core.EvalEnd"} & paths
    assert all(_names.resolves(path) for path in paths)


def test_paths_of_attributes_and_fields_resolve():
    assert _names.resolves("fxtrain.TrainState.params")
    assert _names.resolves("fxtrain.Control.any")
    assert not _names.resolves("fxtrain.optim.adamx")


def test_files_and_modules_are_found():
    assert _names.exists("benchmarks/RESULTS.md")
    assert _names.exists("benchmarks.zoo")
    assert not any(map(_names.exists, ["benchmarks/RESULT.md", "benchmarks.zoos", "benchmark.zoo"]))


def test_alias_has_its_description():
    data = next(package for package in _names.packages() if package.path == "fxtrain.data")
    assert _names.alias(data, "SourceLike").description.startswith("Data that ``fit``")


def test_events_are_in_the_order_in_which_they_fire(sources):
    page = (sources / "events.rst").read_text()
    first = [page.index(f"`~fxtrain.{name}`") for name in ("FitBegin", "StepBegin", "Gradients", "StepEnd", "EvalEnd")]
    assert first == sorted(first)
    assert all(f"`~fxtrain.{event.__name__}`" in page for event in core.EVENTS)


def test_event_without_a_row_is_an_error(monkeypatch):
    monkeypatch.setattr(fx.loop, "__doc__", fx.loop.__doc__.replace(" Rewound ", " Rewind "))
    with pytest.raises(ValueError, match=r"expected all events in the table of help\(fx.loop\), got none of Rewound."):
        _pages.events()


def test_help_of_each_command_is_shown(sources):
    page = (sources / "command_line.rst").read_text()
    assert "usage: fxtrain lm" in page
    assert "usage: fxtrain report" in page


def test_course_is_listed_in_order(sources):
    page = (sources / "index.md").read_text()
    notebooks = [line for line in page.splitlines() if line.startswith("notebooks/0")]
    assert notebooks == sorted(notebooks) != []
    assert all((sources / f"{name}.ipynb").exists() for name in notebooks)


def test_picture_of_the_front_page_follows_the_theme(sources):
    page = (sources / "index.md").read_text()
    assert "<picture>" not in page
    for theme in ("light", "dark"):
        assert f"{{image}} notebooks/run_{theme}.svg\n:alt: Two spirals" in page
        assert (sources / f"notebooks/run_{theme}.svg").exists()


def test_dead_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="b.html#there"></a><a href="#here"></a><a href="https://example.com"></a>'
        '<a href="missing.html"></a><a href="b.html#missing"></a><img src="no.png"><a href="../up.html"></a>'
    )
    (tmp_path / "b.html").write_text('<p id="there">')
    (tmp_path.parent / "up.html").write_text("")
    assert list(_links.dead_links(tmp_path)) == [
        "a.html: expected a link to a file of the site, got 'missing.html'.",
        "a.html: expected a link to an anchor of b.html, got 'b.html#missing'.",
        "a.html: expected a link to a file of the site, got 'no.png'.",
        "a.html: expected a link to a file of the site, got '../up.html'.",
    ]
