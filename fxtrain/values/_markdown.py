"""Renders Markdown from untrusted texts as HTML without scripts, links or external resources."""

from __future__ import annotations

from collections.abc import Sequence

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

_DEEPEST = 50  # nested blocks; markdown-it drops deeper ones
_BREAK = "<br>"


def as_html(markdown: str) -> str:
    """Renders CommonMark with tables. Line breaks are preserved, because logged texts are often not prose.

    Raw HTML, links and images are shown as source text, so the page loads nothing. A text with more than fifty levels
    of nesting is shown as source text too. Time is linear in the length of the text.

    Example:
        >>> as_html("# Title\\n\\n**a** <b>")
        '<h4>Title</h4>\\n<p><strong>a</strong> &lt;b&gt;</p>\\n'
    """
    tokens = _MARKDOWN.parse(markdown)
    if any(token.level >= _DEEPEST - 1 for token in tokens):
        return _verbatim(markdown)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = "h4"  # one level below the title of the card
    return _MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {})


def _verbatim(text: str) -> str:
    # HTML ignores a line break directly after the tag.
    begin = "\n" if text.startswith("\n") else ""
    return f"<pre>{begin}{escapeHtml(text)}</pre>"


def _break(state: StateInline, silent: bool) -> bool:
    """Parses ``<br>``, the only supported tag. ``fxtrain.values.Table`` writes it for line breaks in cells."""
    if not state.src.startswith(_BREAK, state.pos):
        return False
    if not silent:
        state.push("hardbreak", "br", 0)
    state.pos += len(_BREAK)
    return True


def _code(self: object, tokens: Sequence[Token], at: int, options: object, env: object) -> str:
    return _verbatim(tokens[at].content.removesuffix("\n"))


def _table_open(self: object, tokens: Sequence[Token], at: int, options: object, env: object) -> str:
    return '<div class="wide"><table>'


def _table_close(self: object, tokens: Sequence[Token], at: int, options: object, env: object) -> str:
    return "</table></div>"


def _configured() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False, "xhtmlOut": False, "breaks": True, "maxNesting": _DEEPEST})
    markdown.enable("table").disable(["html_block", "html_inline", "link", "image", "autolink", "reference"])
    markdown.inline.ruler.before("escape", "break", _break)
    rules = {"fence": _code, "code_block": _code, "table_open": _table_open, "table_close": _table_close}
    for name, rule in rules.items():
        markdown.add_render_rule(name, rule)
    return markdown


_MARKDOWN = _configured()
