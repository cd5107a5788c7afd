"""The table of rules: its rows, kept cells, candidates, numbers, and the blind test."""

from __future__ import annotations

import json
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from drawings.base.subjects import HELD_OUT_SUBJECTS
from drawings.loras.acceptance import Entry, Ledger
from drawings.loras.recipes import Recipe, Regime
from drawings.table import __main__ as run
from drawings.table import blind, ingredients, sheet
from drawings.table import drawing as studio
from drawings.table.calibrated import own_pictures
from drawings.table.candidates import candidates
from drawings.table.ingredients import material_of
from drawings.table.kept import Kept, digest
from drawings.table.pictures import folder_of
from drawings.table.publish import main as publish
from drawings.table.rows import REFERENCE, ROWS, Cell, Material, Row, files
from drawings.table.written import markdown, pilot, side_by_side, spread, subjects_needed
from PIL import Image

MATERIAL = Material(
    [Recipe("subject", "penguin", (("penguin", "noto"),), ("a penguin",))],
    [Recipe("style", "ink", (("fox", "ink"), ("owl", "ink")), ("a fox, ink", "an owl, ink"))],
    lambda subject, style: True,
)


# The rows.


def test_ceilings_are_drawn_with_the_prompts_that_they_were_trained_on() -> None:
    rows = {row.name.partition(",")[0]: row.cells(MATERIAL) for row in ROWS}
    (subject,) = rows["ceiling: subject LoRA alone"]
    assert (subject.truth, subject.prompt) == (("penguin", "noto"), "a penguin")
    assert [cell.truth for cell in rows["ceiling: style LoRA alone"]] == [
        ("fox", "ink"),
        ("owl", "ink"),
    ]
    (true,) = rows["ceiling: LoRA of the true drawing"]
    assert true.files == (("fused", "penguin-ink"),)


def test_styles_take_turns_in_the_ceiling_of_true_drawings() -> None:
    names = ("penguin", "octopus", "rocket")
    subjects = [Recipe("subject", name, ((name, "noto"),), (f"a {name}",)) for name in names]
    styles = [Recipe("style", name, (), ()) for name in ("ink", "soft")]

    def exists(subject: str, style: str) -> bool:
        return (subject, style) != ("rocket", "ink")

    row = next(row for row in ROWS if row.name == "ceiling: LoRA of the true drawing")
    cells = row.cells(Material(subjects, styles, exists))
    assert [cell.truth for cell in cells] == [
        ("penguin", "ink"),
        ("octopus", "soft"),
        ("rocket", "soft"),
    ]


def test_rules_have_both_loras_and_the_joint_prompt() -> None:
    row = next(row for row in ROWS if row.name == REFERENCE)
    pair = (("subject", "penguin"), ("style", "ink"))
    assert row.cells(MATERIAL) == [Cell("penguin", "ink", "a penguin, ink style", pair)]
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_a_calibration_is_asked_for_each_lora_alone() -> None:
    own = own_pictures(Path("subject-sea-horse.safetensors"), Path("style-ink.safetensors"))
    assert own.prompts["content"] == ["a sea horse"]
    assert own.prompts["style"][:2] == ["a dog, ink style", "a chair, ink style"]
    assert not any(word in text for word in HELD_OUT_SUBJECTS for text in own.prompts["style"])


def test_a_pair_without_a_true_drawing_has_no_cell() -> None:
    nowhere = Material(MATERIAL.subjects, MATERIAL.styles, lambda subject, style: False)
    assert nowhere.pairs == []


def test_a_missing_lora_is_named(tmp_path: Path) -> None:
    cell = Cell("penguin", "ink", "", (("fused", "penguin-ink"),))
    with pytest.raises(ValueError, match=r"fused-penguin-ink.safetensors is missing. Train it"):
        files(tmp_path, cell)
    (tmp_path / "fused-penguin-ink.safetensors").touch()
    assert files(tmp_path, cell) == [tmp_path / "fused-penguin-ink.safetensors"]


# The kept cells.


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "cells.jsonl")
    assert kept.open({"seeds": 2}) == {}
    kept.add("sum", "a, ink", [{"both": 0.5}])
    with kept.path.open("a") as file:
        file.write('{"row": "sum", "cell": "b, i')
    assert kept.open({"seeds": 2}) == {"sum": {"a, ink": [{"both": 0.5}]}}
    kept.add("sum", "b, ink", [{"both": 0.25}])
    assert kept.open({"seeds": 2})["sum"].keys() == {"a, ink", "b, ink"}


def test_cells_that_were_made_otherwise_are_refused(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "cells.jsonl")
    kept.open({"seeds": 2, "base": "aa"})
    with pytest.raises(ValueError, match="was made with base aa, and this run has bb"):
        kept.open({"seeds": 2, "base": "bb"})


def test_a_digest_follows_names_and_contents(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    found = digest([one, two])
    assert found == digest([two, one])
    two.write_bytes(b"3")
    assert digest([one, two]) != found


# The candidates.


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_only_committed_candidates_are_reported(tmp_path: Path) -> None:
    file = tmp_path / "candidates.json"
    file.write_text(json.dumps([REFERENCE, "K-LoRA s"]))
    with pytest.raises(ValueError, match="is in no git repository"):
        candidates(file)
    git(tmp_path, "init")
    with pytest.raises(ValueError, match="Commit it before the reported run"):
        candidates(file)
    git(tmp_path, "add", file.name)
    git(tmp_path, "commit", "-m", "Name the candidates")
    found = candidates(file)
    assert found.rows == (REFERENCE, "K-LoRA s")
    assert len(found.commit) == 40
    file.write_text(json.dumps([REFERENCE, "NP-LoRA"]))
    with pytest.raises(ValueError, match="is not committed as it is"):
        candidates(file)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([REFERENCE, "magic"], r"names \['magic'\] that the table lacks"), (["K-LoRA s"], "Add it")],
)
def test_candidates_are_rows_with_the_reference(
    tmp_path: Path, rows: list[str], message: str
) -> None:
    file = tmp_path / "candidates.json"
    file.write_text(json.dumps(rows))
    git(tmp_path, "init")
    git(tmp_path, "add", file.name)
    git(tmp_path, "commit", "-m", "Name the candidates")
    with pytest.raises(ValueError, match=message):
        candidates(file)


# The numbers.


def verdict(both: float, flow: float = 1.0) -> dict[str, float]:
    return {"both": both, "subject": both, "style": both, "distance": 0.3, "flow": flow}


def results() -> dict[str, Any]:
    return {
        REFERENCE: {"a, ink": [verdict(0.2)], "b, ink": [verdict(0.4)]},
        "K-LoRA s": {"a, ink": [verdict(0.1, 1.1)], "b, ink": [verdict(0.1, 1.1)]},
        ROWS[0].name: {"a, noto": [verdict(0.9)], "b, flat": [verdict(0.9)]},
    }


def test_differences_are_paired_and_ceilings_have_none() -> None:
    ceiling, reference, klora = markdown(results()).splitlines()[2:]
    assert ceiling.split(" | ")[1:3] == ["0.90 (0.90 to 0.90)", ""]
    assert reference.split(" | ")[1:3] == ["0.30 (0.20 to 0.40)", ""]
    assert klora.split(" | ")[1:3] == ["0.10 (0.10 to 0.10)", "-0.20 (-0.30 to -0.10)"]
    assert "+0.100 (+0.100 to +0.100)" in klora


def test_regimes_stand_side_by_side() -> None:
    alone = {REFERENCE: results()[REFERENCE]}
    told = side_by_side({"entangled": results(), "disentangled": alone}).splitlines()
    ceiling, reference, klora = (line.split(" | ")[1:] for line in told[2:])
    assert ceiling == ["0.900 (0.900 to 0.900)", "", "", " |"]
    assert reference == ["0.300 (0.200 to 0.400)", "", "0.300 (0.200 to 0.400)", " |"]
    assert klora == ["0.100 (0.100 to 0.100)", "-0.200 (-0.300 to -0.100)", "", " |"]


def test_the_pilot_says_how_many_subjects_it_takes() -> None:
    assert subjects_needed(0.055) == 30
    assert subjects_needed(0.11) == 117
    assert spread(results(), "K-LoRA s") == pytest.approx(0.2 / 2**0.5)
    told = pilot(results(), [ROWS[0].name, "K-LoRA s", REFERENCE])
    assert told.startswith("K-LoRA s: sd 0.141, 193 subjects")


# A cell.


def test_a_cell_is_drawn_and_judged_against_its_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def pipe(prompts: list[str], **settings: Any) -> Any:
        asked.update(settings, prompts=prompts)
        return SimpleNamespace(images=torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]))

    def brightness(pictures: torch.Tensor) -> torch.Tensor:
        white = pictures.mean((1, 2, 3)) > 0.5
        return torch.stack([white, ~white], 1).float()

    judges: Any = SimpleNamespace(
        subject=brightness,
        style=brightness,
        distance=lambda a, b: (a - b).abs().mean((1, 2, 3)),
        looks={"ink": torch.tensor([0.8, 0.6])},
    )
    monkeypatch.setattr(studio, "latents", lambda pipe, pictures: pictures)
    monkeypatch.setattr(studio, "paired_flow_loss", lambda pipe, clean, prompt: 0.75)
    room = studio.Studio(pipe, judges, tmp_path, tmp_path / "pictures", 2, 10, 3.0)
    row = Row("bare *", lambda material: [], lambda pipe, files: nullcontext())
    found = room.verdicts(row, Cell("fox", "ink", "a fox", ()), torch.ones(3, 4, 4))
    assert [(each["subject"], each["style"]) for each in found] == [(0, 0.6), (1, 0.8)]
    assert [each["both"] for each in found] == [0, 0.88889]
    assert [each["distance"] for each in found] == [1, 0]
    assert found[0]["flow"] == 0.75
    assert asked["prompts"] == ["a fox"] * 2
    assert asked["guidance_scale"] == 3.0
    (strip,) = (tmp_path / "pictures").rglob("*.png")
    assert Image.open(strip).size == (8, 4)


# The run.


def reached(similarity: float | None) -> Entry:
    return Entry(1, 100, 0.5, similarity, "")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, judges and LoRAs that nobody reads."""
    (tmp_path / "base").mkdir()
    for name in ("base/unet.safetensors", "judges.pt"):
        (tmp_path / name).touch()
    for stem, similarity in (("subject-penguin", 0.7), ("style-ink", None)):
        path = tmp_path / "loras" / "entangled" / f"{stem}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        Ledger(path.parent).add(stem, reached(similarity))
    nothing: Any = SimpleNamespace(
        from_pretrained=lambda path: SimpleNamespace(set_progress_bar_config=lambda disable: None),
        load=lambda path: None,
    )
    monkeypatch.setattr(run, "DiffusionPipeline", nothing)
    monkeypatch.setattr(run, "Judges", nothing)
    monkeypatch.setattr(run, "material_of", lambda *_: MATERIAL)
    monkeypatch.setattr(run, "drawing", lambda *_: torch.ones(3, 4, 4))
    return tmp_path


def draw(place: Path, *options: str) -> Any:
    arguments = [str(place), str(place), str(place / "loras"), str(place / "out"), "entangled"]
    threads = torch.get_num_threads()
    done = CliRunner().invoke(run.main, [*arguments, *options])
    torch.set_num_threads(threads)
    return done


def test_a_run_draws_what_is_not_kept_yet(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def verdicts(self: Any, row: Row, cell: Cell, truth: Any) -> Any:
        drawn.append(row.name)
        return [verdict(0.25)] * 2

    monkeypatch.setattr(studio.Studio, "verdicts", verdicts)
    told = draw(place, "--row", "NP-LoRA").output
    assert drawn == [REFERENCE, "NP-LoRA"]  # the reference is always drawn
    assert told.startswith("1 subject LoRAs: 1 reached 0.6 at once")
    assert "| NP-LoRA | 0.25 (0.25 to 0.25)" in told
    draw(place, "--row", "NP-LoRA", "--row", "K-LoRA s")
    assert drawn[2:] == ["K-LoRA s"]
    assert "K-LoRA s" in (place / "out" / "entangled-tuning.md").read_text()
    assert (place / "out" / "entangled-tuning.png").read_bytes().startswith(b"\x89PNG")
    assert "'magic' is no row" in draw(place, "--row", "magic").output
    (place / "judges.pt").write_bytes(b"others")
    assert "Name another folder" in draw(place).output


def test_processes_share_the_pairs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def verdicts(self: Any, row: Row, cell: Cell, truth: Any) -> Any:
        drawn.append(f"{cell.subject}, {cell.style}")
        return [verdict(0.25)]

    monkeypatch.setattr(studio.Studio, "verdicts", verdicts)
    styles = [Recipe("style", name, (), ()) for name in ("ink", "soft", "blob")]
    wider = Material(MATERIAL.subjects, styles, MATERIAL.exists)
    monkeypatch.setattr(run, "material_of", lambda *_: wider)
    monkeypatch.setattr(run, "digests", lambda *_: {})
    draw(place, "--share", "2/2")
    assert drawn == ["penguin, ink"]
    told = draw(place, "--share", "1/2").output
    assert drawn[1:] == ["penguin, blob", "penguin, soft"]
    assert f"| {REFERENCE} | 0.25" in told  # with the other process's cell
    for wrong in ("0/2", "3/2", "half"):
        assert f"'{wrong}' is no share. Write 1/2" in draw(place, "--share", wrong).output


def test_no_rule_is_drawn_with_a_lora_that_misses_its_subject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "loras" / "entangled"
    folder.mkdir(parents=True)
    monkeypatch.setattr(ingredients, "HELD_OUT_STYLES", {"ink": ""})
    monkeypatch.setattr(ingredients, "drawing", lambda *_: torch.ones(3, 4, 4))
    monkeypatch.setattr(ingredients, "things", lambda packages: [f"t{i}" for i in range(9)])

    def subjects() -> list[str]:
        found = material_of(tmp_path, Regime.ENTANGLED, ["penguin", "octopus"], folder)
        return [recipe.name for recipe in found.subjects]

    for stem, similarity in (("subject-penguin", 0.5), ("style-ink", None)):
        Ledger(folder).add(stem, reached(similarity))
    with pytest.raises(ValueError, match="subject-octopus is not trained yet"):
        subjects()
    Ledger(folder).add("subject-octopus", reached(0.6))
    assert subjects() == ["octopus"]


# The blind test.


def test_a_blind_test_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blind, "drawing", lambda *_: torch.ones(3, 48, 48))
    for name, colour in (("K-LoRA_s", "red"), ("NP-LoRA", "blue")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for subject in "abcdefgh":
            path = tmp_path / "pictures" / name / f"{subject}-ink.png"
            Image.new("RGB", (96, 48), colour).save(path)
    test = tmp_path / "test"
    begun = ["begin", str(tmp_path), str(tmp_path / "pictures"), str(test), "K-LoRA s", "NP-LoRA"]
    runner = CliRunner()
    assert runner.invoke(blind.main, begun).output.startswith("8 pairs")
    assert "holds a test already" in runner.invoke(blind.main, begun).output

    pairs = sorted(test.glob("*.png"))
    red = [Image.open(path).getpixel((100, 350)) == (255, 0, 0) for path in pairs]
    assert {*red} == {True, False}
    answers = ["a" if left else "b" for left in red]
    runner.invoke(blind.main, ["choose", str(test)], input="\n".join([*answers[:3], "q"]))
    assert "Pair 4 has no choice yet" in runner.invoke(blind.main, ["reveal", str(test)]).output
    runner.invoke(blind.main, ["choose", str(test)], input="\n".join(answers[3:]))
    told = runner.invoke(blind.main, ["reveal", str(test)]).output
    assert told.startswith("'K-LoRA s' was preferred to 'NP-LoRA' in 100 %")


# What is kept in the repository.


def test_results_are_published_with_means_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(sheet, "drawing", lambda *_: torch.ones(3, 48, 48))
    out = tmp_path / "out"
    kept = Kept(out / "entangled-tuning.jsonl")
    kept.open({"seeds": 2})
    for row in (REFERENCE, "K-LoRA s", "NP-LoRA"):
        for cell in ("fox, ink", "owl, ink"):
            kept.add(row, cell, [verdict(0.25), verdict(0.5)])
            path = folder_of(out / "pictures" / "entangled-tuning", row) / "fox-ink.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (96, 48), "red").save(path)
    kept_here = tmp_path / "results"
    done = CliRunner().invoke(publish, [str(tmp_path), str(out), str(kept_here)])
    assert done.exit_code == 0, done.output
    assert "| K-LoRA s | 0.375 (0.375 to 0.375) | +0.000 (+0.000 to +0.000) |" in done.output
    found = json.loads((kept_here / "results.json").read_text())["entangled"]["tuning"]
    assert found["made with"] == {"seeds": 2}
    assert found["rows"]["NP-LoRA"]["fox, ink"] == [verdict(0.375)]
    assert {path.name for path in kept_here.iterdir()} == {
        *("results.json", "tuning.md", "entangled.png"),
        *("entangled-tuning.md", "entangled-tuning.png"),
    }
    pixels = Image.open(kept_here / "entangled.png").convert("RGB").getcolors(2**20)
    assert any(colour == (255, 0, 0) for _, colour in pixels)


def test_a_later_run_is_published_beside_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(sheet, "drawing", lambda *_: torch.ones(3, 48, 48))
    out, later = tmp_path / "out", tmp_path / "later"
    for folder, rows, likeness in (
        (out, (REFERENCE, "K-LoRA s"), 0.25),
        (later, (REFERENCE, "level"), 0.5),
    ):
        kept = Kept(folder / "entangled-reported.jsonl")
        kept.open({"candidates": folder.name})
        for row in rows:
            kept.add(row, "fox, ink", [verdict(likeness)])
            path = folder_of(folder / "pictures" / "entangled-reported", row) / "fox-ink.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (48, 48), "red" if row == "level" else "blue").save(path)
    results = tmp_path / "results"
    arguments = [str(tmp_path), str(out), str(results), "--best", "level"]
    arguments += ["--later", str(later), "--later", str(later)]
    done = CliRunner().invoke(publish, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads((results / "results.json").read_text())["entangled"]
    assert {part: run["made with"]["candidates"] for part, run in found.items()} == {
        "reported": "out",
        "reported-later": "later",
        "reported-later-2": "later",
    }
    assert found["reported"]["rows"][REFERENCE]["fox, ink"] == [verdict(0.25)]
    assert found["reported-later"]["rows"]["level"]["fox, ink"] == [verdict(0.5)]
    assert "level" not in (results / "reported.md").read_text()
    assert "level" in (results / "reported-later.md").read_text()
    pixels = Image.open(results / "entangled.png").convert("RGB").getcolors(2**20)
    assert any(colour == (255, 0, 0) for _, colour in pixels)


def test_a_sheet_names_its_rows_and_leaves_room_for_missing_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheet, "drawing", lambda *_: None)
    path = folder_of(tmp_path, REFERENCE) / "fox-ink.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (96, 48), "blue").save(path)
    page = sheet.table_sheet(tmp_path, [tmp_path], "NP-LoRA")
    assert sum(count for count, colour in page.getcolors(2**20) if colour == (0, 0, 255)) == 144**2
