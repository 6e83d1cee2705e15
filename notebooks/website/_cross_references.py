"""A Sphinx extension that reads docstrings as they are written, and links names in code to their documentation."""

from __future__ import annotations

import re
from collections.abc import Iterator

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.inspect import signature, stringify_signature
from typing_extensions import is_protocol

from notebooks.website._names import ambiguous_names, exists, packages, resolves

_PATH = re.compile(r"(?<![\w./])(?:fx|fxtrain)((?:\.[A-Za-z_]\w*)+)")
_FILE = re.compile(r"(?<![\w./])(?:\.ci|benchmarks|fxtrain|notebooks|tests)(?:/[\w.-]+)+|(?<=python -m )\w+(?:\.\w+)*")
_NAME = re.compile(r"[A-Za-z_]\w*(?=\(|$)|[A-Z]\w*(?=\.)")
_SECTION = re.compile(r"(Args|Attributes|Example|Raises|Returns|Yields):$")
_FUNCTION = re.compile(r"<(?:built-in )?(?:function )?([\w.]+)(?: at \w+)?>")
_HIDDEN_COLON = "\ue000"
_log = logging.getLogger(__name__)


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the extension to a build."""
    before_napoleon, after_napoleon = 400, 600
    app.connect("autodoc-process-docstring", _mark_blocks, before_napoleon)
    app.connect("autodoc-process-docstring", _hide_colons, before_napoleon)
    app.connect("autodoc-process-docstring", _restore_colons, after_napoleon)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skip_fields)
    app.connect("missing-reference", _link_type)
    app.add_transform(CheckCode)
    app.add_transform(ShortenPaths)
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _mark_blocks(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Marks indented blocks outside of sections as verbatim: formulas and code, as ``help()`` shows them."""
    marked: list[str] = []
    is_verbatim = in_section = False
    for line in lines:
        is_indented = line.startswith("    ")
        if line and not is_indented:
            in_section, is_verbatim = bool(_SECTION.match(line)), line.endswith("::")
        elif is_indented and not (in_section or is_verbatim) and not marked[-1]:
            is_verbatim = True
            marked += ["::", ""]
        marked.append(line)
    lines[:] = marked


def _hide_colons(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Hides colons that napoleon would take for the end of a type, because types are in annotations only."""
    for index, line in enumerate(lines):
        is_head_of_attribute = index == 0 and what in ("attribute", "data", "property")
        if is_head_of_attribute or (index > 0 and lines[index - 1] in ("Returns:", "Yields:")):
            lines[index] = line.replace(":", _HIDDEN_COLON)


def _restore_colons(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    lines[:] = [line.replace(_HIDDEN_COLON, ":") for line in lines]


def _signature(
    app: Sphinx, what: str, name: str, value: object, options: object, arguments: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Shows defaults that are functions by name, and of a protocol, which has no constructor, the call."""
    if isinstance(value, type) and is_protocol(value):
        if "__call__" not in vars(value):
            return "", None
        call = stringify_signature(signature(value.__call__, bound_method=True), unqualified_typehints=True)
        arguments, _, returned = call.partition(" -> ")
    return arguments and _FUNCTION.sub(r"\1", arguments), returned


def _skip_fields(app: Sphinx, what: str, name: str, value: object, skip: bool, options: object) -> bool | None:
    """Skips the fields of named tuples, which the docstring of the class describes."""
    return True if (getattr(value, "__doc__", None) or "").startswith("Alias for field number") else None


def _link_type(
    app: Sphinx, env: BuildEnvironment, link: addnodes.pending_xref, text: nodes.TextElement
) -> nodes.reference | None:
    """Links a type in a signature that is named by the private module that defines it."""
    room, _, name = link["reftarget"].removeprefix("fxtrain.").partition(".")
    for package in packages():
        path = package.names.get(name.rpartition(".")[2])
        if path and package.path == f"fxtrain.{room}":
            domain = env.domains.python_domain
            return domain.resolve_xref(env, link["refdoc"], app.builder, "obj", path, link, text)
    return None


class CheckCode(SphinxTransform):
    """Warns of code in a text with a path from ``fx``, a file of the repository or a module that does not exist."""

    default_priority = 700

    def apply(self, **kwargs: object) -> None:
        for code in self.document.findall(nodes.literal):
            text = code.astext()
            names = [f"fxtrain{found[1]}" for found in _PATH.finditer(text)]
            missing = [name for name in names if not resolves(name)]
            missing += [name for name in _FILE.findall(text) if not exists(name)]
            for name in missing:
                _log.warning("expected names that exist in %r, got %s. Correct it.", text, name, location=code)


class ShortenPaths(SphinxTransform):
    """Shows ``fx.`` in place of ``fxtrain.`` before documented names, as in all examples."""

    default_priority = 700

    def apply(self, **kwargs: object) -> None:
        for prefix in self.document.findall(addnodes.desc_addname):
            for text in list(prefix.findall(nodes.Text)):
                prefix.replace(text, nodes.Text(text.replace("fxtrain.", "fx.", 1)))


class LinkNames(SphinxPostTransform):
    """Turns code that begins with a public name into a link to its documentation.

    A bare name is a link in the documentation of its package. Elsewhere it is one if fxtrain itself exports it, and no
    argument or attribute has the same name.
    """

    default_priority = 5  # before links are resolved

    def run(self, **kwargs: object) -> None:
        for code in list(self.document.findall(nodes.literal)):
            if _is_plain(code) and (target := self._target(code)):
                link = addnodes.pending_xref(
                    "", code.deepcopy(), refdomain="py", reftype="obj", reftarget=target, refexplicit=True
                )
                link["refdoc"], link["refwarn"] = self.env.docname, True
                code.replace_self(link)

    def _target(self, code: nodes.literal) -> str | None:
        text = code.astext().removeprefix("help(")
        if path := _PATH.match(text):
            return self._documented(f"fxtrain{path[1]}")
        name = _NAME.match(text)
        if name is None or name[0] in _arguments(code):
            return None
        here = self.env.docname
        for package in packages():
            path = package.names.get(name[0])
            if path and (package.page == here or (path.count(".") == 1 and name[0] not in ambiguous_names())):
                return path
        return None

    def _documented(self, path: str) -> str | None:
        """Returns the longest part of a path that has documentation."""
        documented = self.env.domains.python_domain.objects
        while path not in documented and "." in path:
            path = path.rpartition(".")[0]
        return path if path != "fxtrain" else None


def _is_plain(code: nodes.literal) -> bool:
    return not any(isinstance(node, (nodes.reference, addnodes.pending_xref, nodes.title)) for node in _ancestors(code))


def _arguments(code: nodes.literal) -> set[str]:
    """Returns the names of the arguments of the functions whose documentation contains the code."""
    signatures = [node[0] for node in _ancestors(code) if isinstance(node, addnodes.desc)]
    parameters = [p for signature in signatures for p in signature.findall(addnodes.desc_parameter)]
    return {parameter.astext().lstrip("*").partition(":")[0].partition("=")[0] for parameter in parameters}


def _ancestors(node: nodes.Node) -> Iterator[nodes.Node]:
    while (node := node.parent) is not None:
        yield node
