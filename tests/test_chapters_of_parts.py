"""As test_chapters.py, for the parts: a file of its own, since a file goes to one process and these take most of the time."""
import pytest
from _book.running import run_chapter
from test_chapters import BOOK


@pytest.mark.parametrize("path", [path for path in BOOK.paths() if path.parent != BOOK.nbs], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_runs(book, path, request):
    result = run_chapter(book, path, slow=request.config.getoption("--slow"))
    assert not result.error, "\n" + result.error
