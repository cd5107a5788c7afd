"""The options of rules on the command line: those of the rule that is named, and no others."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.lora_files import peft_keys, random_pair, run_python, write_lora
from support.shipped import klora

from klora_compile.cli import main
from klora_compile.commands.rule_options import RULE_OPTIONS
from klora_compile.fields import settings_of
from klora_compile.rules.kit.calibrated import Calibrated
from klora_compile.rules.lookup import RULES
from klora_runtime import load_fusion

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    one, two = (
        write_lora(folder / f"{i}.safetensors", peft_keys({LAYER: random_pair(9, 8, 2, seed=i)}))
        for i in (1, 2)
    )
    return one, two


def test_every_setting_of_every_rule_has_an_option() -> None:
    assert list(RULE_OPTIONS) == list(RULES)
    for name, rule in RULES.items():
        assert [option.name for option in RULE_OPTIONS[name]] == [f.name for f in fields(rule)]
        assert not any(option.required for option in RULE_OPTIONS[name])


@pytest.mark.parametrize(
    ("rule", "name", "flags", "metavar", "end"),
    [
        ("klora", "pattern", ["--pattern"], "[s|s*]", "for FLUX.  [default: s]"),
        ("klora", "alpha", ["--alpha"], "FLOAT", "[range: -100 to 100; default: 1.5]"),
        ("klora", "gamma", ["--gamma"], "paper|code|NUMBER", "default: as the semantics]"),
        ("klora", "top_k", ["--top-k"], "auto|N", "[range: 1 or more; default: auto]"),
        ("np+klora", "mu", ["--mu"], "FLOAT", "[range: 0 to 1e+06; default: 0.5]"),
        ("switch", "steps", ["--steps"], "INTEGER", "[range: 1 to 100000; required]"),
        ("switch", "tau", ["--tau"], "INTEGER", "[range: 1 to 100000; default: 5]"),
        ("phases", "content_phases", ["--content-phases"], "POINTS", "[default: 0:1]"),
        (
            "phases",
            "slot_phases",
            ["--phases"],
            "SLOT=POINTS",
            "0:0,0.5:1; may be repeated.",
        ),
    ],
)
def test_an_option_says_what_its_setting_says(
    rule: str, name: str, flags: list[str], metavar: str, end: str
) -> None:
    (option,) = (each for each in RULE_OPTIONS[rule] if each.name == name)
    assert option.opts == flags
    assert option.make_metavar(click.Context(main)) == metavar
    assert option.help is not None
    assert option.help.endswith(end)
    assert option.help.startswith(settings_of(RULES[rule])[name].help.rstrip("."))


@pytest.mark.parametrize(("command", "default"), [("compile", "1"), ("recompile", "as FILE")])
def test_settings_of_all_rules_and_of_reading_are_options(command: str, default: str) -> None:
    text = " ".join(CliRunner().invoke(main, [command, "--help"]).output.split())
    expected = f"[range: -100 to 100; default: {default}] --style-weight FLOAT"
    assert expected in text
    assert "--weight SLOT=FACTOR A further factor" in text
    assert "--text-encoder [both|content|style|none]" in text
    assert "--drop-unused Store only what this schedule uses." in text
    reading = "--max-error FLOAT" in text and "[range: 0 to 0.5; default: 1e-06]" in text
    assert reading == (command == "compile")
    assert ("--base FILE The base model" in text) == (command == "compile")


@pytest.mark.parametrize("rule", RULES)
def test_help_lists_the_options_of_the_rule_that_is_named(rule: str) -> None:
    for asked in (["--rule", rule], [f"--rule={rule}"]):
        text = CliRunner().invoke(main, ["compile", *asked, "--help"]).output
        own = {flag for option in RULE_OPTIONS[rule] for flag in option.opts}
        every = {flag for options in RULE_OPTIONS.values() for o in options for flag in o.opts}
        listed = {flag for flag in every if f"  {flag} " in text}
        assert listed == own
        assert (f"Options of --rule {rule}:" in text) == bool(own)
        assert "--drop-unused" in text


def test_help_of_recompile_lists_all() -> None:
    text = CliRunner().invoke(main, ["recompile", "--help"]).output
    for rule, options in RULE_OPTIONS.items():
        assert all(f"  {option.opts[0]} " in text for option in options)
        assert (f"Options of --rule {rule}:" in text) == bool(options)


def test_an_option_of_another_rule_is_one_clear_error(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    output = ("-o", tmp_path / "x.klora.safetensors")
    for options, text in (
        (("--tau", 3), "--tau is an option of --rule switch, not of --rule klora."),
        (
            ("--rule", "est", "--pattern", "s"),
            "--pattern is an option of --rule klora and --rule np",
        ),
        (
            ("--rule", "direct", "--mu", 1),
            "--mu is an option of --rule np and --rule np+klora, not",
        ),
        (("--nothing", 1), "No such option"),
        (("--rule", "mine"), "'mine' is not one of 'klora', 'est'"),
        (("--rule", "switch"), "steps: rule switch needs the number of steps of your runs"),
        (("--rule", "phases", "--phases", "x"), "'x' is not SLOT=POINTS"),
        (("--rule", "phases", "--content-phases", "x"), "content_phases: expected progress:weight"),
    ):
        result = klora("compile", *pair, *output, *options)
        assert result.exit_code == 2
        assert text in result.stderr
        assert not output[1].exists()


def test_options_of_each_rule_reach_the_artifact(pair: tuple[Path, Path], tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text('{"style *.to_q": "0:0.5"}')
    cases = {
        "klora": (["--bias", "0.5", "--top-k", "3"], {"bias": 0.5, "top_k": 3}),
        "est": (["--alpha", "2", "--d", "0.25"], {"alpha": 2.0, "d": 0.25}),
        "np": (["--mu", "3"], {"mu": 3.0}),
        "np+klora": (["--mu", "3", "--pattern", "s*"], {"mu": 3.0, "pattern": "s*", "beta": 1.3}),
        "soft": (["--sharpness", "2", "--parts", "4"], {"sharpness": 2.0, "parts": 4}),
        "direct": (["--weight", "style=0.5"], {"weights": {"style": 0.5}}),
        "level": (["--style-weight", "0.5"], {"style_weight": 0.5}),
        "auto-strength": (["--per", "layer"], {"per": "layer"}),
        "switch": (["--steps", "20", "--tau", "4"], {"steps": 20, "tau": 4}),
        "phases": (
            ["--content-phases", "0:1,0.4:0.2", "--phases", "style=0:0.5"],
            {"content_phases": "0:1,0.4:0.2", "slot_phases": {"style": "0:0.5"}},
        ),
        "groups": (["--table", str(table)], {"table": {"style *.to_q": "0:0.5"}}),
        "ties": (["--density", "0.25", "--rank", "2"], {"density": 0.25, "rank": 2}),
        "dare": (["--drop", "0.25", "--seed", "7"], {"drop": 0.25, "seed": 7, "rank": None}),
        "della": (["--epsilon", "0.5", "--scale", "2"], {"epsilon": 0.5, "scale": 2.0}),
        "auto": (["--style-weight", "0.5"], {"style_weight": 0.5}),
    }
    calibrated = {name for name, kind in RULES.items() if issubclass(kind, Calibrated)}
    assert sorted(cases) == sorted(RULES.keys() - calibrated)
    uncited = ("direct", "level", "auto-strength", "phases", "groups", "auto")
    for rule, (options, wanted) in cases.items():
        output = tmp_path / f"{rule}.klora.safetensors"
        result = klora("compile", *pair, "-o", output, "--rule", rule, *options)
        assert result.exit_code == 0, result.stderr
        fusion = load_fusion(output)
        picked = fusion.rule.name if rule == "auto" else rule
        assert fusion.rule.name == picked
        assert ("picked" in fusion.rule.parameters) == (rule == "auto")
        assert fusion.rule.parameters.items() >= wanted.items()
        assert klora("verify", output, "--against", *pair).exit_code == 0
        text = klora("inspect", output).stdout
        assert re.search(rf"^  rule +{re.escape(picked)}, ", text, re.MULTILINE)
        assert ("another number of steps" in text) == (rule == "switch")
        assert ("content (derived)" in text) == rule.startswith("np")
        assert klora("inspect", output, "--plot", tmp_path / f"{rule}.png").exit_code == 0
        found = json.loads(klora("inspect", output, "--json").stdout)
        assert found["slots"]["content"]["derived"] == fusion.slots["content"].derived
        card = klora("card", output, "-o", "-").stdout
        assert ("## Citation" in card) == (rule not in uncited)
        assert ("2502.18461" in card) == (rule.endswith("klora") or rule == "soft")


def test_the_table_of_options_imports_no_torch() -> None:
    code = "import klora_compile.commands.rule_options, sys; print('torch' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"
    assert "torch" in sys.modules
