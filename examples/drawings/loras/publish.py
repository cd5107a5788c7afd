"""Put LoRAs into the repository, with the records of all and the true drawings of the demo.

    python -m drawings.loras.publish PACKAGES LORAS

LORAS is the folder that ``drawings.loras`` wrote, with a folder for each regime. The list of what
is put is in ``drawings/shipped.py``. ``loras/records.json`` names every LoRA of every regime by its
digest, and ``drawings.loras`` makes it again.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import click
from PIL import Image

from drawings.base.subjects import STYLES as PACKAGES_OF_STYLES
from drawings.loras.acceptance import Ledger
from drawings.loras.recipes import Regime
from drawings.material import drawing, picture
from drawings.shipped import (
    LORAS,
    PAIRS,
    RECORDS,
    REGIME,
    STYLES,
    SUBJECTS,
    TRUE_DRAWINGS,
    true_drawing,
)

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("packages", type=_FOLDER)
@click.argument("loras", type=_FOLDER)
def main(packages: Path, loras: Path) -> None:
    """Copy the LoRAs that ship from LORAS, and render their true drawings from PACKAGES."""
    records = {regime.value: Ledger(loras / regime.value).read() for regime in Regime}
    trained, known = loras / REGIME, records[REGIME]
    stems = [*(f"subject-{name}" for name in SUBJECTS), *(f"style-{name}" for name in STYLES)]
    missing = [stem for stem in stems if stem not in known or not known[stem].accepted]
    if missing:
        raise click.ClickException(
            f"{trained} has no accepted LoRA of {', '.join(missing)}. Train it first."
        )
    pictures = {pair: _rendered(packages, *pair) for pair in PAIRS}
    for folder, kind in ((LORAS, "*.safetensors"), (TRUE_DRAWINGS, "*.png")):
        folder.mkdir(exist_ok=True)
        for earlier in folder.glob(kind):
            earlier.unlink()
    for stem in stems:
        shutil.copyfile(trained / f"{stem}.safetensors", LORAS / f"{stem}.safetensors")
    for pair, drawn in pictures.items():
        drawn.save(true_drawing(*pair))
    found = {
        regime: {stem: asdict(entry) for stem, entry in entries.items()}
        for regime, entries in records.items()
    }
    text = json.dumps(found, indent=1)
    RECORDS.write_text(f"{text}\n", encoding="utf-8")


def _rendered(packages: Path, subject: str, style: str) -> Image.Image:
    drawn = drawing(packages, PACKAGES_OF_STYLES[style], subject)
    if drawn is None:
        raise click.ClickException(f"There is no drawing of {subject} in {style}. Name others.")
    return picture(drawn)


if __name__ == "__main__":
    main()
