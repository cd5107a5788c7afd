"""The base of drawings: its form, what it sees, and that its training can be stopped."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from drawings.base.autoencoder import main as autoencoder
from drawings.base.autoencoder import standardised
from drawings.base.flow import levels, placed
from drawings.base.material import Material, recoloured
from drawings.base.parts import new_autoencoder, new_tokenizer
from drawings.base.progress import Progress
from drawings.base.publish import main as publish
from drawings.base.subjects import (
    HELD_OUT_STYLES,
    REPORTED_SUBJECTS,
    TRAINING_STYLES,
    TUNING_SUBJECTS,
    prompt,
    things,
    training_subjects,
)
from drawings.base.train import Plan, taught, train, trained, untrained
from drawings.base.words import teach
from safetensors.torch import load_file

WEIGHTS = Path(__file__).parents[2] / "examples" / "drawings" / "base" / "weights"
PROMPTS = ["a red apple, noto style", "a pink pen in a guild, flat style"] * 3


def pack(icons: dict[str, str], aliases: dict[str, str] | None = None) -> str:
    return json.dumps(
        {
            "icons": {name: {"body": body} for name, body in icons.items()},
            "aliases": {name: {"parent": parent} for name, parent in (aliases or {}).items()},
        }
    )


# What it sees.


def test_no_subject_and_no_style_is_in_two_parts() -> None:
    subjects = TUNING_SUBJECTS + REPORTED_SUBJECTS
    assert len(set(subjects)) == len(subjects) == 54
    assert not TRAINING_STYLES.keys() & HELD_OUT_STYLES.keys()
    assert not set(TRAINING_STYLES.values()) & set(HELD_OUT_STYLES.values())


def test_the_base_sees_no_held_out_subject_under_any_name(tmp_path: Path) -> None:
    drawn = {"fox": "f", "whale": "w", "spouting-whale": "s", "big-fish": "w", "keyboard": "k"}
    for package in TRAINING_STYLES.values():
        (tmp_path / package).mkdir()
        icons = drawn | {"fox-dark": "d"} | ({"once": "o"} if package == "noto" else {})
        icons |= {"pair": "p"} if package in ("noto", "twemoji") else {}
        text = pack(icons, {"sea-beast": "whale", "reynard": "fox"})
        (tmp_path / package / "icons.json").write_text(text)
    assert training_subjects(tmp_path) == ("fox", "keyboard", "pair", "reynard")
    kinds = {"Animals & Nature": ["fox", "whale"], "Objects": ["keyboard", "once", "pair"]}
    kinds |= {"Food & Drink": [], "Symbols": ["reynard"]}
    (tmp_path / "noto" / "metadata.json").write_text(json.dumps({"categories": kinds}))
    assert things(tmp_path) == ("fox", "keyboard")


def test_the_drawings_of_some_subjects() -> None:
    names = [("fox", "noto"), ("door", "noto"), ("fox", "flat")]
    chosen = Material(torch.arange(3).byte().view(3, 1, 1, 1), names).of(["fox", "owl"])
    assert chosen.names == [("fox", "noto"), ("fox", "flat")]
    assert chosen.pictures.flatten().tolist() == [0, 2]


def test_a_prompt_may_leave_the_style_open() -> None:
    assert prompt("red-apple", "noto") == "a red apple, noto style"
    assert prompt("red-apple") == "a red apple"


def test_recoloured_drawings_stay_on_white() -> None:
    torch.manual_seed(0)
    pictures = torch.rand(32, 3, 4, 4) * 2 - 1
    pictures[..., 0] = 1
    new = recoloured(pictures)
    assert (new[..., 0] == 1).all()
    assert new.min() >= -1
    assert (new != pictures).any()


# Its form.


def test_words_that_no_prompt_had_have_tokens() -> None:
    tokenizer = new_tokenizer(PROMPTS)
    (known,) = tokenizer.encode("apple", add_special_tokens=False)
    unknown = tokenizer.encode("penguin", add_special_tokens=False)
    assert tokenizer.decode([known]) == "apple"
    assert len(unknown) > 1
    assert tokenizer.unk_token_id not in unknown


def test_noise_levels_lean_to_noise() -> None:
    sigma = levels(4000, torch.Generator().manual_seed(0))
    assert sigma.min() > 0
    assert sigma.max() < 1
    assert sigma.median().item() == pytest.approx(2 / 3, abs=0.02)


def test_a_standardised_autoencoder_draws_the_same() -> None:
    torch.manual_seed(0)
    vae, pictures = new_autoencoder(), torch.rand(8, 3, 16, 16) * 2 - 1
    vae.quant_conv.bias.data.normal_()
    ready = standardised(vae, pictures)
    before, after = vae.encode(pictures).latent_dist, ready.encode(pictures).latent_dist
    assert after.mean.mean((0, 2, 3)).abs().max() < 1e-4
    assert after.mean.std((0, 2, 3)).max().item() == pytest.approx(1, abs=1e-3)
    spread = before.mean.std((0, 2, 3), keepdim=True).clamp(
        min=0.2 * before.mean.std((0, 2, 3)).max()
    )
    torch.testing.assert_close(after.std, before.std / spread)
    torch.testing.assert_close(ready.decode(after.mean).sample, vae.decode(before.mean).sample)


def test_an_untrained_autoencoder_lets_colours_through() -> None:
    torch.manual_seed(0)
    vae = new_autoencoder()
    colours = torch.eye(3)[:, :, None, None].expand(3, 3, 16, 16) * 2 - 1
    latents = vae.encode(colours).latent_dist
    assert latents.std.mean() < 0.1
    means = latents.mean[:, :3, 1:-1, 1:-1].mean((2, 3))
    assert (means.argmax(1) == torch.arange(3)).all()
    drawn = vae.decode(latents.mean).sample[..., 4:-4, 4:-4].mean((2, 3))
    assert (drawn.argmax(1) == torch.arange(3)).all()


@pytest.mark.slow
def test_a_folder_loads_without_code_of_ours(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe = untrained(new_autoencoder(), [("red-apple", "noto")] * 2)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is StableDiffusionPipeline
    loaded.set_progress_bar_config(disable=True)
    first, second = (
        p("a penguin", 2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for p in (pipe, loaded)
    )
    assert torch.equal(first, second)
    assert first.shape == (1, 3, 48, 48)


def test_the_kept_base_is_small_loads_and_tells_words_apart() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 27e6
    assert not any("_name_or_path" in p.read_text() for p in files if p.suffix == ".json")
    pipe = trained(WEIGHTS)
    pictures = pipe(
        ["a red apple, noto style", "a door, noto style"],
        4,
        generator=[torch.Generator().manual_seed(0) for _ in range(2)],
        output_type="pt",
    ).images
    red, _, blue = pictures[0, :, 16:32, 16:32].mean((1, 2))
    assert red - blue > 0.4
    assert pictures[1, 0, 16:32, 16:32].mean() < red


# Its training.


def run(folder: Path, updates: int) -> Progress:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters())
    progress = Progress(folder, {"model": model, "optimizer": optimizer}, minutes=10)
    progress.resume()
    while progress.update < updates:
        loss = (model(torch.randn(4, 3)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.step(loss.item())
    progress.save({"other": 1.0})
    return progress


def test_a_stopped_training_ends_in_the_same_weights(tmp_path: Path) -> None:
    whole, again = run(tmp_path / "whole", 6), run(tmp_path / "parts", 2)
    again = run(tmp_path / "parts", 6)
    for name, value in whole.keepers["model"].state_dict().items():
        assert torch.equal(value, again.keepers["model"].state_dict()[name])
    lines = [json.loads(line) for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [2, 6]
    assert lines[0]["other"] == 1.0


def test_the_rate_rises_stays_and_falls_to_nothing() -> None:
    plan = Plan(updates=10_000, peak=1.0, minutes=10, sheets=500)
    assert plan.rate(0) == pytest.approx(1 / 200)
    assert plan.rate(200) == plan.rate(8000) == 1
    assert plan.rate(9000) == pytest.approx(0.5)
    assert plan.rate(10_000) == 0


@pytest.mark.slow
def test_a_decoder_learns_while_the_latents_stay(tmp_path: Path) -> None:
    packages, done = tmp_path / "packages", tmp_path / "vae"
    packages.mkdir()
    names = [("fox", "noto"), ("owl", "flat")]
    pictures = torch.randint(0, 255, (2, 3, 48, 48)).byte()
    torch.save({"pictures": pictures, "names": names}, tmp_path / "drawings.pt")
    arguments = [str(packages), str(tmp_path), "--updates", "1", "--threads", "1"]
    states = []
    for more in ([], [], ["--decoder-only"]):
        autoencoder([*arguments, *more], standalone_mode=False)
        states.append(AutoencoderKL.from_pretrained(done).state_dict())
    first, again, polished = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], polished[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_words_learn_what_drawings_look_like() -> None:
    names = [("fox", "noto"), ("owl", "noto"), ("fox", "flat")]
    torch.manual_seed(0)
    pipe = untrained(new_autoencoder(), names)
    clean = torch.randn(3, 8, 4, 4)
    untaught = teach(copy.deepcopy(pipe), clean, names, 1)
    assert teach(pipe, clean, names, 60) < 0.7 * untaught


def test_taught_words_are_kept_and_stay(tmp_path: Path) -> None:
    names = [("fox", "noto"), ("owl", "flat")]
    seen = Material(torch.randint(0, 255, (2, 3, 16, 16)).byte(), names)
    states = []
    for _ in range(2):
        pipe = untrained(new_autoencoder(), names)
        before = {name: w.clone() for name, w in pipe.text_encoder.state_dict().items()}
        taught(pipe, seen, tmp_path, updates=1)
        states.append(pipe.text_encoder.state_dict())
        assert any(not torch.equal(before[name], w) for name, w in states[-1].items())
        assert not any(w.requires_grad for w in pipe.text_encoder.parameters())
    assert all(torch.equal(states[0][name], w) for name, w in states[1].items())


def test_a_drawing_is_encoded_at_several_places() -> None:
    torch.manual_seed(0)
    pipe = untrained(new_autoencoder(), [("fox", "noto")] * 2)
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    places = placed(pipe, pictures, 6)
    assert places.shape == (6, 2, 8, 4, 4)
    assert len({each.sum().item() for each in places[:, 0]}) > 1


@pytest.mark.slow
def test_a_published_base_is_small_and_can_be_trained_further(tmp_path: Path) -> None:
    torch.manual_seed(0)
    untrained(new_autoencoder(), [("fox", "noto")] * 2).save_pretrained(tmp_path / "run" / "base")
    for _ in range(2):  # an earlier one is replaced
        publish([str(tmp_path / "run"), str(tmp_path / "kept")], standalone_mode=False)
    weights = list((tmp_path / "kept").rglob("*.safetensors"))
    assert len(weights) == 3
    for path in weights:
        assert {str(tensor.dtype) for tensor in load_file(path).values()} == {"torch.float16"}
    assert not any("_name_or_path" in p.read_text() for p in (tmp_path / "kept").rglob("*.json"))
    kept = DiffusionPipeline.from_pretrained(tmp_path / "kept")
    assert {part.dtype for part in (kept.unet, kept.vae, kept.text_encoder)} == {torch.float32}
    pipe = trained(tmp_path / "kept")
    assert {w.dtype for w in pipe.unet.parameters()} == {torch.float32}
    assert all(w.requires_grad for w in pipe.unet.parameters())
    assert not any(w.requires_grad for w in pipe.text_encoder.parameters())


@pytest.mark.slow
def test_the_base_is_trained_from_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drawings.base.train._SHOWN", ["fox"])
    names = [("fox", "noto"), ("owl", "flat")]
    seen = Material(torch.randint(0, 255, (2, 3, 48, 48)).byte(), names)
    torch.manual_seed(0)
    for updates in (1, 2):
        plan = Plan(updates, 1e-3, 10, sheets=1, batch=2)
        train(untrained(new_autoencoder(), names), seen, seen, tmp_path, plan)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2]
    assert lines[0]["unseen"] > 0
    assert (tmp_path / "samples-000002.png").is_file()
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "base")) is StableDiffusionPipeline


def test_the_shipped_base_loads_in_one_dtype_and_draws() -> None:
    """Its files are float16; transformers would load a part as its configuration says."""
    pipe = DiffusionPipeline.from_pretrained(WEIGHTS)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    (picture,) = pipe("a fox, noto style", num_inference_steps=1).images
    assert picture.size == (48, 48)
