"The commands that look into a store, as a user types them."
from dataclasses import replace
from pathlib import Path

import pytest

from exprag.demo import CONTROLS, FIVE
from exprag.cli import EXPECTED, build_parser, main

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


@pytest.mark.parametrize("arguments, name, out, changed", [
    ([], "demo", "runs/demo", {}),
    (["--quick"], "quick", "runs/demo-quick", {}),
    (["--wide", "--seed", "7"], "wide", "runs/demo-wide", {"seed": 7}),
    (["--panel", "test-hard", "--constrain"], "demo", "runs/demo", {"panel": "test-hard", "constrain": "templates"}),
    (["--wide", "--panel", "demo", "--out", "x"], "wide", "x", {"panel": "demo"}),
    (["--controls"], "demo", "runs/demo", {"conditions": (*FIVE, *CONTROLS)}),
])
def test_the_options_of_the_demo_choose_a_plan_and_a_place(arguments, name, out, changed, tmp_path, monkeypatch):
    import exprag.demo
    asked = []
    def written(place, plan, *rest):
        asked.append((str(place), plan))
        Path(place).mkdir(parents=True)
        Path(place, "table.txt").write_text("")
    monkeypatch.setattr(exprag.demo, "demo", written)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 0
    assert asked == [(out, replace(exprag.demo.PLANS[name], **changed))]


def test_progress_tracking_is_a_plan_and_a_place_of_its_own(tmp_path, monkeypatch):
    import exprag.demo
    asked = []
    monkeypatch.setattr(exprag.demo, "demo", lambda place, plan, *rest: asked.append((str(place), plan)) or Path(place).mkdir(parents=True) or Path(place, "table.txt").write_text(""))
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--quick", "--track-progress", "--controls"]) == 0
    (place, plan), = asked
    assert place == "runs/demo-quick-tracked" and plan.track_progress and plan.conditions == (*FIVE, *CONTROLS, exprag.demo.TRACKED_REPLAY)


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
