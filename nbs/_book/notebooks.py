"""Notebooks as data: finding the chapters, reading their cells, and the one canonical way to write them down.

A notebook has exactly one clean form here. Counts, editor metadata and stderr are gone, and a cell's id is a hash of
what the cell says, so that whoever writes a chapter, in whichever editor, gets the same bytes for the same content.
"""
from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

CHAPTER_NAME = re.compile(r"\d\d[a-z]?_\w+")  # 11b stands between 11 and 12
LAST = 20  # top-level chapters from this number on are read after the parts
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(?P<name>[\w-]+)\s*:?\s*(?P<value>.*?)\s*$")
EXPORTS = {"export", "exports", "exporti"}  # nbdev's three: with its source shown, likewise, kept out of `__all__`
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


class BookError(Exception):
    """Something about the book that a person has to put right; the message says what and how."""


@dataclass(frozen=True)
class Cell:
    """One cell: where it stands, what it says, and what it showed when it last ran."""

    index: int  # position in the notebook, from 0
    kind: str  # 'code', 'markdown' or 'raw'
    text: str  # the source as typed, `#|` lines included
    outputs: tuple = ()

    @cached_property
    def directives(self) -> dict[str, str]:
        """The `#|` lines at the top of a code cell, such as {'export': '', 'eval': 'false'}."""
        found = {}
        for line in self.text.splitlines() if self.kind == "code" else ():
            match = DIRECTIVE.match(line)
            if not match and line.strip():
                break
            if match:
                found[match["name"]] = match["value"]
        return found

    @cached_property
    def body(self) -> str:
        """The source without its `#|` lines: what a reader sees."""
        lines = self.text.splitlines()
        while self.kind == "code" and lines and (DIRECTIVE.match(lines[0]) or not lines[0].strip()):
            lines.pop(0)
        return "\n".join(lines).strip("\n")

    @property
    def exported(self) -> bool:
        return not EXPORTS.isdisjoint(self.directives)

    @cached_property
    def tree(self) -> ast.Module | None:
        """The parsed body; None for prose and for cells in IPython's own syntax."""
        if self.kind != "code" or re.search(r"^\s*[%!]", self.body, re.MULTILINE):
            return None
        return ast.parse(self.body)


@dataclass(frozen=True)
class Chapter:
    """A notebook of the book, read once."""

    path: Path
    raw: str = field(repr=False)  # the file as it was read

    @classmethod
    def read(cls, path: Path) -> Chapter:
        """Read a notebook file; a file that is no notebook is an error that names it."""
        chapter = cls(path, path.read_text(encoding="utf-8"))
        if not isinstance(chapter.notebook.get("cells"), list):
            raise BookError(f"{path.name} holds no list of cells. Is it a notebook? `jupytext --to ipynb` makes one.")
        return chapter

    @cached_property
    def notebook(self) -> dict:
        try:
            return json.loads(self.raw)
        except json.JSONDecodeError as error:
            raise BookError(f"{self.path.name} is not JSON ({error}). Restore it, or write it again with jupytext.") from None

    @cached_property
    def cells(self) -> list[Cell]:
        return [
            Cell(i, cell["cell_type"], "".join(cell["source"]), tuple(cell.get("outputs", ())))
            for i, cell in enumerate(self.notebook["cells"])
        ]

    @property
    def name(self) -> str:
        """Where the notebook is below nbs/, without its ending: '02_store', 'worlds/03_alfworld'."""
        parts = self.path.with_suffix("").parts
        return "/".join(parts[len(parts) - parts[::-1].index("nbs"):])

    @property
    def part(self) -> str:
        """The folder that the notebook stands in; '' at the top level."""
        return self.name.rpartition("/")[0]

    @cached_property
    def module(self) -> str | None:
        """The module that the chapter exports to, `#| default_exp`; None for the index."""
        names = [cell.directives["default_exp"] for cell in self.cells if "default_exp" in cell.directives]
        return names[0] if names else None

    @cached_property
    def title(self) -> str:
        """The chapter's first heading."""
        for cell in self.cells:
            if match := cell.kind == "markdown" and re.search(r"^# +(.+)$", cell.text, re.MULTILINE):
                return match[1].strip()
        return self.name

    @cached_property
    def claim(self) -> str:
        """The `>` line under the title: what the chapter says in one sentence."""
        for cell in self.cells:
            if match := cell.kind == "markdown" and re.search(r"^> *(.+)$", cell.text, re.MULTILINE):
                return match[1].strip()
        return ""


@dataclass(frozen=True)
class Book:
    """The checkout that holds the book, found by its settings.ini."""

    root: Path

    @classmethod
    def find(cls, start: Path | None = None) -> Book:
        """The book round `start`, by default round this file."""
        start = (start or Path(__file__)).resolve()
        for folder in (start, *start.parents):
            if (folder / "settings.ini").is_file() and (folder / "nbs").is_dir():
                return cls(folder)
        raise BookError(f"no settings.ini beside an nbs/ folder at or above {start}: give the checkout with --root.")

    @property
    def nbs(self) -> Path:
        return self.root / "nbs"

    @property
    def settings(self) -> dict[str, str]:
        from configparser import ConfigParser

        parser = ConfigParser(delimiters=["="])
        parser.read(self.root / "settings.ini", encoding="utf-8")
        return dict(parser["DEFAULT"])

    @property
    def package(self) -> Path:
        return self.root / self.settings["lib_path"]

    @property
    def library(self) -> str:
        return self.package.name

    @property
    def parts(self) -> list[str]:
        """The folders of chapters, in reading order: `parts` in settings.ini."""
        return self.settings.get("parts", "").split()

    def chapters_in(self, part: str) -> list[Path]:
        """The numbered notebooks of one folder, in order; '' is the top level."""
        return sorted(path for path in (self.nbs / part).glob("*.ipynb") if CHAPTER_NAME.fullmatch(path.stem))

    def chapter_paths(self) -> list[Path]:
        """The numbered notebooks in reading order: the core, the parts, and what stands on all of them."""
        top = self.chapters_in("")
        last = [path for path in top if int(path.stem[:2]) >= LAST]
        return [p for p in top if p not in last] + [p for part in self.parts for p in self.chapters_in(part)] + last

    def overviews(self) -> list[Path]:
        """The first page of each part."""
        return [path for part in self.parts if (path := self.nbs / part / "index.ipynb").is_file()]

    def extra_pages(self) -> list[Path]:
        """Pages that are no chapters: a glossary, say."""
        return sorted(p for p in self.nbs.glob("*.ipynb") if not CHAPTER_NAME.fullmatch(p.stem) and p.stem != "index")

    def paths(self) -> list[Path]:
        """The chapters, then the overviews and the index (which may use all of them)."""
        index = self.nbs / "index.ipynb"
        return self.chapter_paths() + self.overviews() + self.extra_pages() + [index] * index.is_file()

    def chosen(self, names: list[str]) -> list[Path]:
        """The notebooks called `names` ('worlds/03_alfworld', 'alfworld', a part, or a path); all of them when empty."""
        paths = self.paths()
        if not names:
            return paths
        chosen = []
        for name in names:
            wanted = name.removesuffix(".ipynb").split("nbs/")[-1].strip("./")
            if wanted in self.parts:
                overviews = [path for path in self.overviews() if path.parent.name == wanted]
                chosen += [*self.chapters_in(wanted), *overviews]
                continue
            hits = [p for p in paths if Chapter(p, "").name == wanted] or [p for p in paths if wanted in short_names(p)]
            if len(hits) != 1:
                known = ", ".join(Chapter(path, "").name for path in paths) or "none yet"
                raise BookError(f"no one notebook is called {name!r} in nbs/. There are: {known}.")
            chosen += hits
        return chosen

    def chapters(self) -> list[Chapter]:
        return [Chapter.read(path) for path in self.chapter_paths()]


def short_names(path: Path) -> set[str]:
    """What a notebook may be called for short: '03_alfworld', 'alfworld', 'worlds/alfworld', 'worlds.alfworld'."""
    stem, part = path.stem.partition("_")[2], path.parent.name
    return {path.stem, stem, f"{part}/{stem}", f"{part}.{stem}"}


def python_path(*folders: Path) -> str:
    """The PYTHONPATH of a process that is to find what is in `folders` first."""
    before = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([*map(str, folders), *filter(None, [before])])


def cell_id(kind: str, text: str, seen: dict[str, int]) -> str:
    """Eight hex digits for a cell, from its text and how often that text came before."""
    key = f"{kind}\n{text.strip()}"
    seen[key] = seen.get(key, 0) + 1
    return hashlib.sha256(f"{key}\n{seen[key]}".encode()).hexdigest()[:8]


def _lines(text: str | list[str]) -> list[str]:
    return "".join(text).splitlines(keepends=True)


def _clean_output(output: dict) -> dict | None:
    """An output in its canonical form; None for what is not kept (stderr, progress bars)."""
    kind = output["output_type"]
    if kind == "stream":
        if output["name"] != "stdout":
            return None
        shown = [line.rstrip("\r").rpartition("\r")[2] for line in "".join(output["text"]).split("\n")]
        return {"name": "stdout", "output_type": kind, "text": _lines("\n".join(shown))}
    if kind == "error":
        return {key: output[key] for key in ("ename", "evalue", "output_type", "traceback")}
    data = {mime: _lines(value) if isinstance(value, (str, list)) and not mime.startswith("image/png") else value
            for mime, value in output["data"].items()}
    clean = {"data": data, "metadata": output.get("metadata", {}), "output_type": kind}
    return clean | ({"execution_count": None} if kind == "execute_result" else {})


def _merge_streams(outputs: list[dict]) -> list[dict]:
    merged: list[dict] = []
    for output in outputs:
        if merged and output["output_type"] == merged[-1]["output_type"] == "stream":
            merged[-1]["text"] = _lines(merged[-1]["text"] + output["text"])
        else:
            merged.append(output)
    return merged


def canonical(notebook: dict) -> dict:
    """The clean form of a notebook: a new dict, the same for the same content."""
    seen: dict[str, int] = {}
    cells = []
    for cell in notebook["cells"]:
        kind, text = cell["cell_type"], "".join(cell["source"]).strip("\n")
        clean = {"cell_type": kind, "id": cell_id(kind, text, seen), "metadata": {}, "source": _lines(text)}
        if kind == "code":
            kept = [out for out in map(_clean_output, cell.get("outputs", ())) if out]
            clean |= {"execution_count": None, "outputs": _merge_streams(kept)}
        elif cell.get("attachments"):
            clean["attachments"] = cell["attachments"]
        cells.append(clean)
    result = {"cells": cells, "metadata": dict(KERNEL), "nbformat": 4, "nbformat_minor": 5}
    from nbdev.clean import clean_nb

    clean_nb(result)  # nbdev's own notion of clean (memory addresses and the like) on top of ours
    return result


def dumps(notebook: dict) -> str:
    """The text of a notebook file, as nbdev and Jupyter write it."""
    return json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> bool:
    """Put `text` in a file in one step (a reader sees the old or the new); False when it says that already."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.is_file() else 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return True


def clean(paths: list[Path]) -> list[Path]:
    """Bring notebooks to their canonical form without running them; gives back those that changed."""
    return [path for path in paths if write_text(path, dumps(canonical(Chapter.read(path).notebook)))]
