"The commands that look into a store, as a user types them."
from pathlib import Path

import pytest

from exprag.demo import CONTROLS, demo_plan
from exprag.cli import EXPECTED, build_parser, main
from exprag.plans import FIVE, load_plan, variants

SAMPLE = Path(__file__).parents[1] / "nbs" / "data" / "sample.jsonl"


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    place = tmp_path_factory.mktemp("cli") / "bank.db"
    main(["import", str(SAMPLE), "--store", str(place)])
    return place


def test_what_is_imported_is_found_shown_and_examined(filled, capsys):
    main(["search", "turn on the green light bulb", "--store", str(filled)])
    first = capsys.readouterr().out.splitlines()[0]
    assert "power-component" in first
    main(["show", first.split()[1], "--store", str(filled)])
    shown = capsys.readouterr().out
    assert "light bulb" in shown and "> " in shown and "score 100" in shown
    main(["doctor", "--store", str(filled)])
    assert "nothing wrong" in capsys.readouterr().out


def test_what_goes_out_comes_back(filled, tmp_path, capsys):
    main(["export", str(tmp_path / "log.jsonl"), "--store", str(filled), "--format", "sharegpt"])
    main(["import", str(tmp_path / "log.jsonl"), "--store", str(filled)])
    assert "0 episodes added, 24 known before" in "".join(capsys.readouterr())


def test_an_unknown_id_and_a_missing_store_are_said(filled, tmp_path, capsys):
    for arguments, said in ((["show", "feedfeed", "--store", str(filled)], "feedfeed"), (["search", "x", "--store", str(tmp_path / "no.db")], "no.db"),
                            (["doctor", "--store", str(tmp_path / "no.db")], "no.db")):
        assert main(arguments) and said in "".join(capsys.readouterr())
    assert not (tmp_path / "no.db").exists()


def test_a_broken_line_is_named_and_the_rest_goes_in(tmp_path, capsys):
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    (tmp_path / "log.jsonl").write_text("\n".join([*lines[:3], '{"broken', *lines[3:5]]) + "\n", encoding="utf-8")
    main(["import", str(tmp_path / "log.jsonl"), "--store", str(tmp_path / "bank.db"), "--format", "exprag"])
    said = "".join(capsys.readouterr())
    assert "5 episodes added" in said and "1 record" in said and "4" in said


@pytest.fixture
def asked(tmp_path, monkeypatch):
    "What `reproduce` is asked for: plans and places."
    import exprag.reproduce
    found = []
    monkeypatch.setattr(exprag.reproduce, "reproduce", lambda plan, place, until: found.append((plan, place, until)) or "a table")
    monkeypatch.chdir(tmp_path)
    return found


@pytest.mark.parametrize("arguments, size, out, changes", [
    ([], None, "runs/demo", []),
    (["--quick"], "quick", "runs/demo-quick", []),
    (["--wide", "--seed", "7"], "wide", "runs/demo-wide", ["train.seeds=[7]"]),
    (["--panel", "test-hard", "--constrain"], None, "runs/demo", ["evaluate.panels=['test-hard']", "policy={constrain='templates'}"]),
    (["--wide", "--panel", "demo", "--out", "x"], "wide", "x", ["evaluate.panels=['demo']"]),
    (["--controls"], None, "runs/demo", [f"evaluate.conditions={[*FIVE, *CONTROLS]}"]),
    (["--quick", "--model", "some/model"], "quick", "runs/demo-quick", ["model=some/model", "train.config=paper", "train.change={max_steps=12, batch=4, save_steps=4}"]),
    (["--model", "some/model", "--recipe", "nano", "--set", "memory.k=2"], None, "runs/demo", ["model=some/model", "memory.k=2"]),
])
def test_the_options_of_the_demo_choose_a_plan_and_a_place(arguments, size, out, changes, asked, capsys):
    assert main(["demo", *arguments]) == 0
    (plan, place, until), = asked
    name, own = demo_plan(size)
    assert (plan, str(place.folder), until) == (load_plan(name, [*own, *changes]), out, "report")
    assert "a table" in (said := capsys.readouterr().out) and f"Written to {out}/report-{plan.fingerprint}" in said


def test_progress_tracking_is_a_plan_and_a_place_of_its_own(asked):
    assert main(["demo", "--quick", "--track-progress", "--controls", "--constrain"]) == 0
    (plan, place, _), = asked
    assert str(place.folder) == "runs/demo-quick-tracked" and plan.name == "demo-quick-tracked" and "track_progress" in plan.memory.stages
    assert plan.evaluate.conditions == (*FIVE, *CONTROLS) and len(variants(plan)) == 9 and plan.policy == {"avoid_rejected": True, "constrain": "templates"}


def test_the_help_says_how_many_conditions_there_are(capsys):
    with pytest.raises(SystemExit): build_parser().parse_args(["demo", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "eight conditions instead of five" in said and "nine with --track-" in said  # argparse breaks lines at hyphens


def test_a_demo_is_quick_or_wide_but_not_both(capsys):
    with pytest.raises(SystemExit): build_parser().parse_args(["demo", "--quick", "--wide"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["demo", "--recipe", "papre"], ["show", "1", "--store", "none.db"], ["search", "boil", "--store", "none.db"],
                                     ["export", "x.jsonl", "--store", "none.db"], ["import", "none.jsonl", "--store", "new.db"]])
def test_every_command_shows_where_an_error_came_from_when_asked(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1 and "Traceback" not in (said := capsys.readouterr().err) and said.startswith("exprag: ")
    with pytest.raises(EXPECTED): main([*command, "--traceback"])


@pytest.mark.parametrize("error, said", [
    (KeyError("boil"), "exprag: KeyError: boil (--traceback shows where it came from)"),
    (RuntimeError(), "exprag: RuntimeError: nothing was said (--traceback shows where it came from)"),
    (KeyError("the view 'poem' is unknown"), "exprag: the view 'poem' is unknown"),
    (FileNotFoundError(2, "No such file or directory", "x"), "exprag: [Errno 2] No such file or directory: 'x'"),
])
def test_an_error_says_more_than_a_bare_word(error, said, monkeypatch, capsys):
    def broken(*_): raise error
    monkeypatch.setattr("exprag.cli._run_doctor", broken)
    assert main(["doctor", "--store", "x"]) == 1 and capsys.readouterr().err == said + "\n"
