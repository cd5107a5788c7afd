"""The page that says how every pipeline class gets on with fusions: written, read, compared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import diffusers
from support.lora_files import ROOT
from support.sweep.comparing import CLEARLY, EQUAL, MODES, ROUNDINGS, WITHIN, Found

PAGE = ROOT / "docs" / "reference" / "pipelines.md"

#: A row that has been compared: pipeline, and what each mode did.
_COMPARED = re.compile(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", re.MULTILINE)

#: A row that has not: pipeline, and why.
_NOT_COMPARED = re.compile(r"^\| `(\w+)` \| (.+?) \|$", re.MULTILINE)

_HEADING = "## Not compared"

_TEXT = """\
# Pipelines

Every pipeline class of diffusers {version}, sampled with two random LoRAs on all linear layers and
convolutions of its denoisers. *equal*: the latents are those of K-LoRA written out literally, which
computes all weights anew before each evaluation; layers switch between LoRAs meanwhile; and the
pipeline is bare again afterwards. A denoiser that another scheduler than `pipe.scheduler` steps, as
the priors of the combined pipelines, has no LoRA: a fusion that changes it is refused.

*{within} (x)*: the pipeline magnifies the last bits of its
weights. Under the literal rule its latents change by up to x when every weight of its denoisers
moves to a neighbouring number. Those of the mode differ by at most {roundings} x. Those of a
schedule that is one evaluation late differ by at least {late} x, or the row says *differs*.

`make pipelines` writes this page anew and prints what changed; `make pipelines CLASSES="A B"` looks
at these classes alone.

{equal} classes are equal in both modes, {rounded} are equal within their own rounding,
{other} are not, and {unbuilt} were not compared.

| pipeline | {modes} |
|---|{lines}|
{rows}

{heading}

*no denoising loop*: there are no steps between which a LoRA could be chosen. *not buildable*: no
rule of `tests/support/sweep` makes a tiny one that can be called here.

| pipeline | why |
|---|---|
{reasons}
"""


def write(found: Mapping[str, Found], path: Path = PAGE) -> None:
    """Write the page with these results."""
    built = [each for _, each in sorted(found.items()) if each.built is None]
    unbuilt = [each for _, each in sorted(found.items()) if each.built is not None]
    equal = [each for each in built if set(each.modes) == {EQUAL}]
    other = [each for each in built if not all(said.startswith(EQUAL) for said in each.modes)]
    text = _TEXT.format(
        version=diffusers.__version__,
        within=WITHIN,
        roundings=ROUNDINGS,
        late=CLEARLY * ROUNDINGS,
        equal=len(equal),
        rounded=len(built) - len(equal) - len(other),
        other=len(other),
        unbuilt=len(unbuilt),
        modes=" | ".join(MODES),
        lines="|".join("---" for _ in MODES),
        rows="\n".join(f"| `{e.pipeline}` | {' | '.join(map(_cell, e.modes))} |" for e in built),
        heading=_HEADING,
        reasons="\n".join(f"| `{e.pipeline}` | {_cell(str(e.built))} |" for e in unbuilt),
    )
    path.write_text(text)


def read(path: Path = PAGE) -> dict[str, Found]:
    """Pipeline -> what the page says."""
    compared, _, rest = path.read_text().partition(_HEADING)
    found = {name: Found(name, None, tuple(modes)) for name, *modes in _COMPARED.findall(compared)}
    return found | {name: Found(name, why) for name, why in _NOT_COMPARED.findall(rest)}


def as_written(found: Found) -> Found:
    """As the page has it, without the signs that its language reads."""
    why = None if found.built is None else _cell(found.built)
    return Found(found.pipeline, why, tuple(map(_cell, found.modes)))


def changes(before: Mapping[str, Found], after: Mapping[str, Found]) -> Iterator[str]:
    """A line for each class that is new, gone, or gets on otherwise."""
    for name in sorted({*before, *after}):
        old, new = (_verdict(found.get(name)) for found in (before, after))
        if name not in before:
            yield f"new:     {name}: {new}"
        elif name not in after:
            yield f"gone:    {name}: was {old}"
        elif old != new:
            yield f"changed: {name}: {new}, was {old}"


def _verdict(found: Found | None) -> str:
    if found is None:
        return ""
    if found.built is not None:
        return _cell(found.built)
    return ", ".join(f"{mode} {_cell(said)}" for mode, said in zip(MODES, found.modes, strict=True))


def _cell(text: str) -> str:
    return re.sub(r"[|<>`*_\[\]{}]", " ", text).strip()
