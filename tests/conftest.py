"""What every test shares: an offline, single-threaded environment, `--slow`, and the book."""
import os
import sys
from pathlib import Path

# Before anything imports torch or transformers. Threads: worlds, models and pytest share few cores, and sums of floats
# must not depend on how many there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update({
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
})

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "nbs"))  # the book tool, `_book`


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what takes more than a minute")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(scope="session")
def book():
    """The book of this checkout."""
    from _book.notebooks import Book

    return Book.find(ROOT)
