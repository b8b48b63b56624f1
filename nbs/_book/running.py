"""Running chapters: each in a fresh process, from its first cell to its last, outputs saved only when all of them passed."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .notebooks import Book, Cell, Chapter, canonical, dumps, python_path, write_text

WORKER = Path(__file__).with_name("worker.py")
TIMEOUT = 900  # seconds: a chapter takes two minutes at most; the rest is room for a busy machine

# What may differ between machines and would show in an output is fixed here.
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "TZ": "UTC",
    "COLUMNS": "100",
    "LINES": "40",
    "NO_COLOR": "1",
    "SOURCE_DATE_EPOCH": "0",
    "IN_TEST": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
DEFAULTS = {"OMP_NUM_THREADS": "1"}  # a person may set it otherwise; left alone, it differs between machines


@dataclass(frozen=True)
class Result:
    """What came of running one chapter."""

    name: str
    seconds: float
    error: str = ""  # the report of the cell that failed; empty when all passed
    text: str = ""  # the notebook file as it should now be
    changed: bool = False  # whether that differs from what was read


def skipped(cell: Cell, flags: set[str]) -> bool:
    """Whether the runner leaves a cell alone: prose, `#| eval: false`, a flag such as `#| slow`, an export call."""
    return (
        cell.kind != "code"
        or not cell.body
        or cell.directives.get("eval", "").lower() == "false"
        or not flags.isdisjoint(cell.directives)
        or "nbdev_export(" in cell.text
    )


def environment(book: Book, home: Path) -> dict[str, str]:
    """The environment of a chapter's process: this one's, with what shows in outputs fixed."""
    return {**DEFAULTS, **os.environ, **ENVIRONMENT, "PYTHONPATH": python_path(book.root), "IPYTHONDIR": str(home)}


def _end(process: subprocess.Popen) -> None:
    """End what is left of a chapter's process group (a simulator it started, say)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _start(book: Book, place: Path, cells: list[dict], folder: Path, timeout: float) -> tuple[list[dict], str]:
    """Run cells in a new process that starts in `place`; gives back the worker's records and what the process said outside of cells."""
    (folder / "cells.json").write_text(json.dumps(cells), encoding="utf-8")
    results, log = folder / "results.jsonl", folder / "log"
    command = [sys.executable, "-P", str(WORKER), str(folder / "cells.json"), str(results)]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=place, env=environment(book, folder / "home"), stdin=subprocess.DEVNULL,
                                   stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            ending = f"the process ended with status {process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            ending = f"no end after {timeout:.0f} seconds"
        finally:
            _end(process)
            process.wait()
    records = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.is_file() else []
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-30:]
    return records, "\n".join([ending, *said])


def _report(chapter: Chapter, index: int | None, what: str) -> str:
    """A failure as a person wants to read it: chapter, cell, source, traceback."""
    if index is None:
        return f"{chapter.name}: before the first cell\n{textwrap.indent(what, '    ')}"
    source = textwrap.indent(chapter.cells[index].text, "  | ")
    return f"{chapter.name}, cell {index} (counted from 0):\n{source}\n{textwrap.indent(what.rstrip(), '    ')}"


def run_chapter(book: Book, path: Path, slow: bool = False, timeout: float = TIMEOUT) -> Result:
    """Run one notebook in a fresh process and work out its new text; nothing is written."""
    start, chapter = time.perf_counter(), Chapter.read(path)
    flags = set() if slow else set(book.settings.get("tst_flags", "").split())
    cells = [{"index": c.index, "source": c.text} for c in chapter.cells if not skipped(c, flags)]
    with tempfile.TemporaryDirectory() as folder:
        records, said = _start(book, path.parent, cells, Path(folder), timeout)
    seconds = time.perf_counter() - start
    last = records[-1] if records else {}
    if "failed" in last:
        printed = f"\nprinted before:\n{last['printed']}" if last["printed"].strip() else ""
        return Result(chapter.name, seconds, _report(chapter, last["failed"], last["traceback"] + printed))
    if "finished" not in last:
        return Result(chapter.name, seconds, _report(chapter, last.get("started"), said))
    outputs = {record["done"]: record["outputs"] for record in records if "done" in record}
    notebook = {"cells": [
        {**cell, "outputs": outputs[i]} if i in outputs else cell for i, cell in enumerate(chapter.notebook["cells"])
    ]}
    text = dumps(canonical(notebook))
    return Result(chapter.name, seconds, text=text, changed=text != chapter.raw)


def save(book: Book, path: Path, before: str, result: Result) -> str:
    """Write a chapter that passed; says what happened. A notebook edited meanwhile is left as it is."""
    if path.read_text(encoding="utf-8") != before:
        return "passed, NOT SAVED: the notebook was edited while it ran; run it again"
    return "passed, outputs saved" if write_text(path, result.text) else "passed, nothing new"


def run(book: Book, names: list[str], slow: bool = False, write: bool = True, jobs: int = 1,
        timeout: float = TIMEOUT, say=print) -> list[Result]:
    """Run notebooks and save those that passed; gives back every result."""

    def one(path: Path) -> Result:
        before = path.read_text(encoding="utf-8")
        result = run_chapter(book, path, slow, timeout)
        what = "FAILED" if result.error else save(book, path, before, result) if write else "passed"
        say(f"{result.name:<32} {result.seconds:6.1f} s  {what}")
        return result

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        return list(pool.map(one, book.chosen(names)))
