"""Search settings on the tuning subjects, and see on the reported ones whether they hold.

    python -m drawings.search PACKAGES RUN LORAS OUT entangled

searches by two judges: the true drawing, and the LoRAs' own pictures, which need no truth. It
writes the settings that each picked, OUT/REGIME-picked.json. After a commit of that file,

    python -m drawings.search PACKAGES RUN LORAS OUT entangled --reported REGIME-picked.json

draws the picked settings and the plain sum on the reported subjects, once. A run that was stopped
goes on where it was. Both write a table, OUT/REGIME-PART.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from drawings.base.subjects import REPORTED_SUBJECTS, TUNING_SUBJECTS
from drawings.judges.fitted import Judges
from drawings.loras.recipes import Regime
from drawings.search.drawing import JUDGES, PLAIN_SUM, Easel, Pair
from drawings.search.space import CANDIDATES, KEPT, blocks_of, candidates
from drawings.search.written import Pick, picked_file, picks_of, reported_text, tuning_text
from drawings.table.ingredients import digests, material_of
from drawings.table.kept import Kept, Results
from drawings.table.places import places
from drawings.table.rules import STEPS
from klora_compile.judging.own_pictures import OwnPicturesJudge
from klora_compile.searching.halving import halved, in_order
from klora_compile.searching.space import Candidate

_GUIDANCE = 3.0


@dataclass(frozen=True)
class Run:
    """A run: what was drawn and scored so far, and the easel for the rest."""

    easel: Easel
    kept: Kept
    found: Results

    def draw(self, some: Sequence[Candidate], pairs: Sequence[Pair]) -> None:
        """Draw and score what is not kept yet, a pair of LoRAs after the other."""
        for pair in tqdm(sorted(pairs), desc=f"{len(some)} candidates", unit="pair", leave=False):
            place = ", ".join(pair)
            left = [each for each in some if place not in self.found.get(each.label, {})]
            left.sort(key=lambda each: str(each.settings["rule"]))  # who shares derived slots
            if not left:
                continue
            for each, verdicts in zip(left, self.easel.verdicts(pair, left), strict=True):
                self.found.setdefault(each.label, {})[place] = verdicts
                self.kept.add(each.label, place, verdicts)

    def scores(self, each: Candidate, pairs: Sequence[Pair], judge: str) -> list[float]:
        """Return a candidate's mean over seeds in each pair, by one judge."""
        cells = [self.found[each.label][", ".join(pair)] for pair in pairs]
        return [sum(verdict[judge] for verdict in cell) / len(cell) for cell in cells]

    def picked(self, judge: str, count: int, blocks: Sequence[Sequence[Pair]]) -> Pick:
        """Search by one judge."""

        def score(some: Sequence[Candidate], new: Sequence[Pair]) -> dict[Candidate, list[float]]:
            self.draw([PLAIN_SUM, *some], new)
            return {each: self.scores(each, new, judge) for each in some}

        every = candidates(count)
        scores = halved(every, blocks, KEPT, score)
        best = in_order(every, scores)[0]
        return Pick(judge, best.label, dict(best.settings))


@click.command()
@places
@click.option(
    "--reported",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Draw the committed picks in this file on the reported subjects.",
)
@click.option("--search", "count", default=CANDIDATES, show_default=True, help="Candidates.")
@click.option("--styles", default=1, show_default=True, help="Styles of each subject, in turns.")
@click.option("--seeds", default=1, show_default=True, help="Pictures per pair and candidate.")
@click.option("--threads", default=1, show_default=True, help="On the CPU.")
def main(
    packages: Path,
    run: Path,
    loras: Path,
    out: Path,
    regime: str,
    reported: Path | None,
    count: int,
    styles: int,
    seeds: int,
    threads: int,
) -> None:
    """Search with the base and judges in RUN and the LoRAs in LORAS/REGIME."""
    torch.set_num_threads(threads)
    folder = loras / regime
    part, subjects = ("reported", REPORTED_SUBJECTS) if reported else ("tuning", TUNING_SUBJECTS)
    sampling = {"steps": STEPS, "guidance": _GUIDANCE}
    made_with: dict[str, Any] = {"seeds": seeds, **sampling}
    try:
        picks: tuple[Pick, ...] = ()
        if reported:
            picks, made_with["picks"] = picks_of(reported)
        material = material_of(packages, Regime(regime), subjects, folder)
        kept = Kept(out / f"{regime}-{part}.jsonl")
        found = kept.open(made_with | digests(run, folder, material))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    pipe = DiffusionPipeline.from_pretrained(run / "base")
    easel = Easel(
        pipe,
        Judges.load(run / "judges.pt"),
        OwnPicturesJudge.with_packages(),
        packages,
        folder,
        {each.stem: each.prompts for each in (*material.subjects, *material.styles)},
        sampling,
        seeds,
    )
    desk, blocks = Run(easel, kept, found), blocks_of(material, styles)
    if reported:
        pairs = [pair for block in blocks for pair in block]
        desk.draw([PLAIN_SUM, *(pick.candidate for pick in picks)], pairs)
        places = [", ".join(pair) for pair in pairs]
        rows = (PLAIN_SUM.label, *(pick.label for pick in picks))
        shown = {row: {place: found[row][place] for place in places} for row in rows}
        text = reported_text(shown, picks)
    else:
        picks = tuple(desk.picked(judge, count, blocks) for judge in JUDGES)
        tried = [PLAIN_SUM.label, *(each.label for each in candidates(count))]
        text = tuning_text({label: found[label] for label in tried}, picks)
        picked_file(picks, out / f"{regime}-picked.json")
    (out / f"{regime}-{part}.md").write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
