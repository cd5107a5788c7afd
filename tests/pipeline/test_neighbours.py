"""What else happens to a pipeline while a fusion is on it: works, or is refused by name."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from support.applying import Apply, live_of
from support.generation import TWO_STEPS, Case, build, generate
from support.handmade import State, fusion_for, weight_of
from support.pairs import slow
from tiny_pipeline import parameters, tiny_lora

from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import ConfigError, IncompatibleModelError, InUseError
from klora_runtime.layers.merge import Merge
from klora_runtime.layers.pristine.values import Pristine
from klora_runtime.pipeline.component_watch import _Observed
from klora_runtime.pipeline.handle import FusionHandle

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda pipe: pipe.load_lora_weights("x"), "load_lora_weights is not possible"),
        (lambda pipe: pipe.fuse_lora(), "fuse_lora is not possible"),
        (lambda pipe: pipe.unfuse_lora(), "unfuse_lora is not possible"),
        (lambda pipe: pipe.unet.load_lora_adapter("x"), "load_lora_adapter is not possible"),
        (lambda pipe: pipe.unet.fuse_lora(), "fuse_lora is not possible"),
        (lambda pipe: pipe.unet.load_state_dict({}), "would mix these weights"),
        (lambda pipe: pipe.unet.state_dict(), "state_dict would hold the fused weights"),
        (lambda pipe: ControlNetModel.from_unet(pipe.unet), "in a model made from this one"),
        (lambda pipe: accelerate.cpu_offload(pipe.unet, CPU), "state_dict would hold"),
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
    bare = parameters(pipe)
    handle = apply_fusion(pipe, fusion)
    expected = generate(pipe, TWO_STEPS)
    live = {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}
    accelerate.cpu_offload(pipe.unet, CPU, state_dict=live)
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


def test_a_second_loop_of_a_call_is_checked_anew(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    """The check at the beginning of the call holds for its first loop only."""
    apply(pipe, fusion)
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    to_q, refused = attention.to_q, []

    def replace(_pipe: Any, _index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        attention.to_q = torch.nn.Linear(32, 32)
        with pytest.raises(InUseError, match="was replaced or wrapped") as error:
            pipe.scheduler.set_timesteps(2)
        refused.append(error.value)
        attention.to_q = to_q
        return values

    generate(pipe, Case(1), callback_on_step_end=replace)
    assert len(refused) == 1


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
        for act in changes(handle, fusion):
            with pytest.raises(InUseError, match="generating in another thread") as error:
                act()
            errors.append(error.value)

    def on_step(_pipe: Any, _index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if not errors:
            in_a_thread(change)
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
    acts: dict[str, Callable[[], None]] = {
        "enabled": lambda: setattr(handle, "enabled", False),
        "swap": lambda: handle.swap(smaller),
    }
    with pytest.raises(KeyboardInterrupt):
        acts[act]()
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
        mode = weakref.ref(live_of(handle).mode)
        handle.remove()
        assert handle.models == ()
        assert mode() is not None
        assert not mode().nbytes()
    finally:
        gc.enable()
    assert weight_of(pipe, layer) is not None


def image_to_image(sibling: Any, **extra: Any) -> torch.Tensor:
    sibling.set_progress_bar_config(disable=True)
    latents = sibling(
        "a fox",
        image=torch.zeros(1, 3, 32, 32),
        num_inference_steps=4,
        strength=0.5,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
        **extra,
    ).images
    assert isinstance(latents, torch.Tensor)
    return latents


def test_a_sibling_follows_the_shared_scheduler(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    handle = apply(pipe, fusion)
    sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert sibling.scheduler is pipe.scheduler
    image_to_image(sibling)
    assert handle.report().progress == 3.5 / 4


def compiled_in_place(unet: Any) -> Any:
    unet.compile(backend="eager")
    return unet


def compiled_around(unet: Any) -> Any:
    return torch.compile(unet, backend="eager")


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def with_its_own_scheduler(pipe: Any) -> Any:
    sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    sibling.scheduler = pipe.scheduler.from_config(pipe.scheduler.config)
    return sibling


@pytest.mark.parametrize("ran_before", [False, True])
def test_a_sibling_with_a_scheduler_of_its_own(
    apply: Apply, ran_before: bool, pipe: Any, fusion: Fusion
) -> None:
    """Nobody would tell the fusion of its steps."""
    bare = image_to_image(with_its_own_scheduler(pipe))
    handle = apply(pipe, fusion)
    sibling = with_its_own_scheduler(pipe)
    if ran_before:
        generate(pipe, TWO_STEPS)
    with pytest.raises(InUseError, match="the scheduler that the fusion follows does not"):
        image_to_image(sibling)
    handle.enabled = False
    assert torch.equal(image_to_image(sibling), bare)
    handle.remove()
    assert torch.equal(image_to_image(sibling), bare)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("compile_", "first"),
    [
        (compiled_in_place, "compile"),
        slow(compiled_in_place, "use"),
        (compiled_in_place, "apply"),
        (compiled_around, "compile"),
        slow(compiled_around, "use"),
        (compiled_around, "apply"),
    ],
)
def test_a_sibling_with_a_scheduler_of_its_own_and_a_compiled_denoiser(
    compile_: Callable[[Any], Any], first: str, pipe: Any, fusion: Fusion
) -> None:
    """Hooks inside the compiled code do nothing, so the look is around it."""
    if first != "apply":
        pipe.unet = compile_(pipe.unet)
    if first == "use":
        generate(pipe, TWO_STEPS)
    handle = apply_fusion(pipe, fusion)
    if first == "apply":
        pipe.unet = compile_(pipe.unet)
    sibling = with_its_own_scheduler(pipe)
    with pytest.raises(InUseError, match="the scheduler that the fusion follows does not"):
        image_to_image(sibling)
    handle.remove()
    assert not isinstance(vars(pipe.unet).get("_compiled_call_impl"), _Observed)


def interrupt(*_: Any) -> dict[str, Any]:
    raise KeyboardInterrupt


def interrupted(pipe: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, TWO_STEPS, callback_on_step_end=interrupt)


def interrupted_sibling(pipe: Any) -> None:
    sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    with pytest.raises(KeyboardInterrupt):
        sibling(
            "a fox",
            image=torch.zeros(1, 3, 32, 32),
            num_inference_steps=4,
            callback_on_step_end=interrupt,
        )


def set_timesteps(pipe: Any) -> None:
    pipe.scheduler.set_timesteps(4)


@pytest.mark.parametrize("before", [interrupted, interrupted_sibling, set_timesteps])
def test_a_sibling_after_a_loop_that_was_abandoned(
    apply: Apply, before: Callable[[Any], None], pipe: Any, fusion: Fusion
) -> None:
    apply(pipe, fusion)
    before(pipe)
    with pytest.raises(InUseError, match="the scheduler that the fusion follows does not"):
        image_to_image(with_its_own_scheduler(pipe))


def changes(handle: FusionHandle, fusion: Fusion) -> list[Callable[[], None]]:
    return [
        lambda: handle.set(content=0.1),
        lambda: setattr(handle, "enabled", False),
        lambda: handle.swap(fusion),
        handle.remove,
    ]


def test_another_thread_cannot_change_a_running_sibling(
    apply: Apply, pipe: Any, fusion: Fusion
) -> None:
    handle = apply(pipe, fusion)
    sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    expected = image_to_image(sibling)
    refused: list[BaseException] = []

    def change() -> None:
        for act in changes(handle, fusion):
            with pytest.raises(InUseError, match="generating in another thread") as error:
                act()
            refused.append(error.value)

    def on_step(_pipe: Any, _index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if not refused:
            in_a_thread(change)
        return values

    assert torch.equal(image_to_image(sibling, callback_on_step_end=on_step), expected)
    assert len(refused) == 4


def test_a_loop_that_was_abandoned_in_another_thread(
    apply: Apply, pipe: Any, fusion: Fusion
) -> None:
    """While that thread lives nobody knows, but the loop can be ended."""
    bare = generate(pipe, TWO_STEPS)
    handle = apply(pipe, fusion)
    begun, ended = threading.Event(), threading.Event()

    def abandon() -> None:
        pipe.scheduler.set_timesteps(4)
        begun.set()
        ended.wait(60)

    thread = threading.Thread(target=abandon)
    thread.start()
    assert begun.wait(60)
    with pytest.raises(InUseError, match=r"call pipe\.scheduler\.set_timesteps .* to end it"):
        handle.remove()
    pipe.scheduler.set_timesteps(4)
    handle.set(content=1.0)
    in_a_thread(lambda: pipe.scheduler.set_timesteps(4))  # of a thread that is gone
    ended.set()
    thread.join(60)
    handle.remove()
    assert torch.equal(generate(pipe, TWO_STEPS), bare)


def in_a_thread(act: Callable[[], Any]) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join(60)


class Conditioned(StableDiffusionPipeline):
    """Runs its denoiser once before it has timesteps, as pipelines with image conditions do."""

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        states = super().encode_prompt(*args, **kwargs)
        zeros = torch.zeros(1, 4, 8, 8)
        self.memory = self.unet(zeros, torch.tensor(0), encoder_hidden_states=states[0]).sample
        return states


def test_a_denoiser_that_runs_before_there_are_timesteps(
    apply: Apply, pipe: Any, fusion: Fusion
) -> None:
    """It is at progress 0, also where the last image ended elsewhere."""
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    early = Conditioned(**parts, requires_safety_checker=False)
    early.set_progress_bar_config(disable=True)
    apply(early, fusion)
    first = generate(early, TWO_STEPS), early.memory
    second = generate(early, TWO_STEPS), early.memory
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_preview_by_a_sibling_in_a_callback(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    """It has its own scheduler, but runs inside the pipeline's call."""
    apply(pipe, fusion)
    sibling = with_its_own_scheduler(pipe)

    def preview(_pipe: Any, _index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        image_to_image(sibling)
        return values

    with pytest.raises(InUseError, match="went from one timestep to another"):
        generate(pipe, TWO_STEPS, callback_on_step_end=preview)


class OwnScheduler(StableDiffusionPipeline):
    """Samples with a scheduler that it makes itself."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(4)
        latents = torch.zeros(1, 4, 8, 8)
        for t in scheduler.timesteps:
            noise = self.unet(latents, t, encoder_hidden_states=torch.zeros(1, 77, 32)).sample
            latents = scheduler.step(noise, t, latents).prev_sample
        return latents


def test_a_pipeline_that_makes_its_own_scheduler(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    own = OwnScheduler(**parts, requires_safety_checker=False)
    with (
        apply(own, fusion),
        pytest.raises(InUseError, match="the scheduler that the fusion follows does not"),
    ):
        own()
    own()


def test_a_generation_does_not_begin_while_a_thread_changes_the_handle(
    apply: Apply, pipe: Any, fusion: Fusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = apply(pipe, fusion)
    writing, written = threading.Event(), threading.Event()
    write = type(live_of(handle).mode).write

    def slow(*args: Any) -> None:
        writing.set()
        written.wait(60)
        write(*args)

    monkeypatch.setattr(type(live_of(handle).mode), "write", slow)
    thread = threading.Thread(target=lambda: handle.set(content=0.5))
    thread.start()
    assert writing.wait(60)
    with pytest.raises(InUseError, match="generating in another thread"):
        generate(pipe, TWO_STEPS)
    written.set()
    thread.join(60)
    monkeypatch.undo()
    found = generate(pipe, TWO_STEPS)
    handle.set(content=0.5)
    assert torch.equal(generate(pipe, TWO_STEPS), found)


def test_a_weight_for_loras_of_peft_is_refused(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    handle = apply(pipe, fusion)
    with pytest.raises(ConfigError) as error:
        generate(pipe, TWO_STEPS, cross_attention_kwargs={"scale": 0.5})
    assert str(error.value) == (
        "cross_attention_kwargs={'scale': 0.5} acts on LoRAs that PEFT has loaded, not on a "
        "fusion; call handle.set(content=..., style=...) instead."
    )
    generate(pipe, TWO_STEPS, cross_attention_kwargs={"scale": 1.0})
    handle.enabled = False
    generate(pipe, TWO_STEPS, cross_attention_kwargs={"scale": 0.5})


def test_gradients_through_a_switch_are_refused_by_torch(apply: Apply, pipe: Any) -> None:
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    apply(pipe, fusion_for(pipe, [layer], switch=0.5))
    pipe.scheduler.set_timesteps(2)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    states = torch.zeros(1, 77, 32)
    early, late = pipe.scheduler.timesteps[[0, -1]]
    pipe.unet(x, early, states).sample.sum().backward()
    out = pipe.unet(x, early, states).sample.sum()
    pipe.scheduler.scale_model_input(x, pipe.scheduler.timesteps[-1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out + pipe.unet(x, late, states).sample.sum()).backward()


def test_the_state_of_a_bare_model_can_be_taken(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    bare = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    handle = apply(pipe, fusion)
    handle.enabled = False
    assert all(torch.equal(v, bare[name]) for name, v in pipe.unet.state_dict().items())
    handle.enabled = True
    handle.remove()
    assert all(torch.equal(v, bare[name]) for name, v in pipe.unet.state_dict().items())


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


def test_a_forward_that_hides_the_names_of_its_arguments(
    apply: Apply, pipe: Any, fusion: Fusion
) -> None:
    """As caches replace it; the timestep is still read."""
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    handle = apply(pipe, fusion)
    pipe.scheduler.set_timesteps(4)
    pipe.unet(torch.zeros(1, 4, 16, 16), pipe.scheduler.timesteps[2], torch.zeros(1, 77, 32))
    assert handle.report().progress == 2.5 / 4


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
