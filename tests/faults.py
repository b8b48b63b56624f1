"""What goes wrong on purpose: processes that are killed while they are at it, and files of which a byte has changed."""
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

FEW_OR_MANY = [5, pytest.param(100, marks=pytest.mark.slow)]  # rounds of a test with kills
AT_IT = "ready"  # what a process prints when it is about to begin


def killed(code: str,  # of a process, which prints `AT_IT`; it can import what the tests can
           *arguments,
           within: float,  # seconds from then until it is killed
           chance: random.Random) -> str:  # what it printed after that
    "Run a process and kill it at some moment while it is at it."
    code = f"import sys\nsys.path.insert(0, {os.path.dirname(__file__)!r})\n" + code
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == AT_IT
    time.sleep(chance.uniform(0, within))
    os.kill(process.pid, signal.SIGKILL)
    output = process.communicate()[0]
    assert process.returncode in (0, -signal.SIGKILL), f"it had failed before it was killed: {output}"  # 0: it was done
    return output


def damaged(data: bytes,  # of a file
            count: int,
            head: int,  # bytes at its beginning, which are hit as often as all the rest
            chance: random.Random) -> Iterator[tuple[int, bytes]]:
    "The place of a fault, and the file with it: a byte that is another, or an end that is missing."
    for number in range(count):
        at = chance.randrange(head if number % 4 < 2 else len(data))
        yield at, data[:at] if number % 2 else data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1:]
