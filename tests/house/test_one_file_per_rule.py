"""A rule is one file and one line of the catalogue; nothing else of the product knows of it."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from support.lora_files import ROOT, peft_keys, random_pair, run_python, write_lora

from klora_compile.rules.lookup import DEFAULT_RULE, RULES
from klora_compile.rules.rule import Rule

ROOM = ROOT / "klora_compile" / "rules"
SOURCES = sorted(
    path for folder in ("klora_compile", "runtime") for path in (ROOT / folder).rglob("*.py")
)
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
#: What lies beside the files of rules.
MACHINERY = {"__init__", "catalogue", "lookup", "rule"}

#: Names of rules that are words with another meaning too -> where they stand with that.
HOMONYMS = {
    "klora": {  # the product, its command, its key in a file
        "cli.py",
        "profiles/store.py",
        "report/card.py",
        "report/front_matter.py",
        "export/ordinary.py",
        "artifact/document.py",
    },
    "phases": {"export/writing.py", "export/schedule.py"},  # the files that klora export writes
    "auto": {  # the device, the mode, the base, the measure of K-LoRA's sums, a picture's size
        "calibrating/calibrate.py",
        "cataloguing/compiling.py",
        "commands/calibration_options.py",
        "commands/catalogue_build.py",
        "commands/compile.py",
        "commands/profile.py",
        "commands/sampling_options.py",
        "commands/tune.py",
        "commands/verify.py",
        "klora_compile/compiler.py",
        "klora_compile/verify.py",
        "report/plot.py",
        "rules/klora.py",
        "sampling/pipeline.py",
        "sampling/run.py",
        "sampling/stating.py",
        "searching/from_python.py",
        "sweeping/command.py",
        "sweeping/from_python.py",
        "sweeping/run.py",
        "trying/loras.py",
        "trying/studio.py",
        "tuning/opening.py",
        "devices/device_types.py",
        "layers/choice.py",
        "pipeline/base_files.py",
        "pipeline/handle.py",
    },
}


def home(kind: type[Rule]) -> Path:
    return ROOT.joinpath(*kind.__module__.split(".")).with_suffix(".py")


@cache
def words(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names of a source, of modules that it imports too, and its texts."""
    names, texts = set(), set()
    for node in ast.walk(ast.parse(source)):
        names |= {getattr(node, key, None) for key in ("id", "attr", "name", "arg", "module")}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
    return frozenset(filter(None, names)), frozenset(texts)


def mentions(source: str, kind: type[Rule]) -> Iterator[str]:
    """Where a source names a rule: its class or file, or its name as a text or behind ``rule``."""
    names, texts = words(source)
    yield from names & {kind.__name__, kind.__module__}
    said = re.compile(rf"(--rule|\brule) {re.escape(kind.name)}(?![\w+])|\b{kind.__module__}\b")
    for text in texts:
        if text in (kind.name, kind.__name__) or said.search(text):
            yield repr(text[:60])


def test_every_file_of_the_room_is_a_rule_or_machinery() -> None:
    files = {path.stem for path in ROOM.glob("*.py")} - MACHINERY
    assert sorted(files) == sorted(home(kind).stem for kind in RULES.values())
    assert all(home(kind).parent == ROOM for kind in RULES.values())


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_named_in_its_file_and_the_catalogue_alone(name: str) -> None:
    kind = RULES[name]
    allowed = {home(kind), ROOM / "catalogue.py"}
    # a rule may be built on another one, whose class it then imports
    allowed |= {home(each) for each in RULES.values() if kind.__module__ in home(each).read_text()}
    strangers = {
        str(path.relative_to(ROOT)): found
        for path in SOURCES
        if path not in allowed
        and not is_homonym(path, name)
        and (found := list(mentions(path.read_text(), kind)))
    }
    assert strangers == {}


def is_homonym(path: Path, name: str) -> bool:
    return any(str(path).endswith(f"/{place}") for place in HOMONYMS.get(name, ()))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_one_line_of_the_catalogue(name: str) -> None:
    lines = (ROOM / "catalogue.py").read_text().splitlines()
    kind = RULES[name]
    wanted = f"from {kind.__module__} import {kind.__name__} as {kind.__name__}"
    assert [line for line in lines if re.search(rf"\b{kind.__name__}\b", line)] == [wanted]
    assert sum(line.startswith("from klora_compile") for line in lines) == len(RULES)


def test_the_first_rule_of_the_catalogue_is_the_default() -> None:
    assert next(iter(RULES)) == DEFAULT_RULE == "klora"


@pytest.mark.parametrize(
    "line",
    [
        "from klora_compile.rules.est import Est",
        "import klora_compile.rules.est",
        "rule = Config.named('est')",
        "error('take --rule est instead')",
        "HOMES = {'Est': 0}",
        "x: Est",
        "y = catalogue.Est()",
    ],
)
def test_a_mention_is_seen(line: str) -> None:
    assert list(mentions(line, RULES["est"]))


@pytest.mark.parametrize("line", ["best = 'estimate'", "x = 'rule established'", "Estimate()"])
def test_another_word_is_no_mention(line: str) -> None:
    assert not list(mentions(line, RULES["est"]))


NEW_RULE = '''
"""Only the first LoRA acts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from klora_compile.fields import Number, setting
from klora_compile.rules.kit.numbers import LayerNumbers
from klora_compile.rules.kit.outcomes import Choice
from klora_compile.rules.rule import Rule


@dataclass(frozen=True, kw_only=True)
class First(Rule):
    """Only the first LoRA acts."""

    name: ClassVar[str] = "first"
    title: ClassVar[str] = "the first alone"
    sentence: ClassVar[str] = "Only the first acts"
    fates: ClassVar[Mapping[str, str]] = {"alone": "only the first LoRA"}

    strength: float = field(
        default=0.75, metadata=setting("Its weight.", Number(0.0, 2.0))
    )

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        return Choice("alone", ((0.0, {next(iter(layer.present)): self.strength}),))
'''

USE = """
import sys
from click.testing import CliRunner
from klora_compile.cli import main
from klora_runtime import load_fusion

def klora(*arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.output

folder = sys.argv[1]
content, style, output = (f"{folder}/{name}.safetensors" for name in ("1", "2", "a.klora"))
assert "--strength FLOAT  Its weight.  [range: 0 to 2; default: 0.75]" in klora(
    "compile", "--rule", "first", "--help")
klora("compile", content, style, "-o", output, "--rule", "first", "--strength", "0.5", "--no-cache")
fusion = load_fusion(output)
assert fusion.rule.parameters["strength"] == 0.5
assert [entry.fate for entry in fusion.entries] == ["alone"]
assert "1 alone" in klora("inspect", output)
card = klora("card", output, "-o", "-")
assert "fused by the first alone. Only the first acts." in card
assert "| only the first LoRA |" in card
klora("verify", output, "--against", content, style)
"""


def test_one_file_and_one_line_add_a_rule(tmp_path: Path) -> None:
    """In a copy of the compiler: options, fusion, report, card and verification know the rule."""
    product = tmp_path / "product"
    shutil.copytree(ROOT / "klora_compile", product / "klora_compile")
    rules = product / "klora_compile" / "rules"
    (rules / "first.py").write_text(NEW_RULE.lstrip())
    with (rules / "catalogue.py").open("a") as catalogue:
        catalogue.write("from klora_compile.rules.first import First as First\n")
    for seed in (1, 2):
        keys = peft_keys({LAYER: random_pair(9, 8, 2, seed=seed)})
        write_lora(tmp_path / f"{seed}.safetensors", keys)
    code = f"import sys; sys.path.insert(0, {str(product)!r})\n{USE}"
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
