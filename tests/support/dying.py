"""Work that kills its worker the first time, in a module that workers can import."""

from __future__ import annotations

import os
from pathlib import Path


def dies_once(marker: str) -> str:
    if not Path(marker).exists():
        Path(marker).touch()
        os._exit(1)
    return marker
