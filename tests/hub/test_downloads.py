"""Files of a hub on this machine: chosen, downloaded, kept; every refusal is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hub import TOKEN, Hub

from klora_runtime.errors import ConfigError, KloraError
from klora_runtime.hub.choosing import LORA
from klora_runtime.hub.fetching import Origin, located, origin_of

huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")

FILES = {"fox.safetensors": b"fox", "adapter_config.json": b"{}", "README.md": b"A fox."}


def test_a_file_comes_with_what_lies_beside_it(hub: Hub) -> None:
    repository = hub.add("fox/ink", FILES)
    commit = repository.revisions["main"]
    path = Path(located("fox/ink", LORA))
    assert path.read_bytes() == b"fox"
    assert path.with_name("adapter_config.json").read_bytes() == b"{}"
    assert not path.with_name("README.md").exists()
    assert origin_of(path) == Origin("fox/ink", "fox.safetensors", commit)
    assert str(origin_of(path)) == f"hf://fox/ink@{commit}/fox.safetensors"
    assert located(f"{hub.address}/fox/ink/resolve/main/fox.safetensors", LORA) == path
    assert located("fox/ink", LORA, "fox.safetensors") == path


def test_a_file_in_a_folder_of_the_repository(hub: Hub) -> None:
    hub.add("fox/ink", {"v2/fox.safetensors": b"2", "v2/adapter_config.json": b"{2}"})
    path = Path(located("fox/ink/v2/fox.safetensors", LORA))
    assert path.with_name("adapter_config.json").read_bytes() == b"{2}"
    origin = origin_of(path)
    assert origin is not None
    assert origin.file == "v2/fox.safetensors"


def test_revisions(hub: Hub) -> None:
    repository = hub.add("fox/ink", FILES)
    first = repository.revisions["main"]
    second = repository.commit({**FILES, "fox.safetensors": b"a better fox"})
    repository.commit({"fox.safetensors": b"odd"}, revision="odd")
    read = {
        name: Path(located(f"fox/ink@{name}", LORA)).read_bytes()
        for name in (first, second, "main", "odd")
    }
    assert read == {first: b"fox", second: b"a better fox", "main": b"a better fox", "odd": b"odd"}


def test_all_files_come_from_one_commit(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = hub.add("fox/ink", FILES)
    first = repository.revisions["main"]
    api = huggingface_hub.HfApi.model_info

    def moved_meanwhile(self: object, *args: object, **named: object) -> object:
        found = api(self, *args, **named)
        repository.commit({**FILES, "fox.safetensors": b"another"})
        return found

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", moved_meanwhile)
    path = Path(located("fox/ink", LORA))
    assert path.read_bytes() == b"fox"
    assert first in path.parts


def test_what_is_kept_serves_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = hub.add("fox/ink", FILES)
    path = located("fox/ink", LORA)
    repository.error = "ServerBroken"
    assert located("fox/ink", LORA) == path
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert located("fox/ink", LORA) == path
    assert located("fox/ink/fox.safetensors", LORA) == path
    with pytest.raises(KloraError, match=r"cannot be reached\. Check the connection, or name a"):
        located("fox/ink/other.safetensors", LORA)
    with pytest.raises(KloraError, match="cannot be reached for hf://fox/oil"):
        located("fox/oil", LORA)


def test_offline_mode(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("fox/ink", FILES)
    path = located("fox/ink", LORA)
    count = len(hub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert located("fox/ink", LORA) == path
    with pytest.raises(KloraError, match="hf://fox/oil is not in the cache, and HF_HUB_OFFLINE"):
        located("fox/oil", LORA)
    assert len(hub.requests) == count


def test_a_private_repository_needs_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("fox/ink", FILES).is_private = True
    with pytest.raises(KloraError, match=r"no model of that name that you may see\. Check"):
        located("fox/ink", LORA)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert Path(located("fox/ink", LORA)).read_bytes() == b"fox"


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("GatedRepo", r"fox/ink is gated\. Accept its terms on http://127.*/fox/ink, and log in"),
        ("ServerBroken", r"the Hub answered 403 for hf://fox/ink\. Check the token"),
    ],
)
def test_refusals_are_one_sentence_without_the_token(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, answer: str, sentence: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add("fox/ink", FILES).error = answer
    with pytest.raises(KloraError, match=sentence) as error:
        located("fox/ink", LORA)
    assert TOKEN not in str(error.value)


def test_what_a_repository_lacks_is_named(hub: Hub) -> None:
    hub.add("fox/ink", FILES)
    with pytest.raises(KloraError, match=r"fox/ink has no revision v9\. Name a branch"):
        located("fox/ink@v9", LORA)
    with pytest.raises(ConfigError, match=r"has no file ink\.safetensors; found README"):
        located("fox/ink/ink.safetensors", LORA)


def test_a_weight_name_needs_a_repository(hub: Hub, tmp_path: Path) -> None:
    hub.add("fox/ink", FILES)
    with pytest.raises(ConfigError, match=r"names a file already; leave one of them out\."):
        located("fox/ink/fox.safetensors", LORA, "ink.safetensors")
    with pytest.raises(ConfigError, match=r"is a path, and only a repository"):
        located(tmp_path, LORA, "ink.safetensors")


def test_without_the_library_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(KloraError, match=r"huggingface_hub is not installed\. Install it: pip"):
        located("fox/ink", LORA)
