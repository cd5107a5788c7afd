"""Write the trained base as it is kept in the repository: in float16, to be loaded in float32.

python -m drawings.base.publish RUN FOLDER
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import torch
from diffusers import DiffusionPipeline

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("folder", type=_FOLDER)
def main(run: Path, folder: Path) -> None:
    """Write RUN/base to FOLDER in float16; an earlier one there is replaced."""
    pipe = DiffusionPipeline.from_pretrained(run / "base")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.to(torch.float16)
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    pipe.save_pretrained(new)
    for path in new.rglob("*.json"):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            continue
        kept = {key: value for key, value in facts.items() if key != "_name_or_path"}
        if "dtype" in kept:
            # transformers loads a part in this dtype, and diffusers loads its own in float32.
            kept["dtype"] = "float32"
        if kept != facts:
            path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


if __name__ == "__main__":
    main()
