"""From the chapters to the package: nbdev's own export, made in a copy and moved into place file by file.

Nobody ever sees a half-written module, several people may export at once, and a chapter that does not parse leaves the
module of yesterday where it is.
"""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from .notebooks import Book, BookError, Chapter, canonical, dumps, write_text


@contextlib.contextmanager
def locked(book: Book):
    """Hold the book's export lock; others wait. (The lock lives in the temporary folder and dies with its process.)"""
    key = hashlib.sha256(str(book.root).encode()).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"book-{os.getuid()}-{key}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def faults(chapter: Chapter) -> list[str]:
    """Why a chapter cannot be exported: code that does not parse, or exports without a module to go to."""
    found = []
    for cell in chapter.cells:
        if not cell.exported:
            continue
        try:
            cell.tree
        except SyntaxError as error:
            found.append(f"{chapter.name}, cell {cell.index}: {error.msg} in {(error.text or '').strip()!r}")
    if any(cell.exported for cell in chapter.cells) and not chapter.module:
        found.append(f"{chapter.name} exports cells but names no module: begin it with `#| default_exp name`.")
    return found


@contextlib.contextmanager
def _inside(folder: Path):
    """Work in `folder`, where nbdev then finds its settings."""
    from nbdev.config import get_config

    before = Path.cwd()
    in_test = os.environ.pop("IN_TEST", None)  # nbdev exports nothing where this is set
    os.chdir(folder)
    get_config.cache_clear()
    try:
        yield
    finally:
        os.chdir(before)
        get_config.cache_clear()
        if in_test is not None:
            os.environ["IN_TEST"] = in_test


def _inherit(book: Book, chapter: Chapter, target: Path) -> None:
    """Take the module of a chapter that cannot be exported from the package as it is."""
    for module in filter(None, [chapter.module]):
        file = Path(book.library, *module.split(".")).with_suffix(".py")
        if (book.package.parent / file).is_file():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(book.package.parent / file, target / file)


def generate(book: Book, target: Path) -> list[str]:
    """Export all chapters into a fresh copy of the book, `target`; gives back what could not be."""
    from nbdev.config import add_init
    from nbdev.doclinks import _build_modidx
    from nbdev.export import nb_export

    problems, library = [], Path(book.library)
    (target / "nbs").mkdir(parents=True)
    (target / library).mkdir()
    shutil.copy(book.root / "settings.ini", target)
    if (book.package / "__init__.py").is_file():
        shutil.copy(book.package / "__init__.py", target / library)
    for path in book.chapter_paths():
        chapter = Chapter.read(path)
        wrong = faults(chapter)
        copy = target / "nbs" / f"{chapter.name}.ipynb"
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(dumps(canonical(chapter.notebook)), encoding="utf-8")
        if wrong:
            problems += wrong
            _inherit(book, chapter, target)
        else:
            with _inside(target):
                nb_export(f"nbs/{chapter.name}.ipynb", book.library)
    with _inside(target):
        add_init(library)
        _build_modidx(library, Path("nbs"))
    if (target / library / "_public.py").is_file():  # the package's face: its version, and what may be imported from it
        face = f'__version__ = "{book.settings["version"]}"\nfrom ._public import __all__, __dir__, __getattr__\n'
        (target / library / "__init__.py").write_text(face, encoding="utf-8")
    return problems


def _files(folder: Path) -> dict[str, str]:
    """The Python files below a folder and what they say."""
    return {file.relative_to(folder).as_posix(): file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.py"))}


def export(book: Book, names: list[str] = ()) -> list[str]:
    """Write the package from the chapters (all, or those named); gives back the files that changed."""
    chosen = [Chapter.read(path) for path in book.chosen(list(names))]
    others = {chapter.module for chapter in book.chapters()} - {chapter.module for chapter in chosen} - {None}
    with locked(book), tempfile.TemporaryDirectory() as folder:
        target = Path(folder).resolve() / "book"
        problems = generate(book, target)
        made = _files(target / book.library)
        for module in others:
            made.pop(f"{module.replace('.', '/')}.py", None)
        changed = [f"{book.library}/{name}" for name, text in made.items() if write_text(book.package / name, text)]
    if problems:
        raise BookError("not exported (what could be was):\n  " + "\n  ".join(problems))
    return changed


def out_of_sync(book: Book) -> list[str]:
    """How the package differs from what the chapters say; empty when it does not."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder).resolve() / "book"
        problems = generate(book, target)
        made, there = _files(target / book.library), _files(book.package)
    for name in sorted(made.keys() | there.keys()):
        if name not in there:
            problems.append(f"{book.library}/{name} is missing: run `python nbs/_book/book.py export`.")
        elif name not in made:
            problems.append(f"{book.library}/{name} comes from no chapter: move its code to one, or delete it.")
        elif made[name] != there[name]:
            problems.append(f"{book.library}/{name} is not what its chapter says: run `python nbs/_book/book.py export`.")
    return problems
