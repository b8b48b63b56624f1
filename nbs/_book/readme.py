"""README.md from nbs/index.ipynb: its prose, its code and the outputs it saved. No Quarto."""
from __future__ import annotations

import base64
import re
from pathlib import Path

from .notebooks import Book, BookError, Cell, Chapter, write_text
from .rendering import NOTEBOOK_LINK, shown, visibility

NOTE = "<!-- Generated from nbs/index.ipynb by `python nbs/_book/book.py readme`: edit the notebook. -->"
IMAGES = "nbs/images"  # figures of the index, as files, since a README cannot hold them
LOCAL_IMAGE = re.compile(r"(?<=\]\()(?=images/)")


def _joined(value: str | list[str]) -> str:
    return "".join(value)


def _output(output: dict, number: int) -> tuple[str, dict[str, bytes]]:
    """One output as Markdown, and the image file that it needs, if any."""
    if output["output_type"] == "stream":
        return f"```text\n{_joined(output['text']).rstrip()}\n```", {}
    data = output.get("data", {})
    for mime, ending in (("image/svg+xml", "svg"), ("image/png", "png")):
        if mime in data:
            name, content = f"index-{number}.{ending}", _joined(data[mime])
            raw = content.encode() if ending == "svg" else base64.b64decode(content)
            return f"![figure]({IMAGES}/{name})", {name: raw}
    for mime in ("text/markdown", "text/html"):
        if mime in data:
            return _joined(data[mime]).rstrip(), {}
    return f"```text\n{_joined(data.get('text/plain', '')).rstrip()}\n```", {}


def _cell(cell: Cell) -> tuple[list[str], dict[str, bytes]]:
    """The blocks of one cell, and its image files."""
    if cell.kind != "code":
        text = NOTEBOOK_LINK.sub(lambda match: f"nbs/{match[1]}{match[2]}.ipynb", cell.text)
        return [LOCAL_IMAGE.sub("nbs/", text).strip()], {}
    source, outputs = visibility(cell)
    blocks, files = [f"```python\n{cell.body}\n```"] * source, {}
    for number, output in enumerate(cell.outputs if outputs else ()):
        block, needed = _output(output, cell.index * 10 + number)
        blocks.append(block)
        files |= needed
    return blocks, files


def generate(book: Book) -> tuple[str, dict[str, bytes]]:
    """The README's text, and the image files it shows by name."""
    index = book.nbs / "index.ipynb"
    if not index.is_file():
        raise BookError("nbs/index.ipynb is missing: the README is made from it.")
    blocks, files = [NOTE], {}
    for cell in filter(shown, Chapter.read(index).cells):
        new, needed = _cell(cell)
        blocks += new
        files |= needed
    return "\n\n".join(blocks) + "\n", files


def write(book: Book) -> list[str]:
    """Write README.md and its images; gives back what changed."""
    text, files = generate(book)
    changed = ["README.md"] * write_text(book.root / "README.md", text)
    folder = book.root / IMAGES
    for old in folder.glob("index-*"):
        if old.name not in files:
            old.unlink()
    for name, raw in files.items():
        folder.mkdir(exist_ok=True)
        if not (folder / name).is_file() or (folder / name).read_bytes() != raw:
            (folder / name).write_bytes(raw)
            changed.append(f"{IMAGES}/{name}")
    return changed


def stale(book: Book) -> list[str]:
    """How the README differs from what the index says; empty when it does not."""
    text, files = generate(book)
    way_out = "run `python nbs/_book/book.py readme`."
    readme = book.root / "README.md"
    problems = [] if readme.is_file() and readme.read_text(encoding="utf-8") == text else [
        f"README.md is not what nbs/index.ipynb says: {way_out}"]
    for name, raw in files.items():
        path: Path = book.root / IMAGES / name
        if not path.is_file() or path.read_bytes() != raw:
            problems.append(f"{IMAGES}/{name} is not the index's figure: {way_out}")
    return problems
