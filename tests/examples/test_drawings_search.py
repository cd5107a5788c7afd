"""The search on the drawings: its blocks, its picks, and what it reports of them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from drawings.loras.recipes import Recipe
from drawings.search import __main__ as run
from drawings.search.drawing import PLAIN_SUM, Pair
from drawings.search.space import blocks_of, candidates
from drawings.search.written import Pick, picked_file, picks_of, rank_correlation, reported_text
from drawings.table.rows import Material

from klora_compile.searching.space import Candidate

SUBJECTS = ("penguin", "octopus", "rocket", "frog")
STYLES = ("ink", "soft", "mono")


def material() -> Material:
    return Material(
        [Recipe("subject", name, (), (f"a {name}",)) for name in SUBJECTS],
        [Recipe("style", name, (), (f"a dog, {name}",)) for name in STYLES],
        lambda subject, style: (subject, style) != ("frog", "ink"),
    )


def test_every_pair_is_in_one_block_and_styles_take_turns() -> None:
    blocks = blocks_of(material(), 3)
    pairs = [pair for block in blocks for pair in block]
    assert sorted(pairs) == sorted(material().pairs)
    assert [pair for block in blocks_of(material(), 1) for pair in block] == [
        *blocks[0],
        *blocks[1],
    ]
    assert blocks[0] == [("penguin", "ink"), ("rocket", "mono")]
    assert blocks[1] == [("octopus", "soft")]  # the frog has no drawing in ink
    assert all(len({subject for subject, _ in block}) == len(block) for block in blocks)


def test_fewer_candidates_are_the_first_of_more() -> None:
    few, more = candidates(10), candidates(40)
    assert [each.label for each in few] == [each.label for each in more[:10]]


class Easel:
    """Scores by settings alone: by the truth, heavy styles win, and by own pictures light ones."""

    def __init__(self, *_: Any) -> None:
        self.drawn: list[tuple[Pair, str]] = []

    def verdicts(self, pair: Pair, some: list[Candidate]) -> list[Any]:
        self.drawn += [(pair, each.label) for each in some]
        found = []
        for each in some:
            weight = float(each.settings.get("weight.style", 1.0))
            scores = {"truth": weight, "own-pictures": 1 / weight, "subject": 0.5, "style": 0.25}
            found.append([scores])
        return found


@pytest.fixture
def easel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Easel:
    """A run without a model, on a material of stand-ins."""
    found = Easel()
    nothing = type("Nothing", (), {"load": lambda *_: None, "with_packages": lambda *_: None})
    nothing.from_pretrained = lambda *_: None  # type: ignore[attr-defined]
    monkeypatch.setattr(run, "Easel", lambda *_: found)
    for name in ("DiffusionPipeline", "Judges", "OwnPicturesJudge"):
        monkeypatch.setattr(run, name, nothing())
    monkeypatch.setattr(run, "material_of", lambda *_: material())
    monkeypatch.setattr(run, "digests", lambda *_: {"base": "a"})
    return found


def main(folder: Path, *options: object) -> Any:
    words = (folder, folder, folder, folder, "entangled", "--styles", 3, *options)
    return CliRunner().invoke(run.main, list(map(str, words)))


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def test_each_judge_picks_and_a_commit_of_that_is_reported(easel: Easel, tmp_path: Path) -> None:
    done = main(tmp_path, "--search", 30)
    assert done.exit_code == 0, done.output
    file = tmp_path / "entangled-picked.json"
    truth, own = (Pick(**each) for each in json.loads(file.read_text()))
    assert (truth.judge, truth.settings["weight.style"]) == ("truth", 1.4)
    assert (own.judge, own.settings["weight.style"]) == ("own-pictures", 0.7)
    assert "the judges' ranks correlate by -1.00 (Spearman)" in done.stdout
    assert f"Picked by `truth`: {truth.label}" in done.stdout
    before = list(easel.drawn)
    assert len(before) == len(set(before))
    assert len(before) < 31 * len(material().pairs)  # most candidates did not meet all
    assert main(tmp_path, "--search", 30).stdout == done.stdout
    assert easel.drawn == before  # everything was kept

    refused = main(tmp_path, "--reported", file)
    assert refused.exit_code == 1
    assert "is in no git repository" in refused.output
    git(tmp_path, "init")
    git(tmp_path, "add", file.name)
    git(tmp_path, "commit", "-m", "Name the picks")
    easel.drawn.clear()
    told = main(tmp_path, "--reported", file)
    assert told.exit_code == 0, told.output
    assert {label for _, label in easel.drawn} == {PLAIN_SUM.label, truth.label, own.label}
    assert {pair for pair, _ in easel.drawn} == set(material().pairs)
    line = next(each for each in told.stdout.splitlines() if each.startswith(f"| {truth.label}"))
    assert "| 1.400 (1.400 to 1.400) | +0.400 (+0.400 to +0.400)" in line
    picked_file((truth, Pick("own-pictures", "rule np", {"rule": "np"})), file)
    assert "is not committed as it is" in main(tmp_path, "--reported", file).output


def test_another_file_is_no_pick(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('[{"row": "K-LoRA s"}]')
    git(tmp_path, "init")
    git(tmp_path, "add", file.name)
    git(tmp_path, "commit", "-m", "Name rows")
    with pytest.raises(ValueError, match="holds no picks"):
        picks_of(file)


def test_differences_are_over_the_pairs_that_a_candidate_met() -> None:
    def verdict(score: float) -> list[dict[str, float]]:
        return [dict.fromkeys(("truth", "own-pictures", "subject", "style"), score)]

    found = {
        PLAIN_SUM.label: {"penguin, ink": verdict(0.2), "frog, soft": verdict(0.9)},
        "rule np": {"penguin, ink": verdict(0.3)},
    }
    text = reported_text(found, ())
    assert "| rule np | 1 | 0.300 (0.300 to 0.300) | +0.100 (+0.100 to +0.100) |" in text


def test_ranks_correlate() -> None:
    assert rank_correlation([1, 5, 2], [0.1, 9, 0.3]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2], [5, 5, 0]) == pytest.approx(-1)
