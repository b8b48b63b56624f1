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
from .notebooks import LAST, Book, BookError, Cell, Chapter, canonical, dumps

FUNCTION_LINES, CLASS_LINES, EXPORTED_LINES = 45, 120, 480
PARAMETERS = 7  # of a function; more of them are a dataclass with a name
EXPORTED_WIDTH, EXAMPLE_WIDTH = 100, 88  # characters of a line: what a page shows without scrolling sideways
CORE_CELLS, CORE_WORDS = 60, 1500  # of a chapter that everybody reads
CELLS, WORDS = 85, 2200  # of any other
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


def modules_of(name: str, known: set[str], library: str) -> str | None:
    """The module of the package that an imported name stands for or lies in."""
    if not name.startswith(f"{library}."):
        return None
    parts = name.split(".")[1:]
    return next((found for n in range(len(parts), 0, -1) if (found := ".".join(parts[:n])) in known), None)


def layers(book: Book) -> list[str]:
    """Exported code imports downwards: the core from earlier core chapters, parts from the core and each other without a
    circle, and nothing but studies and what is read last from studies."""
    problems, chapters = [], [chapter for chapter in book.chapters() if chapter.module]
    known = {chapter.module: chapter for chapter in chapters}
    above = {chapter.module: number for number, chapter in enumerate(chapters)}
    uses: dict[str, set[str]] = {module: set() for module in known}
    for chapter in chapters:
        last = not chapter.part and int(chapter.path.stem[:2]) >= LAST
        for cell, tree in code_cells(chapter):
            names = {module for name in imports(tree) if (module := modules_of(name, set(known), book.library))}
            if any(name.startswith(".") for name in imports(tree)):
                problems.append(f"{chapter.name}, cell {cell.index}: write `from {book.library}.module import name`.")
            if not cell.exported:
                continue
            uses[chapter.module] |= names - {chapter.module}
            for module in sorted(names - {chapter.module}):
                other = known[module]
                if not chapter.part and not last and (other.part or above[module] > above[chapter.module]):
                    problems.append(f"{chapter.name}, cell {cell.index} imports {book.library}.{module}: the core imports "
                                    "earlier core chapters and no part.")
                if chapter.part and not other.part and int(other.path.stem[:2]) >= LAST:
                    problems.append(f"{chapter.name}, cell {cell.index} imports {book.library}.{module}, which stands above it.")
                if other.part == "studies" and chapter.part != "studies" and not last:
                    problems.append(f"{chapter.name}, cell {cell.index} imports {book.library}.{module}: only studies import studies.")
    return problems + [f"these modules import each other in a circle: {' -> '.join(circle)}." for circle in circles(uses)]


def circles(uses: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other in a circle; one circle for each way back."""
    found, done, path = [], set(), []

    def visit(module: str) -> None:
        if module in path:
            found.append([*path[path.index(module):], module])
        elif module not in done:
            path.append(module)
            for other in sorted(uses[module]):
                visit(other)
            done.add(path.pop())

    for module in sorted(uses):
        visit(module)
    return found


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
        core = not chapter.part and chapter.module and int(chapter.path.stem[:2]) < LAST
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
                if isinstance(node, ast.FunctionDef) and _parameters(node) > PARAMETERS:
                    problems.append(f"{chapter.name}, cell {cell.index}: {node.name} has {_parameters(node)} parameters, "
                                    f"more than {PARAMETERS}: make a dataclass of some.")
            width = EXPORTED_WIDTH if cell.exported else EXAMPLE_WIDTH
            if long := [line for line in cell.body.splitlines() if len(line) > width]:
                problems.append(f"{chapter.name}, cell {cell.index} has a line of {max(map(len, long))} characters, "
                                f"more than {width}: {long[0].strip()[:40]}...")
        lines = sum(len(cell.body.splitlines()) for cell in chapter.cells if cell.exported)
        words = sum(len(cell.text.split()) for cell in chapter.cells if cell.kind == "markdown")
        cells, most = (CORE_CELLS, CORE_WORDS) if core else (CELLS, WORDS)
        if chapter.module and (len(chapter.cells) > cells or words > most or lines > EXPORTED_LINES):  # a log may grow
            problems.append(f"{chapter.name} has {len(chapter.cells)} cells, {words} words and {lines} exported lines "
                            f"(at most {cells}, {most} and {EXPORTED_LINES}): it is two chapters.")
    return problems


def _parameters(node: ast.FunctionDef) -> int:
    """The parameters of a function that a caller gives."""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def shape(book: Book) -> list[str]:
    """A chapter has a title, a claim, a figure, and a link to the next one; the overview of its part lists it."""
    problems, chapters = [], book.chapters()
    for number, chapter in enumerate(chapters):
        text = "\n".join(cell.text for cell in chapter.cells if cell.kind == "markdown")
        mimes = {mime for cell in chapter.cells for out in cell.outputs for mime in out.get("data", {})}
        if chapter.title == chapter.name or not chapter.claim:
            problems.append(f"{chapter.name} lacks a `# Title` or the `>` line under it that makes one claim.")
        if not mimes & {"image/svg+xml", "image/png"} and chapter.module:
            problems.append(f"{chapter.name} shows no figure.")
        following = chapters[number + 1] if number + 1 < len(chapters) else None
        if following and following.part == chapter.part and f"({following.path.name}" not in text:
            problems.append(f"{chapter.name} does not link to the next chapter, {following.path.name}.")
    for part in ["", *book.parts]:
        overview = book.nbs / part / "index.ipynb"
        listed = overview.read_text(encoding="utf-8") if overview.is_file() else ""
        problems += [f"{part}/index".strip("/") + f" does not list {path.name}." for path in book.chapters_in(part)
                     if f"({path.name}" not in listed]
    for path in book.paths():
        prose = "\n".join(cell.text for cell in Chapter.read(path).cells if cell.kind == "markdown")
        for target in set(re.findall(r"\]\(((?:\.{0,2}/)*[\w/-]+\.ipynb)", prose)):
            if not (path.parent / target).is_file():
                problems.append(f"{Chapter(path, '').name} links to {target}, which is not there.")
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
            problems += [f"{Chapter(path, '').name}, cell {cell.index} shows a path of this machine: {found}"
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


RULES = {rule.__name__: rule for rule in (export_in_sync, notebooks_clean, layers, import_cells, sizes, shape,
                                          no_machine, readme_in_sync)}
LONG_RULES = {"outputs_fresh": outputs_fresh}


def check(book: Book, fresh: bool = False, only: list[str] | None = None) -> dict[str, list[str]]:
    """The complaints of every rule, or of those named."""
    rules = RULES | (LONG_RULES if fresh or only else {})
    if unknown := set(only or ()) - set(rules):
        raise BookError(f"no rule is called {', '.join(sorted(unknown))}. There are: {', '.join(rules)}.")
    return {name: rule(book) for name, rule in rules.items() if not only or name in only}
