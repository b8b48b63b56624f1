"The commands that look into a store, as a user types them."
from pathlib import Path

import pytest

from exprag.cli import main

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
