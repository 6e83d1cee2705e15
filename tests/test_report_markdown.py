"""Markdown in the report: rendered safely and in linear time."""

import re
import time

import pytest

from fxtrain.values import Table
from fxtrain.values._markdown import as_html


@pytest.mark.parametrize(
    ("markdown", "found"),
    [
        ("a\nb", "<p>a<br>b</p>"),
        ("a\n\nb", "<p>a</p><p>b</p>"),
        ("## *Title* ##", "<h4><em>Title</em></h4>"),
        ("text\n- a\n- **b**\n* c", "<p>text</p><ul><li>a</li><li><strong>b</strong></li></ul><ul><li>c</li></ul>"),
        ("1. a\n2. b", "<ol><li>a</li><li>b</li></ol>"),
        ("```python\na < **b**\n\n# c\n```\nd", "<pre>a &lt; **b**\n\n# c</pre><p>d</p>"),
        ("~~~\nnever closed", "<pre>never closed</pre>"),
        ("2 * 3 * 4 and snake_case and a*b", "<p>2 * 3 * 4 and snake_case and a*b</p>"),
        ("`a*b*c` and ``d ` e``", "<p><code>a*b*c</code> and <code>d ` e</code></p>"),
        ("a | b\nc", "<p>a | b<br>c</p>"),
        ("# ", "<h4></h4>"),
        ("", ""),
    ],
)
def test_markdown_renders_as_html(markdown, found):
    assert as_html(markdown).replace(">\n", ">") == found


def test_markdown_of_a_table_renders_as_that_table():
    table = Table({"name": ["a|b", "<i>", "two\nlines"], "n": [1, 0.5, None]})
    rows = [("a|b", "1"), ("&lt;i&gt;", "0.5"), ("two<br>lines", "")]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    assert f"<th>name</th><th>n</th></tr></thead><tbody>{body}</tbody>" in re.sub(
        r"(<[^<]*>)\n", r"\1", as_html(table.markdown())
    )


SAFE = {"p", "br", "em", "strong", "code", "pre", "h4", "ul", "ol", "li", "hr", "blockquote", "div", "table"}
SAFE |= {"thead", "tbody", "tr", "th", "td"}


@pytest.mark.parametrize(
    "markdown",
    [
        "[a](javascript:alert(1))",
        "[a](http://example.com)",
        "![a](http://example.com/x.png)",
        "<http://example.com>",
        "[a]: javascript:alert(1)\n\n[a]",
        "<script>alert(1)</script>",
        "<b onclick=alert(1)>",
        "<!-- a -->\n\n<?php ?>\n\n<![CDATA[a]]>",
        "`<b>`\n\n    <b>\n\n```<b>\n<b>\n```",
        "| <b> |\n| --- |\n| [a](javascript:alert(1)) |",
        "&lt;script&gt; &#60;script&#62; \\<b>",
    ],
)
def test_markdown_renders_without_scripts_and_links(markdown):
    html = as_html(markdown)
    assert set(re.findall(r"</?([a-z0-9]+)", html)) <= SAFE
    assert not re.search(r"<[^>]*(href|src|on\w+)=", html)


HOSTILE_MARKDOWN = ("*", "*a ", "a**", "*a **a ", "_a ", "*_", "[", "![", "[](", "`", "`a", ">", "> ", "- ", "1. ", "#")
HOSTILE_MARKDOWN += ("# a\n", "```\n", "|", "a|b\n-|-\n\n", "\n", " ", "&", "\\", "<", "<!-- ", "<br>", "-\n", "a\n=")
HOSTILE_MARKDOWN += ("- a\n* b\n", "[a]: b\n", "a***b__", "**a*", "> a\nb\n", "\t- a\n")


@pytest.mark.parametrize("part", HOSTILE_MARKDOWN)
def test_markdown_renders_in_linear_time(part):
    begin = time.process_time()
    as_html(part * (40_000 // len(part)))
    assert time.process_time() - begin < 5  # quadratic time would take minutes


def test_deeply_nested_markdown_is_shown_verbatim():
    assert as_html(200 * "> " + "said") == f"<pre>{200 * '&gt; '}said</pre>"
    assert "<pre>" not in as_html(20 * "> " + "said")
