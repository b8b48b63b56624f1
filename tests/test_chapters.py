"""Every chapter of the core, and the index, runs from its first cell to its last in a fresh process."""
import pytest
from _book.notebooks import Book
from _book.running import run_chapter

BOOK = Book.find()


@pytest.mark.parametrize("path", [path for path in BOOK.paths() if path.parent == BOOK.nbs], ids=lambda path: path.stem)
def test_runs(book, path, request):
    result = run_chapter(book, path, slow=request.config.getoption("--slow"))
    assert not result.error, "\n" + result.error
