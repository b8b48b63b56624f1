"""The book tool, tried on a small book made up for it: what it accepts, what it refuses, and what it says then."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from _book import checking, exporting, notebooks, readme, rendering, running
from _book.notebooks import Book, BookError, Chapter

TOOL = Path(notebooks.__file__).with_name("book.py")
SETTINGS = (Path(__file__).resolve().parents[1] / "settings.ini").read_text(encoding="utf-8").replace("exprag", "toybook")

RECORD = [
    "#| default_exp record",
    ("# Record\n> A record is a value.\n\nWe build `Record`, of which $x^2$ are made. [next](01_shop.ipynb)",),
    "#| export\nfrom dataclasses import dataclass",
    "#| export\nLIMIT = 100  # bytes; more does not fit a page",
    "#| export\n@dataclass(frozen=True)\nclass Record:\n    'One thing, written down.'\n"
    "    name: str  # what it is *called*\n    size: int = LIMIT  # how large, in bytes\n\n"
    "    def double(self,\n        times: int = 2,  # how often\n    ):  # -> Record\n"
    "        'A record `times` as large.'\n        return Record(self.name, self.size * times)",
    "print('half\\rwhole')\nRecord('a', 3).double()",
    "import sys",
    "print('loud', file=sys.stderr)\nobject()",
    "import matplotlib.pyplot as plt",
    "fig, ax = plt.subplots()\nax.set_xlabel('size [bytes]')\nplt.show()",
    "#| slow\nprint('slow')",
    "#| eval: false\n1 / 0",
    "#| hide\nsecret = 1",
]
SHOP = [
    "#| default_exp shop",
    ("# Shop\n> A shop sells records.\n\n"
     "It sells a `Record`, see [the chapter](00_record.ipynb#record) and `Record.double()`.",),
    "#| export\nfrom toybook.record import Record",
    "#| export\ndef sell(name: str,  # which\n         **options: int,  # none so far\n"
    "         ) -> Record:  # what was sold\n"
    "    'Sell a `Record`.'\n    return Record(name)",
    "sell('x')",
]
BOX = [
    "#| default_exp worlds.box",
    ("# Box\n> A box holds a record.\n\nIt needs a [record](../00_record.ipynb).",),
    "#| export\nimport os\nimport sys\nfrom fastcore.basics import patch\nfrom toybook.record import Record",
    "#| export\nclass Box:\n    'Holds one `Record`.'\n    held: Record | None = None",
    "#| export\n@patch\ndef put(self: Box, record: Record  # what to hold\n       ) -> Box:  # itself\n"
    "    'Hold a record.'\n    self.held = record\n    return self",
    "from pathlib import Path",
    "assert Path('../00_record.ipynb').exists()  # a chapter runs in its own folder\nBox().put(Record('b')).held",
]
OVERVIEW = [("# Worlds\n> A part.\n\n[Box](00_box.ipynb), back to [the index](../index.ipynb)",)]
INDEX = [
    ("# toybook\n> A toy.\n\n[Record](00_record.ipynb), [Shop](01_shop.ipynb), [Worlds](worlds/index.ipynb)",),
    "from toybook.shop import sell",
    "sell('y')",
]


def write_notebook(path: Path, cells: list) -> Path:
    """A notebook file as an editor might leave it: strings are code, one-tuples are prose."""
    made = []
    for number, cell in enumerate(cells):
        kind, text = ("markdown", cell[0]) if isinstance(cell, tuple) else ("code", cell)
        extra = {"outputs": [], "execution_count": number} if kind == "code" else {}
        made.append({"cell_type": kind, "id": f"editor{number}", "metadata": {"tags": []}, "source": text, **extra})
    notebook = {"cells": made, "metadata": {"vendor": {}}, "nbformat": 4, "nbformat_minor": 5}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


def make_book(root: Path) -> Book:
    """A book of two chapters, a part with one, and an index, exported, not yet run."""
    (root / "nbs").mkdir(parents=True)
    (root / "toybook").mkdir()
    (root / "settings.ini").write_text(SETTINGS, encoding="utf-8")
    for name, cells in (("00_record", RECORD), ("01_shop", SHOP), ("worlds/00_box", BOX), ("worlds/index", OVERVIEW), ("index", INDEX)):
        write_notebook(root / "nbs" / f"{name}.ipynb", cells)
    exporting.export(Book(root))
    return Book(root)


@pytest.fixture
def toy(tmp_path) -> Book:
    """The small book, one for each test."""
    return make_book(tmp_path / "toy")


@pytest.fixture(scope="module")
def run_book(tmp_path_factory) -> Book:
    """The small book after a run with nothing left out; not to be written to."""
    book = make_book(tmp_path_factory.mktemp("run") / "toy")
    assert not any(result.error for result in running.run(book, [], say=quiet))
    readme.write(book)
    return book


@pytest.fixture(scope="module")
def site(run_book, tmp_path_factory) -> Path:
    """The site of the book that was run."""
    return rendering.render(run_book, tmp_path_factory.mktemp("site") / "_docs").parent


def add(book: Book, name: str, *cells) -> Path:
    """One more chapter; the first cell and the title are made here."""
    module = name.partition("_")[2]
    return write_notebook(book.nbs / f"{name}.ipynb", [f"#| default_exp {module}", (f"# {module}\n> So.",), *cells])


def outputs(book: Book, name: str) -> str:
    return json.dumps([cell.outputs for cell in Chapter.read(book.nbs / f"{name}.ipynb").cells])


def quiet(line: str) -> None:
    """Say nothing."""


class TestRun:
    def test_two_runs_give_the_same_bytes(self, run_book, toy):
        running.run(toy, [], say=quiet)
        assert [path.read_bytes() for path in toy.paths()] == [path.read_bytes() for path in run_book.paths()]

    def test_saves_what_a_reader_should_see(self, run_book):
        saved = outputs(run_book, "00_record")
        assert "Record(name='a', size=6)" in saved and "image/svg+xml" in saved and "<object>" in saved
        for noise in ("loud", "half", " at 0x", "<metadata>", "dc:date"):
            assert noise not in saved

    def test_a_slow_cell_keeps_its_output_and_runs_on_request(self, run_book, toy):
        assert "slow" not in outputs(run_book, "00_record")
        running.run(toy, ["record"], slow=True, say=quiet)
        assert "slow" in outputs(toy, "00_record")
        running.run(toy, ["record"], say=quiet)
        assert "slow" in outputs(toy, "00_record")

    def test_a_failing_cell_is_reported_and_nothing_is_saved(self, toy):
        path = add(toy, "02_bad", "print('before')", "def f():\n    raise ValueError('no such thing')", "# here\nf()")
        before = path.read_bytes()
        (result,) = running.run(toy, ["bad"], say=quiet)
        assert "02_bad, cell 4" in result.error and "| # here" in result.error
        assert "ValueError: no such thing" in result.error and "IPython" not in result.error
        assert path.read_bytes() == before

    @pytest.mark.parametrize("cell, word, timeout", [
        ("import os; os.kill(os.getpid(), 9)", "status -9", 120),
        ("import time; time.sleep(120)", "no end after", 15),  # time enough to come to the cell on a busy machine
        ("def g(:", "SyntaxError", 120),
    ])
    def test_a_dying_cell_is_named(self, toy, cell, word, timeout):
        path = add(toy, "02_bad", "print('fine')", cell)
        result = running.run_chapter(toy, path, timeout=timeout)
        assert "cell 3" in result.error and word in result.error

    def test_each_chapter_has_a_process_of_its_own(self, toy):
        add(toy, "02_a", "import builtins", "builtins.left_over = 1")
        add(toy, "03_b", "import builtins", "assert not hasattr(builtins, 'left_over')")
        assert not any(result.error for result in running.run(toy, ["a", "b"], say=quiet))

    def test_a_notebook_edited_meanwhile_is_left_alone(self, toy):
        path = toy.nbs / "01_shop.ipynb"
        before = path.read_text(encoding="utf-8")
        result = running.run_chapter(toy, path)
        path.write_text(before + " ", encoding="utf-8")
        assert "NOT SAVED" in running.save(toy, path, before, result)
        assert path.read_text(encoding="utf-8") == before + " "


class TestExport:
    def test_is_in_sync_after_export_and_not_after_an_edit(self, toy):
        assert exporting.out_of_sync(toy) == []
        module = toy.package / "shop.py"
        module.write_text(module.read_text(encoding="utf-8") + "\nx = 1\n", encoding="utf-8")
        assert "shop.py" in exporting.out_of_sync(toy)[0]
        assert exporting.export(toy) == ["toybook/shop.py"] and exporting.export(toy) == []

    def test_a_module_without_a_chapter_is_named_and_left(self, toy):
        stray = toy.package / "stray.py"
        stray.write_text("x = 1\n", encoding="utf-8")
        exporting.export(toy)
        assert stray.is_file() and "stray.py comes from no chapter" in exporting.out_of_sync(toy)[0]

    def test_a_chapter_that_does_not_parse_leaves_its_module(self, toy):
        before = (toy.package / "shop.py").read_text(encoding="utf-8")
        write_notebook(toy.nbs / "01_shop.ipynb", ["#| default_exp shop", "#| export\ndef sell(:\n    pass"])
        with pytest.raises(BookError, match="01_shop, cell 1"):
            exporting.export(toy)
        assert (toy.package / "shop.py").read_text(encoding="utf-8") == before

    def test_an_export_without_a_module_is_refused(self, toy):
        write_notebook(toy.nbs / "02_lost.ipynb", ["#| export\nx = 1"])
        with pytest.raises(BookError, match="default_exp"):
            exporting.export(toy)

    def test_agrees_with_nbdev(self, toy):
        notebooks.clean(toy.paths())
        before = {path: path.read_bytes() for path in toy.package.glob("*.py")}
        code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
        subprocess.run([sys.executable, "-c", code], cwd=toy.root, check=True)
        assert {path: path.read_bytes() for path in toy.package.glob("*.py")} == before

    def test_several_at_once(self, toy):
        command = [sys.executable, str(TOOL), "--root", str(toy.root), "export"]
        processes = [subprocess.Popen([*command, name], stdout=subprocess.DEVNULL) for name in ("record", "shop") * 2]
        assert [process.wait() for process in processes] == [0] * 4
        assert exporting.out_of_sync(toy) == []


class TestRules:
    def test_the_made_up_book_is_clean_once_run(self, run_book):
        complaints = checking.check(run_book)
        assert complaints.pop("shape") == ["01_shop shows no figure.", "worlds/00_box shows no figure."]
        assert not any(complaints.values()), complaints

    def test_saved_outputs_that_no_longer_hold(self, toy):
        (toy.nbs / "00_record.ipynb").unlink(), (toy.nbs / "worlds" / "00_box.ipynb").unlink()
        running.run(toy, [], say=quiet)
        path = toy.nbs / "01_shop.ipynb"
        path.write_text(path.read_text(encoding="utf-8").replace("size=100", "size=7"), encoding="utf-8")
        (complaint,) = checking.outputs_fresh(toy)
        assert complaint.startswith("01_shop shows other outputs")

    @pytest.mark.parametrize("code", ["from toybook.shop import sell", "import toybook.shop", "from toybook import shop",
                                      "from toybook.worlds.box import Box", "def late():\n    from toybook.worlds.box import Box\n    return Box"])
    def test_the_core_imports_earlier_chapters_only(self, toy, code):
        write_notebook(toy.nbs / "00_record.ipynb", [*RECORD, f"#| export\n{code}"])
        complaint = checking.layers(toy)[0]
        assert complaint.startswith("00_record, cell 13 imports toybook.") and "earlier core chapters and no part" in complaint

    def test_an_example_may_import_anything(self, toy):
        write_notebook(toy.nbs / "00_record.ipynb", [*RECORD, "from toybook.worlds.box import Box"])
        assert checking.layers(toy) == []

    def test_parts_that_import_each_other_or_a_study(self, toy):
        write_notebook(toy.nbs / "memory" / "00_bag.ipynb", ["#| default_exp memory.bag", ("# Bag\n> So.",),
                                                             "#| export\nfrom toybook.worlds.box import Box", "#| export\ndef bag(): return Box()"])
        assert checking.layers(toy) == []
        write_notebook(toy.nbs / "worlds" / "00_box.ipynb", [*BOX, "#| export\ndef late():\n    from toybook.memory.bag import bag\n    return bag"])
        assert checking.layers(toy) == ["these modules import each other in a circle: memory.bag -> worlds.box -> memory.bag."]
        write_notebook(toy.nbs / "studies" / "00_find.ipynb", ["#| default_exp studies.find", ("# Find\n> So.",), "#| export\ndef find(): return 1"])
        write_notebook(toy.nbs / "worlds" / "00_box.ipynb", [*BOX, "#| export\nfrom toybook.studies.find import find"])
        assert any("only studies import studies" in line for line in checking.layers(toy))

    def test_relative_import(self, toy):
        write_notebook(toy.nbs / "01_shop.ipynb", [*SHOP, "from .record import Record"])
        assert "write `from toybook.module import name`" in checking.layers(toy)[0]

    def test_long_lines_and_many_parameters(self, toy):
        many = ", ".join("abcdefgh")
        add(toy, "02_wide", f"#| export\ndef wide({many}):\n    return {'1 + ' * 30}1", f"x = '{'y' * 90}'")
        complaints = "\n".join(checking.sizes(toy))
        for word in ("wide has 8 parameters, more than 7", "more than 100: return 1 + 1", "more than 88: x = 'yyy"):
            assert word in complaints

    def test_imports_mixed_with_code(self, toy):
        add(toy, "02_mixed", "import os\nprint(os.sep)", "from math import *")
        mixed, star = checking.import_cells(toy)
        assert "02_mixed, cell 2" in mixed and "02_mixed, cell 3" in star

    def test_long_definitions(self, toy):
        body = "\n".join(["    x = 1"] * (checking.FUNCTION_LINES + 1))
        two_in_one = "#| export\ndef f():\n    pass\ndef g():\n    pass"
        add(toy, "02_long", f"#| export\ndef long():\n{body}", two_in_one, f"def own():\n{body}")
        long, two = checking.sizes(toy)
        assert f"cell 2: long has {checking.FUNCTION_LINES + 1} lines" in long and "cell 3 defines f, g" in two

    def test_long_chapters(self, toy):
        add(toy, "02_many", *["pass"] * checking.CELLS)
        assert "it is two chapters" in checking.sizes(toy)[0]

    def test_shape(self, toy):
        write_notebook(toy.nbs / "01_shop.ipynb", ["#| default_exp shop", ("No title, and a [link](09_none.ipynb).",)])
        complaints = "\n".join(checking.shape(toy))
        for word in ("01_shop lacks a `# Title`", "shows no figure", "links to 09_none.ipynb, which is not there"):
            assert word in complaints

    def test_a_chapter_that_the_index_forgets(self, toy):
        add(toy, "02_new")
        assert "index does not list 02_new.ipynb." in checking.shape(toy)
        add(toy, "03_newer")
        write_notebook(toy.nbs / "worlds" / "01_bag.ipynb", ["#| default_exp worlds.bag", ("# Bag\n> So.",)])
        assert "worlds/index does not list 01_bag.ipynb." in checking.shape(toy)

    def test_unclean_notebook(self, toy):
        assert len(checking.notebooks_clean(toy)) == 5
        notebooks.clean(toy.paths())
        assert checking.notebooks_clean(toy) == []

    def test_two_chapters_for_one_module(self, toy):
        write_notebook(toy.nbs / "02_again.ipynb", SHOP)
        assert "02_again exports to shop, as 01_shop does" in "\n".join(checking.notebooks_clean(toy))

    def test_paths_and_names_of_this_machine(self, toy):
        add(toy, "02_paths", f"place = {str(toy.root / 'x')!r}", "print('/home/somebody/x')")
        running.run(toy, ["paths"], say=quiet)
        complaints = checking.no_machine(toy)
        assert any("names this machine" in line for line in complaints)
        assert "02_paths, cell 3 shows a path of this machine: /home/somebody/x" in complaints
        (toy.root / "nbs" / "runs" / "a").mkdir(parents=True)
        (toy.root / "nbs" / "runs" / "a" / "recipe.json").write_text(json.dumps(str(toy.root)))
        assert checking.no_machine(toy) == complaints, "what a run leaves is not kept"

    def test_an_unknown_rule(self, toy):
        with pytest.raises(BookError, match="There are: export_in_sync"):
            checking.check(toy, only=["nonsense"])


class TestReadme:
    def test_has_prose_code_and_outputs(self, run_book):
        assert readme.write(run_book) == [] and readme.stale(run_book) == []
        text = (run_book.root / "README.md").read_text(encoding="utf-8")
        assert "(nbs/00_record.ipynb)" in text and "```python\nsell('y')\n```" in text and "Record(name='y'" in text

    def test_figures_become_files(self, toy):
        figure = ["import matplotlib.pyplot as plt", "plt.plot([1, 2])\nplt.show()"]
        write_notebook(toy.nbs / "index.ipynb", [*INDEX, *figure])
        running.run(toy, ["index"], say=quiet)
        _, image = readme.write(toy)
        assert f"![figure]({image})" in (toy.root / "README.md").read_text(encoding="utf-8")
        (toy.root / image).unlink()
        assert image in readme.stale(toy)[0]


class TestSite:
    def test_shows_the_book(self, site):
        page = (site / "record.html").read_text(encoding="utf-8")
        assert 'id="toybook.record.Record"' in page and 'id="toybook.record.Record.double"' in page
        assert "#|" not in page and "default_exp" not in page and "secret" not in page
        assert "mathjax-3.2.2-tex-svg.js" in page and "_images/" in page
        shop = (site / "shop.html").read_text(encoding="utf-8")
        assert 'href="record.html#toybook.record.Record"' in shop and 'href="record.html#record"' in shop
        assert 'href="record.html#toybook.record.Record.double"' in shop

    def test_turns_docments_into_tables(self, site):
        page = (site / "api" / "record.html").read_text(encoding="utf-8")
        for word in ("what it is *called*", "how large, in bytes", "how often", "more does not fit a page"):
            assert word in page
        assert "../record.html#toybook.record.Record.double" in page
        shop = (site / "api" / "shop.html").read_text(encoding="utf-8")
        assert "**options" in shop and "none so far" in shop and "what was sold" in shop

    def test_a_part_is_a_folder_of_pages_with_an_overview(self, site):
        page = (site / "worlds" / "box.html").read_text(encoding="utf-8")
        assert 'href="../record.html"' in page and 'id="toybook.worlds.box.Box.put"' in page
        assert 'href="../record.html#toybook.record.Record"' in (site / "api" / "worlds" / "box.html").read_text(encoding="utf-8").replace("../../", "../")
        assert "Hold a record." in (site / "api" / "worlds" / "box.html").read_text(encoding="utf-8"), "a patched method is its class's"
        assert "hide" in page, "a long cell of imports is folded"
        index = (site / "index.html").read_text(encoding="utf-8")
        assert 'href="worlds/index.html"' in index and "Parts" in index and 'href="box.html"' in (site / "worlds" / "index.html").read_text(encoding="utf-8")

    def test_is_searchable_and_whole_without_a_network(self, site):
        assert "sell" in (site / "searchindex.js").read_text(encoding="utf-8")
        assert rendering.broken_links(site) == []
        page = site / "index.html"
        page.write_text(page.read_text(encoding="utf-8").replace(
            "</body>", '<a href="gone.html">x</a><script src="https://example.org/x.js"></script></body>'), encoding="utf-8")
        gone, fetched = sorted(rendering.broken_links(site), key=lambda line: "fetches" in line)
        assert "gone.html, which is not there" in gone and "from the network" in fetched

    def test_a_link_to_no_chapter_is_an_error(self, toy):
        write_notebook(toy.nbs / "index.ipynb", [("# toy\n> Toy.\n\n[gone](09_gone.ipynb)",)])
        with pytest.raises(BookError, match="gone"):
            rendering.render(toy, toy.root / "_docs")
        assert not (toy.root / "_docs").exists()


@pytest.mark.parametrize("arguments, word", [(["run", "nonsense"], "There are: 00_record, 01_shop, worlds/00_box, worlds/index, index."),
                                             (["check", "--rules", "nonsense"], "no rule is called")])
def test_the_command_line_says_what_is_wrong(toy, arguments, word):
    command = [sys.executable, str(TOOL), "--root", str(toy.root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr
