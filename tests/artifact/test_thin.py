"""Thin artifacts: the schedule alone, and the factors out of the files it was compiled from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.generation import TWO_STEPS, LoraPair, build, generate
from support.lora_files import GOLDEN, peft_keys, random_pair, write_lora
from support.shipped import Shipped
from tiny_pipeline import Family

from klora_compile import (
    Settings,
    compile_fusion,
    read_adapter,
    reschedule,
    verify_fusion,
)
from klora_compile.cli import main
from klora_compile.rules import Direct, Klora
from klora_compile.sources import by_source
from klora_compile.storing.thin import thin
from klora_runtime import (
    ArtifactError,
    ConfigError,
    Fusion,
    FusionLibrary,
    apply_fusion,
    load_fusion,
    save_fusion,
)
from klora_runtime.artifact.references import complete
from klora_runtime.artifact.schedule import Reference


def thinned(content: Path, style: Path, path: Path) -> Fusion:
    """Compiles a pair, writes it thin to ``path``, and gives it whole."""
    adapters = {"content": read_adapter(content), "style": read_adapter(style)}
    fusion = compile_fusion(*adapters.values(), device="cpu")
    save_fusion(thin(fusion, adapters), path)
    return fusion


@pytest.fixture
def pair(lora_pairs: dict[Family, LoraPair]) -> LoraPair:
    return lora_pairs["sd1"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "thin.klora.safetensors"


@pytest.fixture
def whole(pair: LoraPair, path: Path) -> Fusion:
    return thinned(pair.content, pair.style, path)


def assert_equal(one: Fusion, other: Fusion) -> None:
    assert one.fingerprint == other.fingerprint
    for entry, same in zip(one.entries, other.entries, strict=True):
        assert (entry.timeline, entry.scores) == (same.timeline, same.scores)
        assert entry.references == same.references == {}
        assert entry.factors.keys() == same.factors.keys()
        for slot, stored in entry.factors.items():
            other_delta = same.factors[slot].delta
            assert stored.scale == same.factors[slot].scale
            for tensor, equal in zip(stored.delta.tensors, other_delta.tensors, strict=True):
                assert tensor.dtype == equal.dtype
                assert torch.equal(tensor, equal)


def test_with_its_sources_it_is_the_full_artifact_to_the_byte(
    pair: LoraPair, whole: Fusion, path: Path, tmp_path: Path
) -> None:
    filled = load_fusion(path, sources={"content": pair.content, "style": pair.style})
    assert_equal(filled, whole)
    save_fusion(whole, tmp_path / "a")
    save_fusion(filled, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_without_them_it_is_read_and_written_again(whole: Fusion, path: Path) -> None:
    held = load_fusion(path, check="full")
    assert held.is_thin
    assert held.nbytes == 0
    assert held.components == whole.components
    before = path.read_bytes()
    save_fusion(held, path, overwrite=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_pictures_are_those_of_the_full_artifact(
    pair: LoraPair, whole: Fusion, path: Path, mode: str
) -> None:
    results = []
    for given, sources in ((whole, None), (path, {"content": pair.content, "style": pair.style})):
        pipe = build(TWO_STEPS)
        with apply_fusion(pipe, given, mode, sources=sources):
            results.append(generate(pipe, TWO_STEPS))
    assert torch.equal(results[0], results[1])


def test_swap_takes_sources_too(pipe: Any, pair: LoraPair, whole: Fusion, path: Path) -> None:
    with apply_fusion(pipe, whole) as handle:
        handle.swap(path, sources={"content": pair.content, "style": pair.style})
        assert_equal(handle.fusion, whole)


def test_a_library_keeps_it_filled(pair: LoraPair, whole: Fusion, path: Path) -> None:
    library = FusionLibrary(10**9)
    assert library.get(path).is_thin
    assert len(library) == 0
    filled = library.get(path, sources={"content": pair.content, "style": pair.style})
    assert_equal(filled, whole)
    assert library.get(path) is filled


# --- rows, kernels, dtypes ----------------------------------------------------------------------


def bfl(path: Path, *, seed: int, dtype: torch.dtype, rank: int = 2) -> Path:
    """A FLUX LoRA in its authors' names: fused rows, and halves that diffusers swaps."""
    sizes = {
        "double_blocks.0.img_attn.qkv": (24, 8),
        "single_blocks.1.linear1": (56, 8),
        "final_layer.adaLN_modulation.1": (16, 8),
        "double_blocks.0.img_attn.proj": (8, 8),
    }
    tensors = {}
    for index, (module, (out, width)) in enumerate(sizes.items()):
        down, up = random_pair(out, width, rank, seed=seed + index)
        tensors[f"diffusion_model.{module}.lora_A.weight"] = down.to(dtype)
        tensors[f"diffusion_model.{module}.lora_B.weight"] = up.to(dtype)
        tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(3.0)
    return write_lora(path, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_fused_rows_and_every_dtype(dtype: torch.dtype, path: Path, tmp_path: Path) -> None:
    content = bfl(tmp_path / "c.safetensors", seed=0, dtype=dtype)
    style = bfl(tmp_path / "s.safetensors", seed=9, dtype=torch.float16, rank=3)
    fusion = thinned(content, style, path)
    rows = {
        entry.module: reference.rows
        for entry in load_fusion(path).entries
        for reference in entry.references.values()
    }
    assert rows["transformer_blocks.0.attn.to_k"] == ((8, 16),)
    assert rows["norm_out.linear"] == ((8, 16), (0, 8))
    assert rows["transformer_blocks.0.attn.to_out.0"] is None
    assert_equal(load_fusion(path, sources={"content": content, "style": style}), fusion)


def test_kernels_of_convolutions(path: Path, tmp_path: Path) -> None:
    block = "unet.down_blocks.0"
    shapes: dict[str, tuple[int, int, tuple[int, ...]]] = {
        f"{block}.attentions.0.transformer_blocks.0.attn1.to_q": (32, 32, ()),
        f"{block}.resnets.0.conv1": (32, 32, (3, 3)),
        f"{block}.attentions.0.proj_in": (32, 32, (1, 1)),
    }
    files = []
    for seed in (1, 2):
        tensors = {}
        for name, (out, width, kernel) in shapes.items():
            down, up = random_pair(out, width, 2, seed=seed, kernel=kernel)
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        files.append(write_lora(tmp_path / f"{seed}.safetensors", tensors))
    fusion = thinned(files[0], files[1], path)
    assert {len(entry.shape) for entry in fusion.entries} == {2, 4}
    assert_equal(load_fusion(path, sources={"content": files[0], "style": files[1]}), fusion)


# --- what is refused ----------------------------------------------------------------------------


def refusal(pipe: Any, given: Any, **sources: Any) -> str:
    with pytest.raises((ArtifactError, ConfigError)) as caught:
        apply_fusion(pipe, given, sources=sources)
    return str(caught.value)


def test_without_its_sources_it_is_not_applied(
    pipe: Any, pair: LoraPair, whole: Fusion, path: Path
) -> None:
    wanted = {
        name: f"{source.file} of {source.bytes} bytes with sha256 {source.sha256}"
        for name, source in whole.sources.items()
    }
    text = (
        "this fusion is thin: its factors are in the LoRA files that it was compiled from. Name "
        "them: {}; in Python sources={{{}}}.{}"
    )
    named = "--source content=PATH --source style=PATH", '"content": PATH, "style": PATH'
    both = "".join(f"\n  - {name}: {what}" for name, what in wanted.items())
    assert refusal(pipe, path) == text.format(*named, both)
    assert refusal(pipe, load_fusion(path)) == text.format(*named, both)
    one = f"\n  - style: {wanted['style']}"
    assert refusal(pipe, path, content=pair.content) == text.format(
        "--source style=PATH", '"style": PATH', one
    )


def test_another_file_is_refused(
    pipe: Any, pair: LoraPair, whole: Fusion, path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "renamed.safetensors"
    shutil.copy(pair.content, copy)
    other = tmp_path / "other.safetensors"
    other.write_bytes(pair.style.read_bytes()[:-1] + b"\x01")
    found = read_adapter(other).sha256
    style = whole.sources["style"]
    assert refusal(pipe, path, content=copy, style=other) == (
        "these are not the files that the fusion was compiled from:"
        f"\n  - style: expected {style.file} of {style.bytes} bytes with sha256 {style.sha256}; "
        f"{other} has sha256 {found}"
    )
    swapped = refusal(pipe, path, content=pair.style, style=pair.content)
    assert swapped.count("\n  - ") == 2


def test_a_source_that_is_not_there_is_refused(pipe: Any, whole: Fusion, path: Path) -> None:
    text = refusal(pipe, path, content=path.with_name("no"), style=path)
    assert text == f"source {path.with_name('no')} cannot be read: No such file or directory."


def test_names_that_mean_nothing_are_refused(
    pipe: Any, pair: LoraPair, whole: Fusion, path: Path
) -> None:
    assert refusal(pipe, path, contents=pair.content) == (
        "there is no source contents; this fusion has content, style."
    )
    assert refusal(pipe, whole, content=pair.content) == (
        "this fusion holds its factors; leave out content. Only a thin fusion needs sources."
    )
    with pytest.raises(ConfigError, match="this fusion holds its factors; leave out style"):
        load_fusion(GOLDEN, sources={"style": pair.style})


def test_a_misspelt_keyword_is_no_source(pipe: Any, pair: LoraPair, whole: Fusion) -> None:
    """Python itself names it, and nothing is applied."""
    call: Any = apply_fusion
    for wrong in ({"component": ["unet"]}, {"content": pair.content}, {"content": 0.8}):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(wrong))}'"):
            call(pipe, whole, **wrong)
    with apply_fusion(pipe, whole) as handle:
        swap: Any = handle.swap
        with pytest.raises(TypeError, match="unexpected keyword argument 'source'"):
            swap(whole, source={"content": pair.content})


def test_sources_are_a_mapping(pipe: Any, pair: LoraPair, path: Path, whole: Fusion) -> None:
    wrong: Any
    for wrong in (str(pair.content), pair.content, [pair.content, pair.style]):
        for use in (
            lambda: apply_fusion(pipe, path, sources=wrong),  # noqa: B023
            lambda: load_fusion(path, sources=wrong),  # noqa: B023
            lambda: FusionLibrary(0).get(path, sources=wrong),  # noqa: B023
        ):
            with pytest.raises(ConfigError, match="expected source names with a file each, such"):
                use()


@pytest.mark.parametrize(
    ("change", "issue"),
    [
        ({"down": "no"}, "no tensor no in the file"),
        ({"rows": ((0, 8), (10**6, 10**6 + 24))}, "do not make"),
        ({"up": "alpha"}, "do not make"),
    ],
)
def test_a_reference_that_the_file_does_not_bear_out_is_refused(
    pair: LoraPair, whole: Fusion, path: Path, change: dict[str, Any], issue: str
) -> None:
    held = load_fusion(path)
    index = next(
        i for i, e in enumerate(held.entries) if "content" in e.references and e.shape[0] == 32
    )
    entry = held.entries[index]
    if change.get("up") == "alpha":
        change = {"up": entry.references["content"].down}
    lie: Reference = replace(entry.references["content"], **change)
    entries = list(held.entries)
    entries[index] = replace(entry, references={**entry.references, "content": lie})
    save_fusion(replace(held, entries=tuple(entries)), path, overwrite=True)
    with pytest.raises(ArtifactError) as caught:
        load_fusion(path, sources={"content": pair.content, "style": pair.style})
    assert str(caught.value).startswith("the sources lack tensors that the fusion names:")
    (found,) = caught.value.issues
    assert found.startswith(f"{entry.path}, content: ")
    assert issue in found


def test_what_is_no_plain_pair_is_refused_by_name(path: Path, tmp_path: Path) -> None:
    """A full difference, and a Tucker core between two factors."""
    block = "unet.down_blocks.0"
    query = f"{block}.attentions.0.transformer_blocks.0.attn1.to_q"
    conv = f"{block}.resnets.0.conv1"
    down, up = random_pair(32, 32, 2)
    plain = {f"{query}.lora_A.weight": down, f"{query}.lora_B.weight": up}
    style = write_lora(tmp_path / "style.safetensors", plain)
    tucker = {
        f"{conv}.lora_down.weight": torch.randn(2, 32, 1, 1),
        f"{conv}.lora_mid.weight": torch.randn(2, 2, 3, 3),
        f"{conv}.lora_up.weight": torch.randn(32, 2, 1, 1),
    }
    full = {f"{query}.diff": torch.randn(32, 32)}
    content = write_lora(tmp_path / "content.safetensors", tucker | full)
    with pytest.raises(ConfigError) as caught:
        thinned(content, style, path)
    assert str(caught.value) == (
        "2 slots cannot stay in their files, as a thin artifact needs. Only plain low-rank "
        f"pairs in safetensors files can. Compile without --thin.\n  - {query}, content: its "
        f"form is full, and its factors are computed\n  - {conv}, content: its form is lora, "
        "and its factors are computed"
    )


def test_files_of_torch_save_are_refused(pair: LoraPair, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(pair.style), tmp_path / "style.pt")
    with pytest.raises(ConfigError) as caught:
        thinned(pair.content, tmp_path / "style.pt", tmp_path / "x")
    assert "style.pt is not a safetensors file" in caught.value.issues[0]


# --- command line -------------------------------------------------------------------------------


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(map(str, args)))
    return result.exit_code, result.output


def test_commands(pair: LoraPair, path: Path) -> None:
    both = (pair.content, pair.style)
    code, text = run("compile", *both, "-o", path, "--thin")
    assert code == 0, text
    assert "the factors are in the sources; applying it needs them" in text
    assert path.stat().st_size < 20_000
    assert run("verify", path, "--against", *both)[0] == 0
    assert run("inspect", path)[0] == 0
    assert '"thin": true' in run("inspect", path, "--json")[1]
    code, text = run("compile", *both, "-o", path, "--force", "--thin", "--compress", "0.01")
    assert code == 2
    assert "--thin stores no factors, so there is nothing to --compress." in text


def test_sample_takes_the_sources(
    shipped: Shipped, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And makes the picture of the full artifact with them."""
    monkeypatch.chdir(path.parent)
    files = [shipped.artifact.with_name(f"{name}.safetensors") for name in ("fox", "ink")]
    thinned(files[0], files[1], path)
    ask = ("--model", shipped.model, "--prompt", "a fox", "--steps", 2, "--force", "--no-metadata")
    sources = ("--source", f"content={files[0]}", "--source", f"style={files[1]}")
    for name, artifact, further in (("a", shipped.artifact, ()), ("b", path, sources)):
        code, text = run("sample", artifact, *ask, *further, "-o", f"{name}.png")
        assert code == 0, text
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    code, text = run("sample", path, *ask, "-o", "c.png")
    assert code == 1
    assert "this fusion is thin" in text
    code, text = run("sample", path, *ask, "--source", "content", "-o", "c.png")
    assert code == 2
    assert "'content' is not NAME=FILE." in text
    code, text = run("card", path, "-o", "card.md")
    assert code == 0, text
    card = Path("card.md").read_text()
    assert 'sources={"content": "fox.safetensors", "style": "ink.safetensors"})' in card
    assert "--source content=fox.safetensors --source style=ink.safetensors" in card


def test_verify_notices_another_place(pair: LoraPair, whole: Fusion, path: Path) -> None:
    held = load_fusion(path)
    index = next(i for i, e in enumerate(held.entries) if "content" in e.references)
    entry = held.entries[index]
    lie = replace(entry.references["content"], up="elsewhere")
    entries = list(held.entries)
    entries[index] = replace(entry, references={**entry.references, "content": lie})
    changed = replace(held, entries=tuple(entries))
    adapters = [read_adapter(path) for path in (pair.content, pair.style)]
    assert verify_fusion(held, by_source(*adapters), device="cpu") == []
    assert verify_fusion(changed, by_source(*adapters), device="cpu") == [
        f"{entry.path}: where its factors lie differs"
    ]


def test_another_schedule_needs_no_source(pair: LoraPair, path: Path, tmp_path: Path) -> None:
    adapters = {"content": read_adapter(pair.content), "style": read_adapter(pair.style)}
    whole = compile_fusion(*adapters.values(), Klora(), Settings(), device="cpu")
    save_fusion(thin(whole, adapters), path)
    other = tmp_path / "other"
    half = Direct(), Settings(content_weight=0.5)
    save_fusion(reschedule(load_fusion(path), *half), other)
    filled = load_fusion(other, sources={"content": pair.content, "style": pair.style})
    assert_equal(filled, reschedule(whole, *half))


def test_export_takes_the_sources(
    pair: LoraPair, whole: Fusion, path: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full.klora.safetensors"
    save_fusion(whole, full)
    given = ["--source", f"content={pair.content}", "--source", f"style={pair.style}"]
    written = []
    for file, sources in ((full, []), (path, given)):
        output = tmp_path / f"{file.stem}.lora.safetensors"
        arguments = ["export", str(file), "--static", "--keys", "peft", "-o", str(output)]
        result = CliRunner().invoke(main, [*arguments, *sources])
        assert result.exit_code == 0, result.output
        written.append(output.read_bytes())
    assert written[0] == written[1]


def test_every_slot_of_several_is_named(path: Path, tmp_path: Path) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    adapters = {}
    for index, name in enumerate(("content.1", "content.2", "style")):
        pairs = peft_keys({layer: random_pair(8, 8, 2, seed=index)})
        adapters[name] = read_adapter(write_lora(tmp_path / f"{name}.safetensors", pairs))
    contents = [adapters["content.1"], adapters["content.2"]]
    fusion = compile_fusion(contents, adapters["style"], Direct(), device="cpu")
    save_fusion(thin(fusion, adapters), path)
    with pytest.raises(ArtifactError, match=r'\{"content.1": PATH, "content.2": PATH, "sty'):
        complete(load_fusion(path))
    assert load_fusion(path, sources={}).is_thin


def test_only_the_loras_that_it_was_compiled_from_stand_for_its_factors(
    pair: LoraPair, whole: Fusion
) -> None:
    content, style = pair.content, pair.style
    assert thin(whole, {"content": content, "style": style}).is_thin
    with pytest.raises(ConfigError, match="not the LoRAs that the fusion was compiled") as caught:
        thin(whole, {"content": style, "style": style})
    (issue,) = caught.value.issues
    assert issue.startswith("sources.content: it was compiled from sd1-content.safetensors with")
    with pytest.raises(ConfigError) as caught:
        thin(whole, {"content": content})
    assert caught.value.issues == ("sources.style: no LoRA was given for it",)
