"""The program that runs the snippets of one case in one tree.

It reads lines of JSON, ``["run", CODE]``, ``["time", CODE]`` or ``["value", EXPRESSION]``, and
answers each with a line of JSON: null, [seconds, seconds of processor], or the value. It imports
nothing of the trees itself, so a snippet pays for all its imports.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer until the input ends; the arguments are the folders ``inputs`` and ``own``."""
    inputs, own = map(Path, sys.argv[1:])
    names: dict[str, Any] = {"inputs": inputs, "own": own}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a snippet prints is no answer
    for line in sys.stdin:
        what, code = json.loads(line)
        answer = {"run": _run, "time": _time, "value": eval}[what](code, names)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _run(code: str, names: dict[str, Any]) -> None:
    exec(code, names)


def _time(code: str, names: dict[str, Any]) -> tuple[float, float]:
    compiled = compile(code, "timed", "exec")
    begin, work = time.perf_counter(), time.process_time()
    exec(compiled, names)
    return time.perf_counter() - begin, time.process_time() - work


if __name__ == "__main__":
    main()
