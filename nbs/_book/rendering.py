"""The site: chapters converted for myst-nb, API pages written out, Sphinx run with warnings as errors, links checked.

The site is complete in itself: it works from `file://`, and asks the network for nothing.
"""
from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from . import exporting
from .notebooks import KERNEL, LAST, Book, BookError, Cell, Chapter, dumps, python_path

HERE = Path(__file__).parent
HIDDEN = {"hide", "default_exp"}  # cells for the machinery, not for readers
NOTEBOOK_LINK = re.compile(r"(?<=\]\()(?:\./)?((?:\.\./)*(?:\w+/)*)(\w+)\.ipynb(?=[)#])")
FOLDED = 3  # lines of imports that are shown; a longer cell of imports is folded
CONSTANT_LENGTH = 72  # characters of a constant's value that the API page still shows


def page_name(name: str) -> str:
    """The page of a notebook, as nbdev's `_modidx` names it: 'worlds/03_alfworld' is 'worlds/alfworld'."""
    folder, _, stem = name.lower().rpartition("/")
    return f"{folder}/" * bool(folder) + re.sub(r"^\d+_", "", stem)


def literals(text: str) -> str:
    """Markdown's `name` as reStructuredText's ``name``, with what else means something there made plain."""
    parts = re.split(r"(`+[^`\n]+`+)", text)
    return "".join(f"``{part.strip('`').strip()}``" + "\\ " * (i + 1 < len(parts) and parts[i + 1][:1].isalnum())
                   if i % 2 else re.sub(r"([*|_\\])", r"\\\1", part) for i, part in enumerate(parts))


def patched(node: ast.AST) -> str | None:
    """The class that a function is a method of by fastcore's `@patch`; None for any other definition."""
    marks = [ast.unparse(mark).partition("(")[0] for mark in getattr(node, "decorator_list", ())]
    return ast.unparse(node.args.args[0].annotation) if "patch" in marks else None


def symbols(cell: Cell) -> list[str]:
    """What an exported cell defines: classes with their methods, functions, constants."""
    found = []
    for node in cell.tree.body if cell.exported and cell.tree else ():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.append(f"{holder}.{node.name}" if (holder := patched(node)) else node.name)
        if isinstance(node, ast.ClassDef):
            found += [f"{node.name}.{part.name}" for part in node.body
                      if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))]
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        found += [target.id for target in targets if isinstance(target, ast.Name)]
    return found


def shown(cell: Cell) -> bool:
    """Whether a reader of the site sees the cell at all."""
    return bool(cell.body.strip()) and HIDDEN.isdisjoint(cell.directives) and "nbdev_export(" not in cell.text


def visibility(cell: Cell) -> tuple[bool, bool]:
    """Whether a cell's source and its outputs are shown (`hide_input`, `echo: false`, `hide_output`, `output: false`)."""
    marks = cell.directives
    source = "hide_input" not in marks and marks.get("echo", "").lower() != "false"
    output = "hide_output" not in marks and marks.get("output", "").lower() != "false"
    return source, output


def only_imports(cell: Cell) -> bool:
    """Whether a cell does nothing but import."""
    return bool(cell.tree and cell.tree.body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in cell.tree.body)


def convert_cell(chapter: Chapter, cell: Cell) -> dict:
    """One cell as myst-nb is to see it."""
    if cell.kind != "code":
        text = NOTEBOOK_LINK.sub(lambda match: match[1] + page_name(match[2]) + ".ipynb", cell.text)
        return {"cell_type": cell.kind, "metadata": {}, "source": text}
    source, output = visibility(cell)
    tags = ["exported"] * cell.exported + ["remove-input"] * (not source) + ["remove-output"] * (not output)
    tags += ["hide-input"] * (source and only_imports(cell) and len(cell.body.splitlines()) > FOLDED)
    names = [f"{chapter.module}.{name}" for name in symbols(cell)]
    return {"cell_type": "code", "execution_count": None, "source": cell.body, "outputs": list(cell.outputs),
            "metadata": {"tags": tags, "symbols": names}}


def convert(chapter: Chapter) -> str:
    """A chapter's notebook as myst-nb is to see it."""
    cells = [convert_cell(chapter, cell) for cell in chapter.cells if shown(cell)]
    return dumps({"cells": cells, "metadata": dict(KERNEL), "nbformat": 4, "nbformat_minor": 4})


def toctree(caption: str, pages: list[str]) -> str:
    """A group of pages in the sidebar."""
    listed = "\n".join(pages)
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```" if pages else ""


def sidebar(book: Book) -> str:
    """The order of the pages, for the end of the index: the core, a page for each part, and what stands on them."""
    pages = [(int(path.stem[:2]) >= LAST, page_name(path.stem)) for path in book.chapters_in("")]
    overviews = [page_name(Chapter(path, "").name) for path in book.overviews()]
    extra = [page_name(path.stem) for path in book.extra_pages()]
    groups = {"Core": [page for late, page in pages if not late], "Parts": overviews,
              "Use": [page for late, page in pages if late], "Reference": [*extra, "api/index", "genindex"]}
    return "\n\n".join(toctree(caption, names) for caption, names in groups.items() if names)


@dataclass(frozen=True)
class Constant:
    """An exported constant, as it stands in its chapter."""

    name: str
    value: str
    comment: str


def _comments(source: str) -> dict[int, str]:
    """The comment on each line that has one."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("#: ").strip() for token in tokens if token.type == tokenize.COMMENT}


def constants(cell: Cell) -> list[Constant]:
    """The constants of an exported cell, each with the comment beside it or right above it."""
    found, comments = [], _comments(cell.body)
    lines = cell.body.splitlines()
    for node in cell.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        names = [target.id for target in targets if isinstance(target, ast.Name) and not target.id.startswith("_")]
        if not names or node.value is None:
            continue
        above, line = [], node.lineno - 1
        while line in comments and lines[line - 1].lstrip().startswith("#"):
            above.insert(0, comments[line])
            line -= 1
        beside = comments.get(node.lineno) or comments.get(node.end_lineno, "")
        found += [Constant(name, ast.unparse(node.value), beside or " ".join(above)) for name in names]
    return found


def _entry(module: str, cell: Cell) -> list[str]:
    """The API entries of one exported cell, as reStructuredText."""
    entries = []
    for node in cell.tree.body:
        name = getattr(node, "name", "_")
        if name.startswith("_") or patched(node):
            continue
        if isinstance(node, ast.ClassDef):
            entries.append(f".. autoclass:: {module}.{name}\n   :members:\n   :member-order: bysource\n")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            entries.append(f".. autofunction:: {module}.{name}\n")
    for constant in constants(cell):
        value = f"   :value: {constant.value}\n" if len(constant.value) <= CONSTANT_LENGTH else ""
        text = literals(constant.comment)
        entries.append(f".. py:data:: {constant.name}\n{value}\n   {text}\n")
    return entries


def api_page(chapter: Chapter, module: str) -> str:
    """The reference page of a chapter's module, in the order of the chapter."""
    entries = [entry for cell in chapter.cells if cell.exported and "exporti" not in cell.directives and cell.tree
               for entry in _entry(module, cell)]
    head = f"{module}\n{'=' * len(module)}\n\n.. py:module:: {module}\n\n{literals(chapter.claim)}\n\n" \
           f"The chapter: :doc:`/{page_name(chapter.name)}`.\n"
    return "\n".join([head, *entries])


def api_index(modules: list[tuple[Chapter, str]]) -> str:
    """The list of modules."""
    groups: dict[str, list[str]] = {}
    for chapter, _ in modules:
        groups.setdefault(chapter.part or "core", []).append(page_name(chapter.name))
    trees = "\n".join(f"{part}\n{'-' * len(part)}\n\n.. toctree::\n   :maxdepth: 1\n\n" + "".join(f"   {page}\n" for page in pages)
                      for part, pages in groups.items())
    return "API reference\n=============\n\nThe public names of each module, with their parameters. ``[source]`` leads to the " \
           f"definition in its chapter.\n\n{trees}"


def append(path: Path, text: str) -> None:
    """Add a cell of prose to a notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["cells"].append({"cell_type": "markdown", "metadata": {}, "source": text})
    path.write_text(dumps(notebook), encoding="utf-8")


def write_sources(book: Book, folder: Path) -> None:
    """Everything that Sphinx reads."""
    (folder / "api").mkdir(parents=True)
    for path in book.paths():
        chapter = Chapter.read(path)
        page = page_name(chapter.name)
        for target in (folder / page, folder / "api" / page):
            target.parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{page}.ipynb").write_text(convert(chapter), encoding="utf-8")
        if chapter.module:
            text = api_page(chapter, f"{book.library}.{chapter.module}")
            (folder / "api" / f"{page}.rst").write_text(text, encoding="utf-8")
    modules = [(chapter, chapter.module) for chapter in book.chapters() if chapter.module]
    (folder / "api" / "index.rst").write_text(api_index(modules), encoding="utf-8")
    append(folder / "index.ipynb", sidebar(book))
    for path in book.overviews():
        pages = [page_name(chapter.stem) for chapter in book.chapters_in(path.parent.name)]
        append(folder / path.parent.name / "index.ipynb", toctree("", pages).replace(":caption: \n", ""))
    if (book.nbs / "images").is_dir():
        shutil.copytree(book.nbs / "images", folder / "images")


class _Links(HTMLParser):
    """What a page points to, and the places in it that can be pointed to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []  # what the browser fetches on its own
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.ids |= {values[key] for key in ("id", "name") if key in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and {"stylesheet", "icon", "preload"} & set(values.get("rel", "").split()):
            self.loads.append(values.get("href", ""))
        elif tag in ("script", "img", "iframe", "source", "video") and "src" in values:
            self.loads.append(values["src"])


def broken_links(site: Path) -> list[str]:
    """Links inside the site that lead nowhere, and anything a page would fetch from the network."""
    pages = {}
    for path in site.rglob("*.html"):
        pages[path] = _Links()
        pages[path].feed(path.read_text(encoding="utf-8"))
    problems = []
    for path, page in sorted(pages.items()):
        name = path.relative_to(site)
        problems += [f"{name} fetches {url} from the network" for url in page.loads if urlsplit(url).netloc]
        for url in page.links + page.loads:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                problems.append(f"{name} links to {url}, which is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                problems.append(f"{name} links to {url}: that page has no such place")
    return sorted(set(problems))


def snapshot(book: Book, folder: Path) -> Book:
    """The book as it is now, exported anew: pages and docstrings agree even while somebody writes."""
    if problems := exporting.generate(book, folder):
        raise BookError("\n  ".join(["the book cannot be exported:", *problems]))
    for path in [*book.overviews(), *book.extra_pages(), book.nbs / "index.ipynb"]:
        target = folder / path.relative_to(book.root)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    if (book.nbs / "images").is_dir():
        shutil.copytree(book.nbs / "images", folder / "nbs" / "images")
    return Book(folder)


def build(book: Book, source: Path, site: Path, strict: bool) -> str:
    """Run Sphinx; gives back what it said, or raises it."""
    environment = {**os.environ, "BOOK_ROOT": str(book.root), "PYTHONPATH": python_path(book.root, HERE.parent)}
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-c", str(HERE), "-d", str(site.parent / "doctrees"),
               *["-W"] * strict, "--keep-going", "-q", str(source), str(site)]
    done = subprocess.run(command, env=environment, cwd=book.root, capture_output=True, text=True)
    lines = (done.stderr + done.stdout).replace(f"{source}/", "").splitlines()
    said = "\n".join(dict.fromkeys(line for line in lines if line.strip()))
    if done.returncode:
        raise BookError(f"the site was not built (warnings are errors):\n{said}")
    return said


def render(book: Book, output: Path, draft: bool = False, say=print) -> Path:
    """Build the site into `output`; a warning, or a link that leads nowhere, is an error (but not in a draft)."""
    if not (book.nbs / "index.ipynb").is_file():
        raise BookError("nbs/index.ipynb is missing: it is the first page of the site and the source of the README.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        source, site = folder / "pages", folder / "site"
        still = snapshot(book, folder / "book")
        write_sources(still, source)
        said = build(still, source, site, strict=not draft)
        problems = broken_links(site)
        if draft:
            say("\n".join([said, *problems]).strip())
        elif problems:
            raise BookError("the site has links that do not hold:\n  " + "\n  ".join(problems))
        shutil.rmtree(site / "_sources", ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(site, output)
    return output / "index.html"
