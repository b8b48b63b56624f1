"""What must hold of the book, each rule a function from the book to a list of complaints.

A complaint says which chapter, which cell (counted from 0), what is wrong and what to do.
"""
from __future__ import annotations

import ast
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from . import exporting, readme
from .notebooks import Book, BookError, Cell, Chapter, canonical, dumps

# STYLE.md asks for about 25 lines a function, 60 a class, 80 cells and 350 exported lines; past these it is broken.
FUNCTION_LINES, CLASS_LINES, CELLS, EXPORTED_LINES = 35, 75, 90, 420
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
TEXT_FILES = ("*", "nbs/**/*", "tests/**/*", ".ci/*")  # and the package
TEXT_ENDINGS = {"", ".css", ".ini", ".in", ".ipynb", ".json", ".jsonl", ".md", ".py", ".toml", ".txt"}
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|Users|opt|root|mnt|tmp|private|var/folders)/[\w./-]+")


def parsed(cell: Cell) -> ast.Module | None:
    """The cell's syntax tree; None where there is none to have (running the chapter reports that)."""
    try:
        return cell.tree
    except SyntaxError:
        return None


def code_cells(chapter: Chapter) -> Iterator[tuple[Cell, ast.Module]]:
    """The cells of a chapter that are Python, each with its tree."""
    for cell in chapter.cells:
        if cell.kind == "code" and (tree := parsed(cell)):
            yield cell, tree


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that some code imports, wherever in it; `from a import b` may be a.b or a name in a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def export_in_sync(book: Book) -> list[str]:
    """The package is what the chapters say, no more and no less."""
    return exporting.out_of_sync(book)


def notebooks_clean(book: Book) -> list[str]:
    """Notebooks are in their canonical form, hold no error outputs, and name one module each."""
    problems, modules = [], {}
    for path in book.paths():
        chapter = Chapter.read(path)
        if dumps(canonical(chapter.notebook)) != chapter.raw:
            problems.append(f"{chapter.name} is not clean: run `python nbs/_book/book.py clean {chapter.name}`.")
        problems += [f"{chapter.name}, cell {cell.index} has an error among its saved outputs: run the chapter."
                     for cell in chapter.cells if any(out["output_type"] == "error" for out in cell.outputs)]
        if chapter.module and modules.setdefault(chapter.module, chapter.name) != chapter.name:
            problems.append(f"{chapter.name} exports to {chapter.module}, as {modules[chapter.module]} does: rename one.")
    return problems


def chapter_order(book: Book) -> list[str]:
    """Chapter N imports from chapters before it, and from no other module of the package."""
    problems, before = [], set()
    chapters = book.chapters()
    known = {chapter.module for chapter in chapters if chapter.module}
    for chapter in chapters:
        for cell, tree in code_cells(chapter):
            used = {name.split(".")[1] for name in imports(tree) if name.startswith(f"{book.library}.")}
            for module in sorted((used & known) - before):
                what = "itself" if module == chapter.module else "a later chapter"
                problems.append(f"{chapter.name}, cell {cell.index} imports {book.library}.{module}, {what}.")
            if any(name.startswith(".") for name in imports(tree)):
                problems.append(f"{chapter.name}, cell {cell.index}: write `from {book.library}.module import name`.")
        before |= {chapter.module}
    return problems


def import_cells(book: Book) -> list[str]:
    """Cells that import do nothing else, and name what they import."""
    problems = []
    for path in book.paths():
        chapter = Chapter.read(path)
        for cell, tree in code_cells(chapter):
            kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body}
            if kinds == {True, False}:
                problems.append(f"{chapter.name}, cell {cell.index} mixes imports with other code: make it two cells.")
            if any(name.endswith(".*") for name in imports(tree)):
                problems.append(f"{chapter.name}, cell {cell.index} imports `*`: name what is used.")
    return problems


def _length(node: ast.AST) -> int:
    """Lines of a class, or of a function's body without its docstring (docments make signatures long)."""
    if isinstance(node, ast.ClassDef):
        return node.end_lineno - node.lineno + 1
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    return node.end_lineno - body[0].lineno + 1


def sizes(book: Book) -> list[str]:
    """Exported cells hold one definition of a length that can be read; chapters are chapters, not books."""
    problems = []
    for chapter in book.chapters():
        for cell, tree in code_cells(chapter):
            tops = [node for node in tree.body if isinstance(node, DEFINITIONS)]
            if cell.exported and len(tops) > 1:
                names = ", ".join(node.name for node in tops)
                problems.append(f"{chapter.name}, cell {cell.index} defines {names}: one definition a cell.")
            for node in (n for n in ast.walk(tree) if cell.exported and isinstance(n, DEFINITIONS)):
                limit = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
                if _length(node) > limit:
                    problems.append(f"{chapter.name}, cell {cell.index}: {node.name} has {_length(node)} lines, "
                                    f"more than {limit}: say it in parts.")
        lines = sum(len(cell.body.splitlines()) for cell in chapter.cells if cell.exported)
        if len(chapter.cells) > CELLS or lines > EXPORTED_LINES:
            problems.append(f"{chapter.name} has {len(chapter.cells)} cells and {lines} exported lines "
                            f"(at most {CELLS} and {EXPORTED_LINES}): it is two chapters.")
    return problems


def shape(book: Book) -> list[str]:
    """A chapter has a title, a claim, a figure, and a link to the next one; the index lists it."""
    problems, chapters = [], book.chapters()
    for number, chapter in enumerate(chapters):
        text = "\n".join(cell.text for cell in chapter.cells if cell.kind == "markdown")
        mimes = {mime for cell in chapter.cells for out in cell.outputs for mime in out.get("data", {})}
        if chapter.title == chapter.name or not chapter.claim:
            problems.append(f"{chapter.name} lacks a `# Title` or the `>` line under it that makes one claim.")
        if not mimes & {"image/svg+xml", "image/png"}:
            problems.append(f"{chapter.name} shows no figure.")
        if number + 1 < len(chapters) and f"({chapters[number + 1].name}.ipynb" not in text:
            problems.append(f"{chapter.name} does not link to the next chapter, {chapters[number + 1].name}.ipynb.")
    index = book.nbs / "index.ipynb"
    listed = index.read_text(encoding="utf-8") if index.is_file() else ""
    problems += [f"index does not list {chapter.name}." for chapter in chapters if f"({chapter.name}.ipynb" not in listed]
    names = {path.name for path in book.paths()}
    for path in book.paths():
        prose = "\n".join(cell.text for cell in Chapter.read(path).cells if cell.kind == "markdown")
        for target in set(re.findall(r"\]\((?:\./)?([\w-]+\.ipynb)", prose)) - names:
            problems.append(f"{path.stem} links to {target}, which is not there.")
    return problems


def machine_names(book: Book) -> list[str]:
    """What is this machine's and nobody else's: the places of the checkout and the environment, the host's name."""
    places = {str(book.root), str(Path.home())}
    places |= {sys.prefix} if sys.prefix != sys.base_prefix else set()
    host = socket.gethostname()
    return sorted(place for place in places if len(place) > 1) + [host] * bool(re.search(r"\d", host))


def no_machine(book: Book) -> list[str]:
    """Nothing that is kept names the machine it was made on; outputs hold no absolute path at all."""
    problems = []
    names = "|".join(map(re.escape, machine_names(book)))
    pattern = re.compile(rf"(?<![\w.])(?:{names})(?![\w-])" if names else "(?!)")
    files = sorted({path for glob in (*TEXT_FILES, f"{book.library}/**/*") for path in book.root.glob(glob)
                    if path.is_file() and path.suffix in TEXT_ENDINGS and "runs" not in path.relative_to(book.root).parts})  # runs/ is not kept
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        problems += [f"{path.relative_to(book.root)} names this machine: {found}" for found in set(pattern.findall(text))]
    for path in book.paths():
        for cell in Chapter.read(path).cells:
            shown = "".join(str(part) for out in cell.outputs for part in (out.get("text", ""), *(
                "".join(value) for mime, value in out.get("data", {}).items() if mime.startswith("text/"))))
            problems += [f"{path.stem}, cell {cell.index} shows a path of this machine: {found}"
                         for found in sorted(set(MACHINE_PATH.findall(shown)))]
    return problems


def readme_in_sync(book: Book) -> list[str]:
    """The README is what the index says."""
    return readme.stale(book)


def outputs_fresh(book: Book) -> list[str]:
    """Every chapter runs, and shows what it has saved. (Minutes, so only when asked for.)"""
    from .running import run

    return [result.error or f"{result.name} shows other outputs than it has saved: run it, and see `git diff`."
            for result in run(book, [], write=False, say=lambda line: None) if result.error or result.changed]


RULES = {rule.__name__: rule for rule in (export_in_sync, notebooks_clean, chapter_order, import_cells, sizes, shape,
                                          no_machine, readme_in_sync)}
LONG_RULES = {"outputs_fresh": outputs_fresh}


def check(book: Book, fresh: bool = False, only: list[str] | None = None) -> dict[str, list[str]]:
    """The complaints of every rule, or of those named."""
    rules = RULES | (LONG_RULES if fresh or only else {})
    if unknown := set(only or ()) - set(rules):
        raise BookError(f"no rule is called {', '.join(sorted(unknown))}. There are: {', '.join(rules)}.")
    return {name: rule(book) for name, rule in rules.items() if not only or name in only}
