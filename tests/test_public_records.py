"""Real records of public formats are read, and written back equal.

EXPRAG_PUBLIC_RECORDS names a folder that has a folder for each format; nothing of it is kept here.
    EXPRAG_PUBLIC_RECORDS=~/records python -m pytest -n 0 -s tests/test_public_records.py
"""
import os
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from exprag.logs.files import read_log, write_log
from exprag.logs.formats import FORMATS

FOLDER = os.environ.get("EXPRAG_PUBLIC_RECORDS")
MOST = int(os.environ.get("EXPRAG_PUBLIC_MOST", "1000"))  # records of a format
KINDS = sorted(p.name for p in Path(FOLDER).iterdir() if p.is_dir()) if FOLDER else []


@pytest.mark.skipif(not KINDS, reason="EXPRAG_PUBLIC_RECORDS names no folder with records")
@pytest.mark.parametrize("kind", KINDS or ["none"])
def test_records_come_back_as_they_were(kind, tmp_path):
    refused, read = [], []
    for path in sorted(p for p in Path(FOLDER, kind).rglob("*") if p.is_file()):
        read += islice(read_log(path, refused=refused.append), MOST - len(read))
    different = Counter()
    for format in ("exprag", *FORMATS):
        suffix = ".jsonl" if format != "turns" else "-turns.jsonl"
        write_log(read, tmp_path / f"{format}{suffix}", format)
        again = list(read_log(tmp_path / f"{format}{suffix}", format))
        assert len(again) == len(read)
        different[format] = sum(a.to_dict() != b.to_dict() for a, b in zip(read, again))
    print(f"\n{kind}: {len(read)} episodes, {len(refused)} refused, different after writing: {dict(different)}")
    for why, count in Counter(str(r).split(": ", 1)[-1][:150] for r in refused).most_common(5): print(f"   {count} x {why}")
    assert read and not any(different.values())
