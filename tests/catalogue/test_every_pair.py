"""Pairs of a catalogue, linked where pictures are made, against ``compile_fusion``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.many_loras import stems, write_many

from klora_compile import PairingError, Settings, compile_fusion
from klora_compile.cataloguing.building import Selection, build, draft
from klora_compile.cataloguing.selecting import Filters, StoredLora, loras_of, matching
from klora_compile.profiles.gathering import gather
from klora_compile.profiles.store import Store
from klora_compile.rules import Direct, Est, Klora, Rule
from klora_compile.settings.config import Config
from klora_compile.settings.read_options import ReadOptions
from klora_runtime import ArtifactError
from klora_runtime.artifact.assembly import document_of
from klora_runtime.artifact.document import document_text
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.references import fill
from klora_runtime.catalogue.catalogue import Catalogue

COUNT = 200
PAIRS = 300
FEW = 12


class Loras:
    """Files that are contents and styles, one that always acts, and a store with their profiles."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents = write_many(folder / "loras", COUNT, seed=1)
        self.styles = self.contents[::-1]
        (self.turbo,) = write_many(folder / "turbo", 1, seed=3)
        self.store = Store(folder / "store")
        self.gathered = gather(
            [*self.contents, self.turbo],
            self.store,
            options=ReadOptions(),
            device="cpu",
            engine=None,
        )
        self.stored = loras_of(self.store.profiles())

    def catalogue(
        self,
        path: Path,
        rule: Rule,
        settings: Settings | None = None,
        *,
        always: bool = False,
        count: int = FEW,
    ) -> Catalogue:
        """Link the first of each role."""
        beside = {"turbo": self.of([self.turbo])[0]} if always else {}
        selection = Selection(self.of(self.contents[:count]), self.of(self.styles[:count]), beside)
        build(draft(self.store, selection, Config.of(rule, settings)), path)
        return Catalogue.open(path, loras=self.folder)

    def of(self, files: Sequence[Path]) -> list[StoredLora]:
        return matching(self.stored, stems(files), Filters(), "--content")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Loras:
    return Loras(tmp_path_factory.mktemp("many"))


def text(fusion: Fusion) -> str:
    """Everything of a fusion but its tensors, which the text names by their digests."""
    return document_text(document_of(fusion)[0])


def test_300_random_pairs_of_200_times_200(loras: Loras, tmp_path: Path) -> None:
    catalogue = loras.catalogue(tmp_path / "all", Klora(), count=COUNT)
    assert len(catalogue) == COUNT * COUNT
    random, fates = Random(7), set()
    for _ in range(PAIRS):
        content, style = random.sample(loras.contents, 2)
        expected = compile_fusion(content, style, Klora(), device="cpu")
        found = catalogue.fusion(content.stem, style.stem)
        assert text(found) == text(expected), (content, style)
        fates |= {entry.fate for entry in found.entries}
    assert fates == {
        *("always content", "always style", "switching", "one-sided", "zero", "constant")
    }
    assert not [result.refused for result in loras.gathered.results if result.refused]


CASES: Mapping[str, tuple[Rule, dict[str, Any]]] = {
    "pattern s*": (Klora(pattern="s*"), {}),
    "the authors' code": (Klora(semantics="authors", pattern="s*"), {}),
    "a bias": (Klora(bias=0.3), {"content_weight": 0.5, "style_weight": -1.5}),
    "gamma": (Klora(gamma=0.75, alpha=2.0, beta=0.0), {"clock": "noise"}),
    "S that falls": (Klora(alpha=-1.0, beta=1.5), {}),
    "without text encoders": (Klora(), {"text_encoder": "none"}),
    "the style's text encoder": (Klora(), {"text_encoder": "style"}),
    "without layers of one": (Klora(), {"unpaired": "drop"}),
    "est": (Est(), {}),
    "est, d": (Est(d=0.3, alpha=1.0), {"unpaired": "drop"}),
    "direct": (Direct(), {"style_weight": 0.8}),
    "direct, dropped": (Direct(), {"unpaired": "drop", "text_encoder": "content"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("always", [False, True], ids=["two", "always"])
def test_every_setting(case: str, always: bool, loras: Loras, tmp_path: Path) -> None:
    rule, own = CASES[case]
    settings = Settings(**own, weights={"turbo": 0.5} if always else {})
    catalogue = loras.catalogue(tmp_path / "few", rule, settings, always=always)
    beside = {"turbo": loras.turbo} if always else {}
    for number in range(FEW):
        content, style = loras.contents[number], loras.styles[(5 * number + 1) % FEW]
        expected = compile_fusion(content, style, rule, settings, always=beside, device="cpu")
        assert text(catalogue.fusion(content.stem, style.stem)) == text(expected)


def test_unpaired_layers_refuse_a_pair_where_the_compiler_does(
    loras: Loras, tmp_path: Path
) -> None:
    settings = Settings(unpaired="error")
    catalogue = loras.catalogue(tmp_path / "few", Klora(), settings)
    verdicts = set()
    for content in loras.contents[:FEW]:
        for style in loras.styles[:4]:
            facts = catalogue.opened.facts(content.stem, style.stem)
            verdicts.add(facts.kind.refused is None)
            if facts.kind.refused is None:
                expected = compile_fusion(content, style, Klora(), settings, device="cpu")
                assert text(catalogue.fusion(content.stem, style.stem)) == text(expected)
                continue
            with pytest.raises(PairingError, match="only one LoRA adapts"):
                compile_fusion(content, style, Klora(), settings, device="cpu")
            with pytest.raises(PairingError, match="only one LoRA adapts"):
                catalogue.fusion(content.stem, style.stem)
    assert verdicts == {True, False}


def test_a_thin_fusion_names_the_factors(loras: Loras, tmp_path: Path) -> None:
    loras.catalogue(tmp_path / "few", Klora())
    thin = Catalogue.open(tmp_path / "few").fusion(loras.contents[0].stem, loras.styles[0].stem)
    assert thin.is_thin
    filled = fill(thin, {"content": loras.contents[0], "style": loras.styles[0]})
    assert text(filled) == text(compile_fusion(loras.contents[0], loras.styles[0], device="cpu"))


def test_a_changed_file_is_refused(loras: Loras, tmp_path: Path) -> None:
    loras.catalogue(tmp_path / "few", Klora())
    folder = tmp_path / "loras"
    folder.mkdir()
    for path in (loras.contents[0], loras.styles[0]):
        (folder / path.name).write_bytes(path.read_bytes())
    names = loras.contents[0].stem, loras.styles[0].stem
    assert Catalogue.open(tmp_path / "few", loras=folder).fusion(*names)
    data = bytearray((folder / loras.styles[0].name).read_bytes())
    data[-1] ^= 1
    (folder / loras.styles[0].name).write_bytes(data)
    with pytest.raises(
        ArtifactError, match=r"1-199.safetensors is another file. Put the file there"
    ):
        Catalogue.open(tmp_path / "few", loras=folder).fusion(*names)
