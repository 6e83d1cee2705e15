"""The extension of Sphinx that builds the website: verbatim blocks, signatures, and links from names in code."""

import io
import pathlib

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("furo")

from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

from notebooks import website

PAGE = """
Page
====

``fx.fit(state, step, data)``, ``help(fx.compose)``, ``EvalEnd.metrics``, ``save``, ``fx.nothing``,
``benchmarks/NOTHING.md``, ``python -m benchmarks.nothing``, ``benchmarks/RESULTS.md``.

.. autofunction:: fxtrain.fit
.. autofunction:: fxtrain.compose
.. autofunction:: fxtrain.save
.. autofunction:: fxtrain.callbacks.early_stopping
.. autoclass:: fxtrain.EvalEnd
.. autoclass:: fxtrain.Callback
.. autoclass:: fxtrain.TrainState
.. autoproperty:: fxtrain.values.Audio.waves
.. autofunction:: fxtrain.callbacks.activation_stats
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "index.rst").write_text(PAGE)
    warnings = io.StringIO()
    settings = pathlib.Path(website.__file__).parent
    with docutils_namespace():
        app = Sphinx(folder, settings, folder / "html", folder / "doctrees", "html", status=None, warning=warnings)
        app.build()
    return (folder / "html/index.html").read_text(), warnings.getvalue()


def link(target, text):
    return f'href="#{target}" title="{target}"><code class="docutils literal notranslate"><span class="pre">{text}'


def test_code_that_begins_with_a_public_name_is_a_link(built):
    page, _ = built
    assert link("fxtrain.fit", "fx.fit(state,") in page
    assert link("fxtrain.compose", "help(fx.compose)") in page
    assert link("fxtrain.EvalEnd", "EvalEnd.metrics") in page


def test_name_that_is_also_an_attribute_is_no_link(built):
    page, _ = built
    assert link("fxtrain.save", "save") not in page


def test_names_and_files_that_do_not_exist_are_warnings(built):
    _, warnings = built
    for name in ("fxtrain.nothing", "benchmarks/NOTHING.md", "benchmarks.nothing"):
        assert f"got {name}. Correct it." in warnings
    assert "RESULTS.md" not in warnings


def test_formulas_are_verbatim(built):
    page, _ = built
    assert "waited   = 0 if improved and better than the baseline, else now - the last time it was\n" in page


def test_colon_does_not_end_a_type(built):
    page, _ = built
    assert "<p>The sounds on the host: int16 [N, T, C]." in page
    assert "Return type" not in page


def test_types_in_signatures_are_links(built):
    page, _ = built
    assert 'href="#fxtrain.TrainState"' in page.partition('id="fxtrain.fit"')[2].partition("</dt>")[0]


def test_protocol_shows_how_it_is_called(built):
    page, _ = built
    signature = page.partition('id="fxtrain.Callback"')[2].partition("</dt>")[0]
    assert "state" in signature
    assert "args" not in signature


def test_paths_begin_with_fx(built):
    page, _ = built
    assert '<span class="pre">fx.callbacks.</span>' in page
