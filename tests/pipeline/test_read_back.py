"""Mode merge with the base read back from the file that the model was loaded from."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.applying import live_of
from support.generation import TWO_STEPS, generate
from support.small_pipe import Pipe, a_fusion, a_net, two_steps

from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import ConfigError, InUseError
from klora_runtime.layers.pristine import copies, held_files

CPU = torch.device("cpu")
WEIGHTS = {"unet.first.weight", "unet.second.weight", "unet.conv.weight"}
WANTED = "another program wanted to write to its file"
CHANGED = "its file changed while the fusion was off"

#: Opens the file for writing, which waits for the lease, and fills it with zeros.
_WRITER = (
    "import os, sys; file = open(sys.argv[1], 'r+b'); "
    "file.write(bytes(os.path.getsize(sys.argv[1])))"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a pipeline, with the weights of its denoiser."""
    file = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir(parents=True)
    save_file(a_net(torch.float32).state_dict(), str(file))
    if not held_files.HeldFile(file).hold():
        pytest.skip("this system gives no lease on a file of one's own")
    return tmp_path / "base"


def file_of(folder: Path) -> Path:
    (file,) = (folder / "unet").iterdir()
    return file


def bits(pipe: Pipe) -> list[bytes]:
    return [p.detach().view(torch.uint8).numpy().tobytes() for p in pipe.unet.parameters()]


def outputs(pipe: Pipe) -> list[torch.Tensor]:
    return list(two_steps(pipe, CPU))


def are_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("named", ["pipeline", "component", "file"])
def test_nothing_is_copied_and_every_bit_comes_back(
    dtype: torch.dtype, named: str, folder: Path
) -> None:
    """A model that was converted when it was loaded is compared after the same conversion."""
    pipe, other = Pipe(a_net(dtype)), Pipe(a_net(dtype))
    bare = bits(pipe)
    base = {"pipeline": folder, "component": folder / "unet", "file": file_of(folder)}[named]
    handle = apply_fusion(pipe, a_fusion(), "merge", base=base)
    expected = apply_fusion(other, a_fusion(), "merge")
    assert handle.report().copied == {}
    largest = max(p.numel() * 4 for p in pipe.unet.parameters())
    kept = handle.report().nbytes
    assert not any(place.startswith("base weights") for place in kept)
    assert kept["scratch on cpu"] <= 2 * largest  # the values that are read, and the sum
    assert are_equal(outputs(pipe), outputs(other))
    for each in (handle, expected):
        each.set(style=0.5)
        each.swap(a_fusion())
        each.enabled = False
    assert bits(pipe) == bare
    handle.enabled = expected.enabled = True
    assert are_equal(outputs(pipe), outputs(other))
    handle.remove()
    assert bits(pipe) == bare
    Path(file_of(folder)).write_bytes(b"")  # nobody waits for a lease


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_the_file_may_vanish(how: str, folder: Path) -> None:
    pipe = Pipe(a_net(torch.float32))
    bare = bits(pipe)
    handle = apply_fusion(pipe, a_fusion(), "merge", base=folder)
    file = file_of(folder)
    if how == "replaced":
        new = file.with_name("new")
        new.write_bytes(bytes(file.stat().st_size))
        os.replace(new, file)
    else:
        file.unlink()
    outputs(pipe)
    handle.remove()
    assert bits(pipe) == bare


@pytest.mark.parametrize("asked", [True, False], ids=["at a check", "by the thread"])
def test_who_wants_to_write_waits_until_the_values_are_copied(
    asked: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_files, "_INTERVAL", 600.0 if asked else 0.01)
    pipe = Pipe(a_net(torch.float32))
    bare = bits(pipe)
    handle = apply_fusion(pipe, a_fusion(), "merge", base=folder)
    writer = subprocess.Popen([sys.executable, "-S", "-c", _WRITER, str(file_of(folder))])
    try:
        while asked and writer.poll() is None:
            handle.set(style=0.5)
            time.sleep(0.01)
        assert writer.wait(timeout=40) == 0
    finally:
        writer.kill()
    assert not any(file_of(folder).read_bytes())
    outputs(pipe)
    assert handle.report().copied == dict.fromkeys(WEIGHTS, WANTED)
    assert handle.report().nbytes["base weights on cpu"] > 0
    assert "copied: 3 base values, another program wanted" in str(handle.report())
    handle.remove()
    assert bits(pipe) == bare


def leaseless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that keep nobody from writing."""
    monkeypatch.setattr(held_files, "_take_lease", lambda file: True)
    monkeypatch.setattr(held_files, "_has_lease", lambda file: True)
    monkeypatch.setattr(held_files, "_return_lease", lambda file: None)


@pytest.mark.parametrize("shorter", [True, False])
def test_a_file_that_changed_all_the_same_is_noticed_before_a_write(
    shorter: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaseless(monkeypatch)
    pipe = Pipe(a_net(torch.float32))
    handle = apply_fusion(pipe, a_fusion(), "merge", base=folder)
    outputs(pipe)
    before, size = bits(pipe), file_of(folder).stat().st_size
    with file_of(folder).open("r+b") as file:
        file.truncate(size - 100) if shorter else file.write(bytes(size))
    with pytest.raises(InUseError, match="was changed"):
        live_of(handle).mode.check()
    for change in (
        lambda: handle.set(style=0.5),
        lambda: setattr(handle, "enabled", False),
        lambda: handle.swap(a_fusion()),
        lambda: next(two_steps(pipe, CPU)),
        handle.remove,
    ):
        with pytest.raises(InUseError, match=r"safetensors was changed while a fusion .* again"):
            change()
        assert bits(pipe) == before


def test_a_file_may_change_while_the_fusion_is_off(folder: Path) -> None:
    pipe = Pipe(a_net(torch.float32))
    bare = bits(pipe)
    handle = apply_fusion(pipe, a_fusion(), "merge", base=folder)
    expected = outputs(pipe)
    handle.enabled = False
    file_of(folder).write_bytes(bytes(10))
    assert not any(place.startswith("base weights") for place in handle.report().nbytes)
    assert handle.report().rounding == pytest.approx(0, abs=1e-6)
    handle.enabled = True
    assert are_equal(outputs(pipe), expected)
    assert handle.report().copied == dict.fromkeys(WEIGHTS, CHANGED)
    handle.remove()
    assert bits(pipe) == bare


def test_what_differs_keeps_its_copy(folder: Path) -> None:
    pipe = Pipe(a_net(torch.float32))
    with torch.no_grad():
        pipe.unet.second.weight[3, 5] = -pipe.unet.second.weight[3, 5]
    bare = bits(pipe)
    handle = apply_fusion(pipe, a_fusion(), "merge", base=folder)
    assert handle.report().copied == {"unet.second.weight": "it differs from the checkpoint"}
    assert handle.report().nbytes["base weights on cpu"] == pipe.unet.second.weight.nbytes
    outputs(pipe)
    handle.swap(a_fusion())
    assert handle.report().copied == {"unet.second.weight": "it differs from the checkpoint"}
    handle.remove()
    assert bits(pipe) == bare


def test_bits_are_compared_not_numbers(folder: Path) -> None:
    """Nothing is equal to itself in NaN, and zero has two signs."""
    net, pipe = a_net(torch.float32), Pipe(a_net(torch.float32))
    for each in (net, pipe.unet):
        each.first.weight.data[0, 0] = float("nan")
        each.second.weight.data[0, 0] = 0.0
    pipe.unet.second.weight.data[0, 0] = -0.0
    save_file(net.state_dict(), str(file_of(folder)))
    handle = apply_fusion(pipe, a_fusion(), "merge", base=folder)
    assert handle.report().copied.keys() == {"unet.second.weight"}
    handle.remove()


def test_layers_that_a_swap_brings_are_compared_then(folder: Path) -> None:
    few = replace(a_fusion(), entries=a_fusion().entries[:1])
    pipe = Pipe(a_net(torch.float32))
    handle = apply_fusion(pipe, few, "merge", base=folder)
    module = few.entries[0].module
    changed = {"first", "second", "conv"} - {module}
    with torch.no_grad():
        getattr(pipe.unet, min(changed)).weight.mul_(2)
    bare = bits(Pipe(pipe.unet))
    handle.swap(a_fusion())
    assert handle.report().copied.keys() == {f"unet.{min(changed)}.weight"}
    handle.swap(few)
    handle.remove()
    after = bits(pipe)
    names = [name for name, _ in pipe.unet.named_parameters()]
    for name, one, other in zip(names, after, bare, strict=True):
        assert one == other or name == f"{module}.weight", name
    fresh = dict(a_net(torch.float32).named_parameters())[f"{module}.weight"]
    assert torch.equal(dict(pipe.unet.named_parameters())[f"{module}.weight"], fresh)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_model_that_is_converted_is_followed(enabled: bool, folder: Path) -> None:
    """Twice, so that the second conversion begins from what the first one lost."""
    pipe, other = Pipe(a_net(torch.float32)), Pipe(a_net(torch.float32))
    handle = apply_fusion(pipe, a_fusion(), "merge", base=folder)
    expected = apply_fusion(other, a_fusion(), "merge")
    for each, on in ((handle, pipe), (expected, other)):
        each.enabled = enabled
        on.unet.to(torch.bfloat16)
        each.enabled = True
        on.unet.to(torch.float32)
    assert are_equal(outputs(pipe), outputs(other))
    handle.remove()
    expected.remove()
    assert bits(pipe) == bits(other)


@pytest.mark.parametrize("why", ["no lease", "a writer", "a pickle", "other names", "not there"])
def test_where_nothing_is_promised_copies_are_kept(
    why: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer may have the file open already; then the system gives no lease."""
    file, base = file_of(folder), folder
    writer = file.open("r+b") if why == "a writer" else None
    expected = "no safetensors file of the checkpoint has it under this name"
    if why == "no lease":
        monkeypatch.setattr(held_files, "_take_lease", lambda file: False)
    if why in ("no lease", "a writer"):
        expected = f"the system does not keep others from writing to {file}"
    elif why == "a pickle":
        file.rename(file.with_suffix(".bin"))
    elif why == "other names":
        state = a_net(torch.float32).state_dict()
        save_file({f"model.{name}": value for name, value in state.items()}, str(file))
    pipe = Pipe(a_net(torch.float32))
    bare = bits(pipe)
    given = "auto" if why == "not there" else base  # this model says no place
    handle = apply_fusion(pipe, a_fusion(), "merge", base=given)
    assert handle.report().copied == dict.fromkeys(WEIGHTS, expected)
    outputs(pipe)
    handle.remove()
    assert bits(pipe) == bare
    if writer is not None:
        writer.close()


def test_a_file_that_is_not_safetensors_is_a_reason(folder: Path) -> None:
    file_of(folder).write_bytes(b"<html>")
    pipe = Pipe(a_net(torch.float32))
    handle = apply_fusion(pipe, a_fusion(), "merge", base=folder)
    assert "is a web page" in handle.report().copied["unet.first.weight"]
    handle.remove()


@pytest.mark.parametrize("base", ["missing", Path("missing") / "unet", 3, "\0"])
def test_a_base_that_is_not_there_is_refused(base: Any) -> None:
    pipe = Pipe(a_net(torch.float32))
    before = bits(pipe)
    with pytest.raises(ConfigError, match=r"^base=.*: there is no such file or folder\. Name what"):
        apply_fusion(pipe, a_fusion(), "merge", base=base)
    assert bits(pipe) == before


def test_auto_merges_where_copies_would_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "free_host_memory", lambda: 100.0)
    pipe, other = Pipe(a_net(torch.float32)), Pipe(a_net(torch.float32))
    assert apply_fusion(pipe, a_fusion(), base=folder).report().mode == "merge"
    assert apply_fusion(other, a_fusion()).report().mode == "branch"


def test_without_a_base_nothing_is_said(folder: Path) -> None:
    pipe = Pipe(a_net(torch.float32))
    report = apply_fusion(pipe, a_fusion(), "merge").report()
    assert report.copied == {}
    assert "base weights on cpu" in report.nbytes


@pytest.fixture
def saved(pipe: Any, tmp_path: Path) -> Path:
    """A pipeline of diffusers: shards, and beside them another variant of other numbers."""
    place = tmp_path / "saved"
    pipe.save_pretrained(place, max_shard_size="300KB")
    assert len(list((place / "unet").glob("*-of-*.safetensors"))) > 1
    halved = {n: (v / 2).half() for n, v in pipe.unet.state_dict().items() if v.is_floating_point()}
    save_file(halved, str(place / "unet" / "diffusion_pytorch_model.fp16.safetensors"))
    if not held_files.HeldFile(next((place / "unet").glob("*.safetensors"))).hold():
        pytest.skip("this system gives no lease on a file of one's own")
    return place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pipeline_says_where_it_was_loaded_from(
    dtype: torch.dtype, pipe: Any, saved: Path, fusion: Fusion
) -> None:
    """Its denoiser in shards, and its text encoder, whose names in the file have a prefix."""
    loaded = type(pipe).from_pretrained(saved, torch_dtype=dtype)
    before = {n: v.clone() for m in ("unet", "text_encoder") for n, v in state(loaded, m)}
    with apply_fusion(loaded, fusion, "merge", base="auto") as handle:
        assert handle.report().components == ("text_encoder", "unet")
        report = handle.report()
        assert report.copied == {}
        assert not any(place.startswith("base weights") for place in report.nbytes)
        found = generate(loaded, TWO_STEPS)
    copying = type(pipe).from_pretrained(saved, torch_dtype=dtype)
    with apply_fusion(copying, fusion, "merge"):
        assert torch.equal(found, generate(copying, TWO_STEPS))
    for name in ("unet", "text_encoder"):
        assert all(torch.equal(value, before[each]) for each, value in state(loaded, name))


def state(pipe: Any, component: str) -> list[tuple[str, torch.Tensor]]:
    return [(f"{component}.{n}", v) for n, v in getattr(pipe, component).state_dict().items()]
