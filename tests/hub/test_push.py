"""``klora push``: what goes, that it comes back, and what is refused before anything goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.cards import split, tokens
from support.hub import TOKEN, Hub
from support.shipped import Shipped, klora

REPO = "me/fox-in-ink"


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a fox.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def files_of(hub: Hub) -> dict[str, bytes]:
    repository = hub.repositories[REPO]
    return dict(repository.commits[repository.revisions["main"]])


def pushed(*arguments: object) -> Any:
    result = klora("push", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_everything_goes_in_one_commit_and_comes_back(
    logged_in: Hub, stated_artifact: Path, picture: Path, tmp_path: Path
) -> None:
    facts = pushed(stated_artifact, REPO, "--picture", picture, "a fox in ink", "--map")
    files = files_of(logged_in)
    name = stated_artifact.name
    assert set(files) == {name, "README.md", "schedule.png", "pictures/a fox.png"}
    assert files[name] == stated_artifact.read_bytes()
    assert facts["files"] == {file: len(data) for file, data in files.items()}
    assert facts["card"] == files["README.md"].decode()
    assert len(logged_in.repositories[REPO].commits) == 1
    assert facts["commit"].endswith(logged_in.repositories[REPO].revisions["main"])
    output = tmp_path / "back.klora.safetensors"
    assert klora("pull", REPO, "-o", output).exit_code == 0
    assert output.read_bytes() == stated_artifact.read_bytes()


def test_the_card_names_the_repository_and_shows_the_pictures(
    logged_in: Hub, stated_artifact: Path, picture: Path
) -> None:
    from huggingface_hub import ModelCard

    text = pushed(stated_artifact, REPO, "--picture", picture, "a fox: *in* ink", "--dry-run")
    assert text["commit"] is None
    front, body = split(text["card"])
    assert front["library_name"] == "klora"
    widget = [{"text": "a fox: *in* ink", "output": {"url": "pictures/a fox.png"}}]
    assert front["widget"] == widget
    data = ModelCard(text["card"]).data
    assert data.library_name == "klora"
    images = [token for token in tokens(body) if token.type == "image"]
    assert [token.attrs["src"] for token in images] == ["pictures/a%20fox.png"]
    assert f'apply_fusion(pipe, "{REPO}/{stated_artifact.name}")' in body
    assert f"klora sample {REPO}/{stated_artifact.name} " in body


def test_a_dry_run_uploads_nothing(logged_in: Hub, shipped: Shipped) -> None:
    result = klora("push", shipped.artifact, REPO, "--dry-run")
    assert result.exit_code == 0
    assert f"{shipped.artifact.name}, {shipped.artifact.stat().st_size:,} bytes" in result.stdout
    assert result.stdout.rstrip().endswith("nothing was uploaded")
    assert logged_in.requests == []


def test_a_private_repository(logged_in: Hub, shipped: Shipped) -> None:
    pushed(shipped.artifact, REPO, "--private")
    assert logged_in.repositories[REPO].is_private


def test_a_card_is_replaced_by_force_alone(logged_in: Hub, shipped: Shipped) -> None:
    logged_in.add(REPO, {"README.md": b"mine", "other.txt": b"stays"})
    result = klora("push", shipped.artifact, REPO)
    assert result.exit_code == 1
    assert "me/fox-in-ink has a README.md already. Add --force to replace it" in result.stderr
    assert files_of(logged_in)["README.md"] == b"mine"
    pushed(shipped.artifact, REPO, "--force")
    assert files_of(logged_in)["README.md"].startswith(b"---\nlibrary_name: klora\n")
    assert files_of(logged_in)["other.txt"] == b"stays"


def test_damage_is_not_uploaded(logged_in: Hub, shipped: Shipped, tmp_path: Path) -> None:
    data = bytearray(shipped.artifact.read_bytes())
    data[-1] ^= 1
    damaged = tmp_path / "damaged.klora.safetensors"
    damaged.write_bytes(data)
    assert klora("push", damaged, REPO).exit_code == 1
    assert logged_in.requests == []


def test_without_a_token(hub: Hub, shipped: Shipped) -> None:
    result = klora("push", shipped.artifact, REPO)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "401" in result.stderr
    assert REPO not in hub.repositories


def test_wrong_usage(shipped: Shipped, picture: Path, tmp_path: Path) -> None:
    for name in ("fused.bin", "a@b.safetensors"):
        odd = tmp_path / name
        odd.write_bytes(shipped.artifact.read_bytes())
        result = klora("push", odd, REPO, "--dry-run")
        assert result.exit_code == 2
        assert f"{name} is no name for an artifact on the Hub; rename it" in result.stderr
    assert "is not an id on the Hub, OWNER/NAME" in klora("push", shipped.artifact, "name").stderr
    (tmp_path / "b").mkdir()
    twin = tmp_path / "b" / picture.name
    twin.write_bytes(picture.read_bytes())
    two = ("--picture", picture, "a", "--picture", twin, "b")
    result = klora("push", shipped.artifact, REPO, *two, "--dry-run")
    assert result.exit_code == 2
    assert "two pictures have one name; rename one of them." in result.stderr
