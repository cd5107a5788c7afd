"""Running a function in a fork of this process, which may die or lose a right without harm."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def forked(
    function: Callable[[], object], errors: Path, until: Callable[[], bool] | None = None
) -> int:
    """Run a function in a fork, which costs no start of Python, and return how that ended.

    Args:
        errors: the file that gets the fork's standard error.
        until: kill the fork as soon as this is true.

    Returns:
        The exit status: 0 for success, 1 for an exception, minus a signal's number.
    """
    child = os.fork()
    if not child:
        status = 1
        try:
            sys.stderr = errors.open("w")
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    if until is not None:
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if until():
                os.kill(child, 9)
                break
            time.sleep(0.0005)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
