"""Write the table of all pipeline classes anew: ``make pipelines``.

What another version of diffusers changed is the difference from the table that was there.
"""

from __future__ import annotations

import re
import signal
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from support.lora_files import ROOT
from support.sweep.comparing import EQUAL, MODES, Found, look_at
from support.sweep.pipelines import pipeline_classes
from tqdm import tqdm

PAGE = ROOT / "docs" / "reference" / "pipelines.md"

#: Seconds that a pipeline may take, after which it is not tiny.
PATIENCE = 120

#: A row that has been compared: pipeline, and what each mode did.
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", re.MULTILINE)

INTRODUCTION = """\
# Pipelines

Every pipeline class of diffusers {version}, sampled with two random LoRAs on all linear layers and
convolutions of its denoisers. *equal*: the latents are those of K-LoRA written out literally, which
computes all weights anew before each evaluation; layers switch between LoRAs meanwhile; and the
pipeline is bare again afterwards.
`make pipelines` writes this page anew.

{equal} classes are equal in both modes, {other} are not, and {unbuilt} were not compared.

| pipeline | {modes} |
|---|{lines}|
{rows}

## Not compared

These need weights or inputs that no rule of `tests/support/sweep` makes yet.

| pipeline | why |
|---|---|
{reasons}
"""


def compared() -> dict[str, tuple[str, ...]]:
    """Pipeline -> what the page says of each mode."""
    table, _, _ = PAGE.read_text().partition("## Not compared")
    return {name: modes for name, *modes in ROW.findall(table)}


def page(found: list[Found]) -> str:
    """The page with these results."""
    built = [each for each in found if each.built is None]
    equal = [each for each in built if set(each.modes) == {EQUAL}]
    return INTRODUCTION.format(
        version=diffusers.__version__,
        equal=len(equal),
        other=len(built) - len(equal),
        unbuilt=len(found) - len(built),
        modes=" | ".join(MODES),
        lines="|".join("---" for _ in MODES),
        rows="\n".join(f"| `{e.pipeline}` | {' | '.join(map(_cell, e.modes))} |" for e in built),
        reasons="\n".join(
            f"| `{e.pipeline}` | {_cell(e.built)} |" for e in found if e.built is not None
        ),
    )


def _cell(text: str) -> str:
    return re.sub(r"[|<>`*_\[\]{}]", " ", text)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"it took more than {PATIENCE} seconds")


def main() -> None:
    """Look at all of them; a quarter of an hour on two cores."""
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_long)
    found = []
    for name in tqdm(sorted(pipeline_classes())):
        signal.alarm(PATIENCE)
        found.append(look_at(name))
        signal.alarm(0)
    Path(PAGE).write_text(page(found))


if __name__ == "__main__":
    main()
