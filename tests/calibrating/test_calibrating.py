"""Calibration with a tiny pipeline: literal references, the same bytes, going on after a stop."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.shipped import error_of, klora
from tiny_pipeline import tiny_lora, tiny_pipeline

from klora_compile import OwnPictures, Settings, calibrate_fusion, compile_fusion, read_adapter
from klora_compile.calibrating import checkpoint
from klora_compile.calibrating.branches import branches_of, branching
from klora_compile.calibrating.calibrate import Calibrating
from klora_compile.calibrating.coefficients import matches
from klora_compile.calibrating.pictures import prompts_of, turns
from klora_compile.calibrating.recording import Call, prediction, weights_digest
from klora_compile.rules import Direct, Fitted, Groups, Ssr
from klora_compile.rules.rule import Rule
from klora_compile.settings.calibration import Calibration
from klora_compile.settings.config import Config
from klora_compile.sources import read_sources
from klora_runtime import apply_fusion, load_fusion, save_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import ConfigError, InUseError

OWN = OwnPictures({"content": "a fox", "style": "ink"}, count=1, steps=3)
FIT = Fitted(phases=2, updates=4, rate=0.1, hold=0.0)
RULES: Mapping[str, Rule] = {"ssr": Ssr(), "fit": FIT}
#: PNDM asks once more than there are steps.
PROGRESS = [0.125, 0.375, 0.625, 0.875]
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("sd1")


@pytest.fixture(scope="module")
def loras(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of attention and a convolution; the style has a layer more."""
    folder = tmp_path_factory.mktemp("own")
    modules = ("to_q", "to_v", "conv1")
    return (
        tiny_lora(pipe, folder / "fox.safetensors", seed=1, strength=3.0, modules=modules),
        tiny_lora(
            *(pipe, folder / "ink.safetensors"),
            seed=2,
            strength=3.0,
            modules=(*modules, "proj_out"),
        ),
    )


@pytest.fixture(scope="module")
def folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("base") / "tiny"
    pipe.save_pretrained(found)
    return found


def calibrated(pipe: Any, loras: tuple[Path, Path], rule: Rule, **more: Any) -> Fusion:
    return calibrate_fusion(pipe, *loras, rule, own=more.pop("own", OWN), **more)


def written(fusion: Fusion, folder: Path) -> bytes:
    path = folder / "some.klora.safetensors"
    save_fusion(fusion, path, overwrite=True)
    return path.read_bytes()


def calibrating(pipe: Any, loras: tuple[Path, Path], rule: Rule) -> Calibrating:
    config = Config(rule)
    adapters = read_sources({"content": loras[0], "style": loras[1]}, config)
    prompts = {"content": ("a fox",), "style": ("ink",)}
    return Calibrating(pipe, adapters, config, OWN, prompts, None, lambda *_: None)


@pytest.fixture(scope="module")
def calls(pipe: Any, loras: tuple[Path, Path]) -> dict[str, list[Call]]:
    return calibrating(pipe, loras, FIT)._recorded(1)


# --- what is recorded ---------------------------------------------------------------------------


def test_calls_are_those_of_each_lora_alone(
    pipe: Any, loras: tuple[Path, Path], calls: dict[str, list[Call]]
) -> None:
    for slot, file in zip(("content", "style"), loras, strict=True):
        assert [call.progress for call in calls[slot]] == PROGRESS
        with apply_fusion(pipe, compile_fusion(file, rule=Direct(), device="cpu"), mode="merge"):
            for call in calls[slot]:
                with torch.no_grad():
                    answer = prediction(pipe.unet(*call.args, **call.kwargs))
                assert torch.equal(answer, call.target)
    own = [call.kwargs["encoder_hidden_states"] for call in calls["content"]]
    assert all(each is own[0] for each in own)  # one copy of what all steps share


def test_a_calibration_leaves_the_pipeline_as_it_was(pipe: Any, loras: tuple[Path, Path]) -> None:
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    asked = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()]
    for rule in RULES.values():
        calibrated(pipe, loras, rule)
    assert all(torch.equal(before[name], value) for name, value in pipe.unet.state_dict().items())
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == asked
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()]
    with apply_fusion(pipe, compile_fusion(*loras, device="cpu")), pytest.raises(InUseError):
        calibrated(pipe, loras, Ssr())


# --- SSR-Merge ----------------------------------------------------------------------------------


def test_ssr_is_the_least_squares_of_what_each_lora_does_alone(
    pipe: Any, loras: tuple[Path, Path]
) -> None:
    """On the inputs that a hook sees, against torch's own solver, on dense deltas."""
    fusion = calibrated(pipe, loras, Ssr(ridge=1e-9))
    entry = next(entry for entry in fusion.entries if entry.module == QUERY)
    merged = entry.factors["merged"].scale * entry.factors["merged"].delta.matrix()
    adapters = [read_adapter(file).layers[f"unet.{QUERY}"] for file in loras]
    seen: list[list[torch.Tensor]] = [[], []]
    for file, inputs in zip(loras, seen, strict=True):
        hook = pipe.unet.get_submodule(QUERY).register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, -2).T.double())
        )
        text = "a fox" if file == loras[0] else "ink"
        with apply_fusion(pipe, compile_fusion(file, rule=Direct(), device="cpu")):
            pipe(
                *(text, None, None, 3),
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            )
        hook.remove()
    down = torch.cat([layer.down.double() for layer in adapters])
    up = torch.cat([layer.scaling * layer.up.double() for layer in adapters], 1)
    z = [down @ torch.cat(inputs, 1) for inputs in seen]
    rank = adapters[0].rank
    wanted = [torch.zeros_like(each) for each in z]
    wanted[0][:rank], wanted[1][rank:] = z[0][:rank], z[1][rank:]
    route = torch.linalg.lstsq(torch.cat(z, 1).T, torch.cat(wanted, 1).T, driver="gelsd").solution.T
    for inputs, each in zip(seen, z, strict=True):
        assert torch.allclose(merged @ torch.cat(inputs, 1), up @ route @ each, atol=1e-4)


def test_ssr_of_strength_0_is_the_plain_sum(pipe: Any, loras: tuple[Path, Path]) -> None:
    fusion = calibrated(pipe, loras, Ssr(strength=0.0), settings=Settings(style_weight=0.5))
    plain = {e.layer: e for e in compile_fusion(*loras, Direct(), device="cpu").entries}
    fates = {entry.layer: entry.fate for entry in fusion.entries}
    assert set(fates.values()) == {"merged", "summed"}
    for entry in fusion.entries:
        assert ("merged" in entry.factors) == (len(plain[entry.layer].factors) == 2)
        if "merged" in entry.factors:
            own = plain[entry.layer].factors
            wanted = own["content"].scale * own["content"].delta.matrix()
            wanted = wanted + 0.5 * own["style"].scale * own["style"].delta.matrix()
            assert torch.allclose(entry.factors["merged"].delta.matrix(), wanted, atol=1e-6)


def test_a_route_without_signals_is_the_plain_sum_and_a_small_one_counts_like_a_large_one() -> None:
    zeros = [torch.zeros(4, 4, dtype=torch.float64)] * 2
    assert torch.equal(Ssr().route(zeros, (2, 2)), torch.eye(4, dtype=torch.float64))
    z = torch.randn(4, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = [z[:, :20] @ z[:, :20].T, z[:, 20:] @ z[:, 20:].T]
    scale = torch.diag(torch.tensor([1.0, 1e-4, 1e3, 1.0], dtype=torch.float64))
    route = Ssr().route(moments, (2, 2))
    scaled = Ssr().route([scale @ each @ scale for each in moments], (2, 2))
    assert torch.allclose(scaled, scale @ route @ scale.inverse(), rtol=1e-6)


# --- fit ----------------------------------------------------------------------------------------


def test_branches_are_the_fusion_with_these_weights(
    pipe: Any, loras: tuple[Path, Path], calls: dict[str, list[Call]]
) -> None:
    work, call = calibrating(pipe, loras, FIT), calls["content"][0]
    branches = branches_of(work.models, work._weighed())
    count = sum(len(branch.columns) for branch in branches)
    c = torch.linspace(0.2, 1.9, count)
    table = {
        f"{slot} {branch.name}": ((0.0, float(c[column])),)
        for branch in branches
        for slot, column in zip(branch.slots, branch.columns, strict=True)
    }
    settings = Settings(text_encoder="none")
    fusion = compile_fusion(*loras, Groups(table=table), settings, device="cpu")
    with apply_fusion(pipe, fusion), torch.no_grad():
        wanted = prediction(pipe.unet(*call.args, **call.kwargs))
    with work._summed(), branching(branches, c), torch.no_grad():
        found = prediction(pipe.unet(*call.args, **call.kwargs))
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, call.target, atol=1e-3)


def loss_of(pipe: Any, fusion: Fusion, calls: dict[str, list[Call]], models: Any) -> float:
    """The loss of the rule's docstring, with the fusion itself, which must be constant."""
    (phase,) = matches(models, calls, replace(FIT, phases=1).descent)
    total = 0.0
    with apply_fusion(pipe, fusion), torch.no_grad():
        for own in phase.values():
            answers = [prediction(pipe.unet(*m.call.args, **m.call.kwargs)) for m in own]
            errors = [
                float((answer - match.call.target).square().mean()) / match.size
                for answer, match in zip(answers, own, strict=True)
            ]
            total += sum(errors) / len(errors)
    return total


def test_a_fit_is_nearer_to_each_loras_own_predictions_than_the_plain_sum(
    pipe: Any, loras: tuple[Path, Path], calls: dict[str, list[Call]]
) -> None:
    rule = replace(FIT, phases=1, updates=12)
    work = calibrating(pipe, loras, rule)
    fitted = rule.scheduled(work._fitted(rule))
    assert isinstance(fitted, Groups)
    losses = []
    for each in (Direct(), fitted):
        fusion = compile_fusion(*loras, each, Settings(text_encoder="none"), device="cpu")
        losses.append(loss_of(pipe, fusion, calls, work.models))
    assert losses[1] < 0.97 * losses[0]


def test_after_content_until_only_the_style_is_matched(
    pipe: Any, loras: tuple[Path, Path], calls: dict[str, list[Call]]
) -> None:
    models = calibrating(pipe, loras, FIT).models
    phases = matches(models, calls, replace(FIT, content_until=0.5).descent)
    assert [sorted(phase) for phase in phases] == [["content", "style"], ["style"]]
    nothing = matches(models, calls, replace(FIT, content_until=0.0).descent)
    assert [sorted(phase) for phase in nothing] == [["style"], ["style"]]


# --- the artifact -------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_a_calibration_is_reproducible_and_goes_on_after_a_stop(
    pipe: Any,
    loras: tuple[Path, Path],
    rule: Rule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = replace(OWN, count=2, steps=2) if isinstance(rule, Ssr) else OWN
    whole = written(calibrated(pipe, loras, rule, own=own), tmp_path)
    assert written(calibrated(pipe, loras, rule, own=own), tmp_path) == whole
    other = calibrated(pipe, loras, rule, own=replace(own, seed=5))
    assert written(other, tmp_path) != whole
    monkeypatch.setattr(checkpoint, "_PAUSE", 0.0)
    kept = tmp_path / "state"
    stop = 1 if isinstance(rule, Ssr) else 5

    def stopping(_: str, done: int, total: int) -> None:
        assert done <= total
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(pipe, loras, rule, own=own, checkpoint=kept, on_part=stopping)
    assert kept.is_file()
    reported: list[int] = []
    again = calibrated(
        *(pipe, loras, rule),
        own=own,
        checkpoint=kept,
        on_part=lambda what, done, _: reported.append(done) if what == "update" else None,
    )
    assert written(again, tmp_path) == whole
    assert not kept.exists()
    if isinstance(rule, Fitted):
        assert reported[0] == stop + 1  # updates that were done are not done again
        kept.write_bytes(b"damaged")
        assert written(calibrated(pipe, loras, rule, checkpoint=kept), tmp_path) == whole


def test_a_checkpoint_of_another_calibration_is_not_read(tmp_path: Path) -> None:
    state = {"c": torch.ones(2)}
    path = tmp_path / "state"
    checkpoint.Checkpoint(path, {"seed": 1}).save(3, state, now=True)
    found = checkpoint.Checkpoint(path, {"seed": 1}).load()
    assert found is not None
    assert found[0] == 3
    assert torch.equal(found[1]["c"], state["c"])
    assert checkpoint.Checkpoint(path, {"seed": 2}).load() is None
    assert checkpoint.Checkpoint(tmp_path / "nothing", {}).load() is None


def test_the_digest_tells_one_base_model_from_another(pipe: Any) -> None:
    models = {"unet": pipe.unet}
    digest = weights_digest(models)
    assert weights_digest(models) == digest
    assert weights_digest({"unet": tiny_pipeline("sd1").unet}) == digest
    assert weights_digest({"unet": tiny_pipeline("sd1", seed=1).unet}) != digest
    assert weights_digest({"transformer": pipe.unet}) != digest


def test_the_record_is_read_back(pipe: Any, loras: tuple[Path, Path]) -> None:
    fusion = calibrated(pipe, loras, FIT)
    stated = fusion.rule.parameters["calibrated"]
    found = Calibration.from_parameters(stated)
    assert found is not None
    assert found.parameters() == stated
    assert found.prompts == {"content": ("a fox",), "style": ("ink",)}
    assert found.settings["updates"] == 4
    assert found.weights == weights_digest({"unet": pipe.unet})
    assert (found.threads, found.torch) == (torch.get_num_threads(), str(torch.__version__))
    assert Calibration.from_parameters({**stated, "seed": "x"}) is None
    assert Config.of_fusion(fusion).calibration == found
    assert fusion.rule.name == "groups"
    rows = fusion.rule.parameters["table"]
    assert all(re.fullmatch(r"0:-?[\d.]+,0\.5:-?[\d.]+", points) for points in rows.values())


# --- prompts ------------------------------------------------------------------------------------


def test_trigger_words_stand_in_for_prompts(loras: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = tmp_path / "said.safetensors"
    save_file(load_file(loras[0]), file, metadata={"modelspec.trigger_phrase": "sks fox"})
    adapters = {"content": read_adapter(file), "style": read_adapter(loras[1])}
    found = prompts_of(OwnPictures({"style": ["ink", "a cat"]}), ("content", "style"), adapters)
    assert found == {"content": ("sks fox",), "style": ("ink", "a cat")}
    assert list(turns(OwnPictures(count=3, seed=7), found["style"])) == [
        ("ink", 7),
        ("a cat", 8),
        ("ink", 9),
    ]
    with pytest.raises(ConfigError, match=r"needs a prompt .* the style LoRA .* style=TEXT"):
        prompts_of(OwnPictures(), ("content", "style"), adapters)
    with pytest.raises(ConfigError, match="there is no LoRA turbo"):
        prompts_of(OwnPictures({"turbo": "x"}), ("content", "style"), adapters)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"seed": -1}, {"steps": 0}, {"count": True}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(wrong))}: expected a whole number"):
        OwnPictures(**wrong)


def test_a_rule_without_a_model_and_a_model_without_a_rule_are_refused(
    pipe: Any, loras: tuple[Path, Path]
) -> None:
    with pytest.raises(ConfigError, match=r"ssr needs a base model.*--calibrate MODEL"):
        compile_fusion(*loras, Ssr(), device="cpu")
    with pytest.raises(ConfigError, match=r"direct needs no base model.*--rule"):
        calibrated(pipe, loras, Direct())


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def command(loras: tuple[Path, Path], tmp_path: Path) -> Callable[..., Any]:
    output = tmp_path / "out.klora.safetensors"

    def run(*options: object) -> Any:
        fixed = ("-o", output, "--force", "--device", "cpu", "--no-cache")
        return klora("compile", *loras, *fixed, *options)

    return run


def test_the_command_calibrates_and_verify_says_what_it_takes_as_stated(
    command: Callable[..., Any], folder: Path, loras: tuple[Path, Path], tmp_path: Path, pipe: Any
) -> None:
    output = tmp_path / "out.klora.safetensors"
    asked = ("--calibrate", folder, "--calibrate-pictures", 1, "--calibrate-steps", 3)
    prompts = ("--calibrate-prompt", "content=a fox", "--calibrate-prompt", "style=ink")
    fit = ("--rule", "fit", "--phases", 2, "--updates", 4, "--rate", 0.1, "--hold", 0)
    for options, name, taken in (
        (("--rule", "ssr"), "ssr", "the factors of merged in "),
        (fit, "groups", "the weights in the parameters of rule groups, which rule fit fitted with"),
    ):
        result = command(*asked, *prompts, *options)
        assert result.exit_code == 0, result.output
        assert "calibrated" in result.stdout
        assert not output.with_name(f"{output.name}.calibration").exists()
        fusion = load_fusion(output)
        assert fusion.rule.name == name
        assert fusion.rule.parameters["calibrated"]["model"] == "tiny"
        verified = klora("verify", output, "--against", *loras)
        assert verified.exit_code == 0, verified.output
        assert f"taken as stated: {taken}" in verified.stdout
    api = calibrated(pipe, loras, FIT)
    assert [e.timeline for e in load_fusion(output).entries] == [e.timeline for e in api.entries]
    recompiled = klora("recompile", output, "-o", tmp_path / "again.klora.safetensors")
    assert recompiled.exit_code == 0, recompiled.output
    again = load_fusion(tmp_path / "again.klora.safetensors")
    assert again.rule.parameters == fusion.rule.parameters


def test_a_changed_calibrated_artifact_does_not_verify(
    pipe: Any, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    fusion = calibrated(pipe, loras, FIT)
    first, second, *_ = (entry for entry in fusion.entries if len(entry.factors) == 2)
    assert first.timeline != second.timeline
    changed = [
        replace(each, timeline=second.timeline) if each is first else each
        for each in fusion.entries
    ]
    path = tmp_path / "changed.klora.safetensors"
    save_fusion(replace(fusion, entries=tuple(changed)), path)
    result = klora("verify", path, "--against", *loras)
    assert "timeline differs" in error_of(result, 1)


def test_the_commands_errors_name_the_way_out(command: Callable[..., Any], folder: Path) -> None:
    prompts = ("--calibrate-prompt", "content=a", "--calibrate-prompt", "style=b")
    for options, text in (
        (("--rule", "ssr"), "rule ssr needs a base model"),
        (("--rule", "np", "--calibrate", folder, *prompts), "rule np needs no base model"),
        (("--calibrate-seed", 1), "name it with --calibrate MODEL"),
        (("--trust-remote-code",), "name it with --calibrate MODEL"),
        (("--calibrate", "/nowhere/model", *prompts), "there is no folder /nowhere/model"),
        (("--calibrate", folder), "needs a prompt that shows the content LoRA alone"),
        (("--calibrate", folder, "--calibrate-prompt", "x"), "'x' is not SLOT=TEXT"),
        (("--calibrate", folder, "--calibrate-prompt", "turbo=x"), "there is no LoRA turbo"),
    ):
        result = command(*options)
        assert result.exit_code != 0
        assert text in " ".join(result.stderr.split()), result.stderr
