"""Look at the pipeline classes and write the table of them: ``make pipelines``.

Classes that are named are looked at alone, and the rest of the table stays. What changed is
printed: after an update of diffusers, what the update did.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from support.sweep import page
from support.sweep.comparing import Found, look_at
from support.sweep.pipelines import pipeline_classes
from tqdm import tqdm

#: Seconds that a pipeline may take, after which it is not tiny.
PATIENCE = 300


def main(names: Sequence[str]) -> None:
    """Look at these classes, or at all; half an hour on two cores."""
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    classes = pipeline_classes()
    if unknown := [name for name in names if name not in classes]:
        sys.exit(f"diffusers {diffusers.__version__} has no {', no '.join(unknown)}.")
    before = page.read()
    after = {name: found for name, found in before.items() if name in classes}
    for name in tqdm(sorted(names or classes)):
        after[name] = _patiently(name)
        page.write(after)
    lines = list(page.changes(before, after))
    print("\n".join(lines or ["Nothing changed."]))


def _patiently(name: str) -> Found:
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(PATIENCE)
    try:
        return look_at(name)
    finally:
        signal.alarm(0)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"it took more than {PATIENCE} seconds")


if __name__ == "__main__":
    main(sys.argv[1:])
