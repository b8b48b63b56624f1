"""A small Sphinx extension: anchors at definitions, links from backticked names to them, docments as tables."""
from __future__ import annotations

import inspect
import re
import runpy
import textwrap
from dataclasses import MISSING

from docutils import nodes

from .rendering import literals

LONGEST = 60  # characters of a type or a default in a table
STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def anchor_definitions(app, doctree) -> None:
    """Give the cells that define something the names of what they define as anchors."""
    module = f"{app.config.book.library}."
    for cell in doctree.findall(nodes.container):
        for name in cell.get("cell_metadata", {}).get("symbols", ()):
            cell["ids"].append(module + name)
            app.env.book_symbols[module + name] = app.env.docname


def symbol_table(book) -> dict[str, str]:
    """The page of every definition, by full name, from nbdev's `_modidx`."""
    syms = runpy.run_path(str(book.package / "_modidx.py"))["d"]["syms"] if (book.package / "_modidx.py").is_file() else {}
    return {name: where[0].partition("#")[0].removesuffix(".html") for module in syms.values() for name, where in module.items()}


def short_name(name: str, modules: set[str]) -> str:
    """A full name without its module: 'Store.add' for 'exprag.store.Store.add'."""
    parts = name.split(".")
    at = next((n for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in modules), 1)
    return ".".join(parts[at:])


class Links:
    """Finds what a backticked name means: on the same page first, elsewhere only when just one thing has that name."""

    def __init__(self, app) -> None:
        there = app.env.book_symbols  # anchors that exist; `_modidx` may know private cells that no page shows
        self.full = {name: page for name, page in symbol_table(app.config.book).items() if name in there} | there
        self.short: dict[str, list[str]] = {}
        for name in self.full:
            self.short.setdefault(short_name(name, app.env.book_modules), []).append(name)

    def find(self, text: str, page: str) -> str | None:
        bare = text.removesuffix("()")
        if bare in self.full:
            return bare
        names = self.short.get(bare, [])
        here = [name for name in names if self.full[name] == page.removeprefix("api/")]
        telling = text != bare or not re.fullmatch(r"[a-z]+", bare)  # `goal` elsewhere is a word, `goal()` is not
        return (here or (names if len(names) == 1 and telling else [None]))[0]


def _linkable(literal: nodes.literal) -> bool:
    """Whether a name may become a link: not in a heading, in another link, or as the name of a parameter."""
    node, first = literal, False
    while (node := node.parent) is not None:
        if isinstance(node, (nodes.reference, nodes.title)):
            return False
        first = first or isinstance(node, nodes.entry) and node.parent.index(node) == 0
        if isinstance(node, nodes.table) and first and "parameters" in node["classes"]:
            return False
    return True


def link_names(app, doctree, docname: str) -> None:
    """Wrap backticked names of the library in links to their definitions."""
    links = Links(app)
    for literal in list(doctree.findall(nodes.literal)):
        if _linkable(literal) and (name := links.find(literal.astext(), docname)):
            uri = app.builder.get_relative_uri(docname, links.full[name])
            reference = nodes.reference("", "", literal.deepcopy(), internal=True, refuri=f"{uri}#{name}")
            literal.replace_self(reference)


def _written(value) -> str:
    """A type or a default as a person would write it; '...' for what has no short form."""
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", text)  # 'collections.abc.Mapping' is 'Mapping'
    return "..." if " at 0x" in text or len(text) > LONGEST else text


def _default(value) -> str:
    if value is inspect.Parameter.empty or value is MISSING:
        return ""
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__name__
    text = repr(value)
    return "..." if " at 0x" in text or len(text) > LONGEST or text.startswith("<factory") else text


def _cell(text: str) -> str:
    return literals(text or "").replace("\n", " ").strip()


def _code(text: str) -> str:
    return f"``{text}``" if text else ""


def parameter_table(obj) -> list[str]:
    """The docments of a function or class as the lines of a table; empty where there is nothing to say."""
    from fastcore.docments import docments

    try:
        found = docments(obj, full=True, args_kwargs=True)
    except (TypeError, ValueError, OSError, AttributeError):  # no Python source, or no signature
        return []
    rows = []
    for name, about in found.items():
        anno = "" if about["anno"] in (inspect.Parameter.empty, None) else _written(about["anno"])
        if name == "self" or not (about["docment"] or anno):
            continue
        label = "*returns*" if name == "return" else f"``{STARS.get(about.get('kind'), '')}{name}``"
        default = "" if name == "return" else _default(about["default"])
        rows.append((label, _code(anno), _code(default), _cell(about["docment"])))
    if not rows:
        return []
    lines = [".. list-table::", "   :header-rows: 1", "   :class: parameters", "   :align: left", ""]
    for row in [("parameter", "type", "default", "what it is"), *rows]:
        lines += [f"   {'*' if i == 0 else ' '} - {text}" for i, text in enumerate(row)]
    return ["", *lines, ""]


def add_docments(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Turn a one-line docstring with docments into text and a table."""
    text = textwrap.dedent("\n".join(lines))
    if what == "class" and re.match(rf"{re.escape(obj.__name__)}\(", text):
        text = ""  # the docstring that @dataclass makes up
    lines[:] = literals(text).splitlines()
    if what in ("class", "function", "method"):
        lines += parameter_table(obj)


def skip_fields(app, what: str, name: str, obj, skip: bool, options) -> bool | None:
    """Leave out what a named tuple says of its fields ('Alias for field number 0'): the table has them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app) -> dict:
    """Sphinx calls this."""

    def start(app) -> None:
        book = app.config.book
        app.env.book_symbols = {}
        app.env.book_modules = {f"{book.library}.{chapter.module}" for chapter in book.chapters() if chapter.module}

    app.add_config_value("book", None, "", types=())
    app.connect("builder-inited", start)
    app.connect("doctree-read", anchor_definitions)
    app.connect("doctree-resolved", link_names)
    app.connect("autodoc-process-docstring", add_docments)
    app.connect("autodoc-skip-member", skip_fields)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
