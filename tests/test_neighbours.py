"""What else happens to a pipeline while a fusion is on it: works, or is refused by name."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Apply
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from generation import TWO_STEPS, build, generate
from handmade import State, weight_of
from tiny_pipeline import parameters, tiny_lora

from klora_runtime import apply_fusion
from klora_runtime.errors import IncompatibleModelError, InUseError
from klora_runtime.fusion import Fusion
from klora_runtime.modes.merge import Merge
from klora_runtime.modes.pristine import Pristine


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda pipe: pipe.load_lora_weights("x"), "load_lora_weights is not possible"),
        (lambda pipe: pipe.fuse_lora(), "fuse_lora is not possible"),
        (lambda pipe: pipe.unfuse_lora(), "unfuse_lora is not possible"),
        (lambda pipe: pipe.unet.load_lora_adapter("x"), "load_lora_adapter is not possible"),
        (lambda pipe: pipe.unet.fuse_lora(), "fuse_lora is not possible"),
        (lambda pipe: pipe.unet.load_state_dict(pipe.unet.state_dict()), "would be mixed"),
        (lambda pipe: pipe.unet.enable_layerwise_casting(), "would round the fused weights"),
        (lambda pipe: pipe.fuse_qkv_projections(), "fuse_qkv_projections is not possible"),
        (lambda pipe: pipe.enable_sequential_cpu_offload(), "the weights would be out of reach"),
        (lambda pipe: pipe.enable_group_offload(torch.device("cpu")), "its own copies"),
        (copy.deepcopy, "copying or pickling is not possible"),
        (pickle.dumps, "copying or pickling is not possible"),
    ],
)
def test_refused_while_applied(
    call: Callable[[Any], Any], text: str, pipe: Any, fusion: Fusion
) -> None:
    handle = apply_fusion(pipe, fusion)
    expected = generate(pipe, TWO_STEPS)
    before = State.of(pipe)
    with pytest.raises(InUseError, match=text):
        call(pipe)
    assert State.of(pipe).bits == before.bits
    assert torch.equal(generate(pipe, TWO_STEPS), expected)
    handle.remove()
    copy.deepcopy(pipe)


def test_a_lora_may_be_loaded_after_removing(
    apply: Apply, pipe: Any, fusion: Fusion, tmp_path: Path
) -> None:
    lora = tiny_lora(pipe, tmp_path / "lora.safetensors", seed=5)
    apply(pipe, fusion).remove()
    pipe.load_lora_weights(str(lora))
    pipe.unload_lora_weights()
    apply(pipe, fusion)


def test_projections_fused_behind_its_back(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    image = generate(pipe, TWO_STEPS)
    handle = apply(pipe, fusion)
    expected = generate(pipe, TWO_STEPS)
    type(pipe.unet).fuse_qkv_projections(pipe.unet)
    for act in (lambda: generate(pipe, TWO_STEPS), handle.remove, lambda: handle.set(content=0.5)):
        with pytest.raises(InUseError, match=r"layers were changed by something else .*\n.*unused"):
            act()
    pipe.unet.unfuse_qkv_projections()
    assert torch.equal(generate(pipe, TWO_STEPS), expected)
    handle.remove()
    assert torch.equal(generate(pipe, TWO_STEPS), image)


def test_weights_moved_out_of_reach(pipe: Any, fusion: Fusion) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    bare = parameters(pipe)
    handle = apply_fusion(pipe, fusion)
    expected = generate(pipe, TWO_STEPS)
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    for act in (lambda: generate(pipe, TWO_STEPS), handle.remove):
        with pytest.raises(InUseError, match="meta device"):
            act()
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    assert torch.equal(generate(pipe, TWO_STEPS), expected)
    handle.remove()
    assert all(torch.equal(value, bare[name]) for name, value in parameters(pipe).items())


def test_a_wrapped_layer_is_noticed(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    handle = apply(pipe, fusion)
    config = peft.LoraConfig(r=2, target_modules=["to_q"])
    type(pipe.unet).add_adapter(pipe.unet, config, adapter_name="other")
    with pytest.raises(InUseError, match="was replaced or wrapped"):
        generate(pipe, TWO_STEPS)
    pipe.unet.delete_adapters("other")
    pipe.unet.unload_lora()
    generate(pipe, TWO_STEPS)
    handle.remove()


def test_saving_saves_the_bare_model(
    apply: Apply, pipe: Any, fusion: Fusion, tmp_path: Path
) -> None:
    bare = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    handle = apply(pipe, fusion)
    expected = generate(pipe, TWO_STEPS)
    pipe.save_pretrained(tmp_path / "saved")
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "saved" / "unet")
    assert all(torch.equal(p, bare[name]) for name, p in saved.named_parameters())
    assert handle.enabled
    assert torch.equal(generate(pipe, TWO_STEPS), expected)


def test_another_pipeline_of_the_same_class(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    plain = type(pipe)
    handle = apply(pipe, fusion)
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    assert type(other) is plain
    other.unet = UNet2DConditionModel.from_config(pipe.unet.config)
    handle.remove()
    assert type(pipe) is plain


def test_the_error_of_a_second_handle_leads_to_the_first(
    apply: Apply, pipe: Any, fusion: Fusion
) -> None:
    bare = State.of(pipe)
    apply(pipe, fusion)
    with pytest.raises(InUseError) as error:
        apply(pipe, fusion)
    error.value.handle.remove()
    assert State.of(pipe) == bare


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_component_cannot_be_copied(
    apply: Apply, copied: Callable[[Any], Any], pipe: Any, fusion: Fusion
) -> None:
    handle = apply(pipe, fusion)
    with pytest.raises(InUseError, match="copying or pickling is not possible"):
        copied(pipe.unet)
    handle.remove()
    copied(pipe.unet)


def test_a_model_whose_pipeline_is_gone_can_be_given_back(apply: Apply, fusion: Fusion) -> None:
    lost, other = build(TWO_STEPS), build(TWO_STEPS)
    bare = generate(other, TWO_STEPS)
    apply(lost, fusion)
    other.unet, other.text_encoder = lost.unet, lost.text_encoder
    del lost
    gc.collect()
    with pytest.raises(InUseError, match="already carries a fusion") as error:
        apply(other, fusion)
    error.value.handle.remove()
    assert torch.equal(generate(other, TWO_STEPS), bare)


def test_a_copy_made_behind_its_back_is_known_for_one(
    apply: Apply, pipe: Any, fusion: Fusion
) -> None:
    handle = apply(pipe, fusion)
    twin = object.__new__(type(pipe.unet))
    vars(twin).update(vars(pipe.unet))
    handle.remove()
    pipe.unet = twin
    with pytest.raises(InUseError, match="was copied while a fusion was applied"):
        apply(pipe, fusion)


def test_a_scheduler_that_cannot_be_followed(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    class Stepless:
        config: dict[str, Any] = {}  # noqa: RUF012

    before = State.of(pipe).bits
    pipe.scheduler = Stepless()
    with pytest.raises(IncompatibleModelError, match="this Stepless cannot be followed"):
        apply(pipe, fusion)
    assert State.of(pipe).bits == before


def test_another_thread_cannot_change_a_running_generation(
    apply: Apply, pipe: Any, fusion: Fusion
) -> None:
    handle = apply(pipe, fusion)
    expected = generate(pipe, TWO_STEPS)
    errors: list[BaseException] = []

    def change() -> None:
        for act in (
            lambda: handle.set(content=0.1),
            lambda: setattr(handle, "enabled", False),
            lambda: handle.swap(fusion),
            handle.remove,
        ):
            with pytest.raises(InUseError, match="generating in another thread") as error:
                act()
            errors.append(error.value)

    def on_step(_pipe: Any, _index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if not errors:
            thread = threading.Thread(target=change)
            thread.start()
            thread.join()
        return values

    found = generate(pipe, TWO_STEPS, callback_on_step_end=on_step)
    assert len(errors) == 4
    assert torch.equal(found, expected)


@pytest.mark.parametrize("act", ["enabled", "swap"])
def test_an_interrupt_while_restoring_is_made_good(
    act: str, pipe: Any, fusion: Fusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = apply_fusion(pipe, fusion)
    expected = generate(pipe, TWO_STEPS)
    restore = Pristine.restore

    def interrupted(self: Pristine, paths: Any) -> None:
        monkeypatch.setattr(Pristine, "restore", restore)
        restore(self, sorted(paths)[:10])
        raise KeyboardInterrupt

    smaller = Fusion(**{**vars(fusion), "entries": fusion.entries[::2]})
    monkeypatch.setattr(Pristine, "restore", interrupted)
    changes: dict[str, Callable[[], None]] = {
        "enabled": lambda: setattr(handle, "enabled", False),
        "swap": lambda: handle.swap(smaller),
    }
    with pytest.raises(KeyboardInterrupt):
        changes[act]()
    assert torch.equal(generate(pipe, TWO_STEPS), expected)


def test_a_failure_while_taking_hold_leaves_nothing(
    pipe: Any, fusion: Fusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = State.of(pipe)

    def fail(self: Merge, progress: float, weights: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Merge, "write", fail)
    with pytest.raises(MemoryError):
        apply_fusion(pipe, fusion)
    assert State.of(pipe) == before


def test_a_removed_handle_holds_nothing(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    """Neither the pipeline nor the copies wait for the garbage collector."""
    layer = next(entry.layer for entry in fusion.entries if entry.acts)
    gc.collect()
    gc.disable()
    try:
        handle = apply(pipe, fusion)
        mode = weakref.ref(handle._mode)
        handle.remove()
        assert handle.models == ()
        assert mode() is not None
        assert not mode().nbytes()
    finally:
        gc.enable()
    assert weight_of(pipe, layer) is not None


def image_to_image(sibling: Any) -> torch.Tensor:
    sibling.set_progress_bar_config(disable=True)
    latents = sibling(
        "a fox",
        image=torch.zeros(1, 3, 32, 32),
        num_inference_steps=4,
        strength=0.5,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images
    assert isinstance(latents, torch.Tensor)
    return latents


def test_a_sibling_follows_the_shared_scheduler(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    handle = apply(pipe, fusion)
    sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert sibling.scheduler is pipe.scheduler
    image_to_image(sibling)
    assert handle.report().progress == 3.5 / 4


@pytest.mark.parametrize("ran_before", [False, True])
def test_a_sibling_with_a_scheduler_of_its_own(
    apply: Apply, ran_before: bool, pipe: Any, fusion: Fusion
) -> None:
    """Nobody would tell the fusion of its steps."""
    sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    sibling.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    bare = image_to_image(sibling)
    handle = apply(pipe, fusion)
    if ran_before:
        generate(pipe, TWO_STEPS)
    with pytest.raises(InUseError, match="the scheduler that the fusion follows does not"):
        image_to_image(sibling)
    handle.enabled = False
    assert torch.equal(image_to_image(sibling), bare)
    handle.remove()
    assert torch.equal(image_to_image(sibling), bare)


def test_a_sibling_after_an_interrupted_generation(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    sibling.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    apply(pipe, fusion)

    def interrupt(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, TWO_STEPS, callback_on_step_end=interrupt)
    with pytest.raises(InUseError, match="the scheduler that the fusion follows does not"):
        image_to_image(sibling)


def test_a_sibling_in_another_thread(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    """The run that began first is refused its next step; neither goes on with wrong weights."""
    apply(pipe, fusion)
    expected = generate(pipe, TWO_STEPS)
    sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    errors: list[BaseException] = []
    begun, ended = threading.Event(), threading.Event()

    def wait(_pipe: Any, _index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        begun.set()
        ended.wait(60)
        return values

    def sample() -> None:
        with pytest.raises(InUseError, match="generating in another thread") as error:
            sibling(
                "a fox",
                image=torch.zeros(1, 3, 32, 32),
                num_inference_steps=4,
                output_type="latent",
                callback_on_step_end=wait,
            )
        errors.append(error.value)

    thread = threading.Thread(target=sample)
    thread.start()
    assert begun.wait(60)

    def last_step(_pipe: Any, index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if not ended.is_set():
            ended.set()
            thread.join(60)
        return values

    found = generate(pipe, TWO_STEPS, callback_on_step_end=last_step)
    assert len(errors) == 1
    assert torch.equal(found, expected)


def test_a_denoiser_called_by_hand(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    inputs = torch.zeros(1, 4, 16, 16), 500, torch.zeros(1, 77, 32)
    handle = apply(pipe, fusion)
    with pytest.raises(InUseError, match=r"call scheduler\.set_timesteps first"):
        pipe.unet(*inputs)
    pipe.scheduler.set_timesteps(4)
    pipe.unet(*inputs)
    handle.remove()
    pipe.unet(*inputs)


def test_attributes_of_the_component_come_back(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    def mine() -> None: ...

    pipe.unet.save_pretrained = mine
    apply(pipe, fusion).remove()
    assert pipe.unet.save_pretrained is mine


def test_a_saved_component_is_bare(apply: Apply, pipe: Any, fusion: Fusion, tmp_path: Path) -> None:
    bare = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    handle = apply(pipe, fusion)
    pipe.unet.save_pretrained(tmp_path / "unet")
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert all(torch.equal(p, bare[name]) for name, p in saved.named_parameters())
    assert handle.enabled
