"""Layout tables, proven on the real models: nothing missing, nothing twice, nothing forgotten.

The rows' order is proven against diffusers' own converters of whole checkpoints: a checkpoint in
the authors' names, whose every row has a value of its own, must land where the table says.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils, single_file_utils
from support.layout_cells import encoder_inside, encoder_names
from support.layout_models import DENOISERS, PARTS, weights

from klora_compile.families.tables import (
    ALL,
    FURTHER,
    IN_DIFFUSERS_NAMES,
    TEXT_ENCODERS,
    WHOLE,
)
from klora_runtime.families import (
    ace_step,
    anima,
    flux1,
    hunyuan_image,
    hunyuan_video,
    hunyuan_video_15,
    krea2,
    qwen_image,
    sd1,
    sdxl,
)
from klora_runtime.families.rows import (
    Layout,
    Placement,
    Row,
    Split,
    halves,
    square_and_halves,
    square_thirds_and_rest,
    swapped_halves,
    swapped_where_two,
    thirds,
)
from klora_runtime.families.text_encoders import CLIP, T5

#: Modules that no row names, and why; then parameters that no file is known to change.
NOT_NAMED: Mapping[str, Mapping[str, str]] = {
    "t5": {"encoder.embed_tokens": "is `shared` by another name"},
}
_UNCHANGED = {
    "auraflow": r"register_tokens|pos_embed\.pos_embed",
    "z-image": r"(x|cap)_pad_token",
    "krea-2": r".*\.scale_shift_table",
    "ltx-2": r".*(scale_shift_table|learnable_registers)",
    "mochi-1": r"pos_frequencies",
}


def named(layout: Layout) -> str:
    return f"{layout.family}-{layout.component}-{layout.name}"


@dataclass(frozen=True)
class Named:
    """One module of a file, as a row and a model make it."""

    row: Row
    numbers: tuple[str, ...]
    source: str
    shape: tuple[int, ...]
    placements: tuple[Placement, ...]


def without_numbers(name: str) -> str:
    return re.sub(r"\d+|\{\}", "#", name)


@functools.cache
def expanded(layout: Layout) -> tuple[Named, ...]:
    return tuple(_expanded(layout))


def _expanded(layout: Layout) -> Iterator[Named]:
    """Every module that a file for the real model can have, each row with the numbers that exist.

    The rows of a weight in the file are as many as those of its targets together.
    """
    shapes = weights(layout.family, layout.component)
    alike: dict[str, list[str]] = {}
    for name in shapes:
        alike.setdefault(without_numbers(name), []).append(name)
    for row in layout.rows:
        found = dict.fromkeys(
            match.groups()
            for target in row.targets
            for name in alike.get(without_numbers(target), ())
            if (match := re.fullmatch(re.escape(target).replace(r"\{\}", r"(\d+)"), name))
        )
        assert found, f"{named(layout)} has no module of {row.source}"
        for numbers in found:
            targets = [shapes[target.format(*numbers)] for target in row.targets]
            assert len({shape[1:] for shape in targets}) == 1
            shape = (sum(shape[0] for shape in targets), *targets[0][1:])
            places = row.placements(numbers, shape[0], prod(shape[1:]))
            yield Named(row, numbers, row.source.format(*numbers), shape, places)


@pytest.mark.parametrize("layout", ALL, ids=named)
def test_every_row_names_modules_whose_rows_it_fills(layout: Layout) -> None:
    shapes = weights(layout.family, layout.component)
    filled: list[str] = []
    for one in expanded(layout):
        taken: list[range] = []
        for place in one.placements:
            rows = (range(one.shape[0]),) if place.rows is None else place.rows
            assert sum(map(len, rows)) == shapes[place.path][0], (one.source, place.path)
            taken += rows
            filled.append(place.path)
        taken.sort(key=lambda rows: rows.start)
        assert {rows.step for rows in taken} == {1}
        ends = [0, *(rows.stop for rows in taken)]
        assert [*(rows.start for rows in taken), one.shape[0]] == ends, one.source
    assert len(filled) == len(set(filled))


@pytest.mark.parametrize("layout", [*WHOLE, *IN_DIFFUSERS_NAMES, *TEXT_ENCODERS], ids=named)
def test_no_module_with_a_weight_is_forgotten(layout: Layout) -> None:
    """Norms too: trainers write differences of norms."""
    filled = {place.path for one in expanded(layout) for place in one.placements}
    unchanged = re.compile(_UNCHANGED.get(layout.family, "(?!)"))
    left = {
        name
        for name in set(weights(layout.family, layout.component)) - filled
        if not unchanged.fullmatch(name)
    }
    assert left == set(NOT_NAMED.get(layout.family, ()))


@pytest.mark.parametrize("layout", ALL, ids=named)
def test_every_name_is_found_in_both_spellings(layout: Layout) -> None:
    """By its own row, so that no row hides another one."""
    for one in expanded(layout):
        assert layout.match(one.source, flat=False) == (one.row, one.numbers)
        assert layout.match(one.source.replace(".", "_"), flat=True) == (one.row, one.numbers)


def test_no_two_layouts_of_one_component_and_family_have_one_name() -> None:
    assert len({named(layout) for layout in ALL}) == len(ALL)
    assert {layout.family for layout in (*WHOLE, *FURTHER)} == set(DENOISERS)


class Checkpoint(dict[str, torch.Tensor]):
    """A checkpoint for a converter that also wants parameters which no LoRA has."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, *default or (torch.zeros(6, 1),))


def checkpoint(modules: list[Named], prefix: str = "") -> Checkpoint:
    """Every row of every module with a value of its own, in float64."""
    values, start = Checkpoint(), 0
    for one in modules:
        value = torch.arange(start, start + one.shape[0], dtype=torch.float64)[:, None]
        start += one.shape[0]
        for ending in ("",) if one.row.is_parameter else (".weight", ".bias", ".scale"):
            values[f"{prefix}{one.source}{ending}"] = value
    return values


def rows_of(value: torch.Tensor, place: Placement) -> torch.Tensor:
    """The rows of a file's weight that one place takes."""
    if place.rows is None:
        return value
    return torch.cat([value[rows.start : rows.stop] for rows in place.rows])


Convert = Callable[[Checkpoint], Mapping[str, torch.Tensor]]


def unet_converter(values: Checkpoint) -> Mapping[str, torch.Tensor]:
    config = {"layers_per_block": 2, "addition_embed_type": "text_time"}
    if f"{single_file_utils.LDM_UNET_KEY}label_emb.0.0.weight" not in values:
        del config["addition_embed_type"]
    return single_file_utils.convert_ldm_unet_checkpoint(values, config)


def ltx2_converter(values: Checkpoint) -> Mapping[str, torch.Tensor]:
    """The one of LoRAs, which knows LTX-2.3 too."""
    found = lora_conversion_utils._convert_non_diffusers_ltx2_lora_to_diffusers(
        {f"diffusion_model.{key}": value for key, value in values.items()}
    )
    return {key.removeprefix("transformer."): value for key, value in found.items()}


def ideogram4_converter(values: Checkpoint) -> Mapping[str, torch.Tensor]:
    """The one of LoRAs, which knows the linear layers of the blocks; the rest has no other name."""
    linear = {key for key in values if key.startswith("layers.") and "norm" not in key}
    found = lora_conversion_utils._convert_non_diffusers_ideogram4_lora_to_diffusers(
        {
            key.replace(".weight", f".lora_{part}.weight"): value if part == "B" else value[:1]
            for key, value in values.items()
            for part in "AB"
            if key in linear and key.endswith(".weight")
        }
    )
    rest = {key: value for key, value in values.items() if key not in linear}
    return rest | {
        key.removeprefix("transformer.").replace(".lora_B", ""): value
        for key, value in found.items()
    }


def flux3_converter(values: Checkpoint) -> Mapping[str, torch.Tensor]:
    """Which knows the norms of queries and keys by `scale` alone."""
    own = {k: v for k, v in values.items() if k.endswith(".scale") == (".norm." in k)}
    return single_file_utils.convert_flux3_transformer_checkpoint_to_diffusers(own)


def minimax_h3_converter(values: Checkpoint) -> Mapping[str, torch.Tensor]:
    own = {key: value for key, value in values.items() if key.endswith(".weight")}
    return single_file_utils.convert_minimax_h3_transformer_checkpoint_to_diffusers(own, {})


CONVERTERS: Mapping[str, Convert] = {
    **dict.fromkeys(("sd1", "sd2", "sdxl", "sdxl-refiner"), unet_converter),
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux.1": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "chroma": single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers,
    "flux.2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
    "z-image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
    "hunyuan-video": single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
    "ltx": single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers,
    "lumina2": single_file_utils.convert_lumina2_to_diffusers,
    "anima": single_file_utils.convert_cosmos_transformer_checkpoint_to_diffusers,
    "krea-2": single_file_utils.convert_krea2_transformer_checkpoint_to_diffusers,
    "ltx-2": ltx2_converter,
    "wan-vace": single_file_utils.convert_wan_transformer_to_diffusers,
    "qwen-image-2.1": single_file_utils.convert_qwen_image21_transformer_checkpoint_to_diffusers,
    "sana": single_file_utils.convert_sana_transformer_to_diffusers,
    "mochi-1": single_file_utils.convert_mochi_transformer_checkpoint_to_diffusers,
    "ideogram-4": ideogram4_converter,
    "auraflow": single_file_utils.convert_auraflow_transformer_checkpoint_to_diffusers,
    "flux.3": flux3_converter,
    "minimax-h3": minimax_h3_converter,
    "cosmos-predict": single_file_utils.convert_cosmos_transformer_checkpoint_to_diffusers,
}


#: Names that no code of the installed diffusers converts: a script of its repository does.
NOT_CONVERTED = (hunyuan_video_15.ORIGINAL, hunyuan_image.ORIGINAL, ace_step.ORIGINAL)


def is_converted(layout: Layout) -> bool:
    """Whether diffusers has code that converts these names."""
    return (
        layout.name != "diffusers"
        and layout.component not in PARTS
        and layout not in (hunyuan_video.COMFY, *NOT_CONVERTED)
    )


@pytest.mark.parametrize("layout", filter(is_converted, WHOLE), ids=named)
def test_a_whole_checkpoint_goes_where_diffusers_puts_it(layout: Layout) -> None:
    modules = list(expanded(layout))
    prefix = single_file_utils.LDM_UNET_KEY if layout.component == "unet" else ""
    values = checkpoint(modules, prefix)
    converted = CONVERTERS[layout.family](Checkpoint(values))
    for one in modules:
        ending = "" if one.row.is_parameter else ".weight"
        value = values[f"{prefix}{one.source}{ending}"]
        for place in one.placements:
            assert torch.equal(converted[f"{place.path}{ending}"], rows_of(value, place)), (
                one.source
            )


def test_comfys_names_of_hunyuan_video_mean_what_its_authors_do() -> None:
    """Of one model, row by row, though no converter of diffusers takes them."""
    own, comfy = (
        sorted((row.targets, str(row.split)) for row in layout.rows)
        for layout in (hunyuan_video.ORIGINAL, hunyuan_video.COMFY)
    )
    assert comfy == own


def test_an_xlabs_lora_goes_where_diffusers_puts_it() -> None:
    modules = [one for one in expanded(flux1.XLABS) if one.numbers == ("0",)]
    assert len(modules) == len(flux1.XLABS.rows)
    values = checkpoint(modules)
    converted = lora_conversion_utils._convert_xlabs_flux_lora_to_diffusers(
        {f"{one.source}.up.weight": values[f"{one.source}.weight"] for one in modules}
        | {f"{one.source}.down.weight": torch.zeros(1, one.shape[1]) for one in modules}
    )
    for one in modules:
        for place in one.placements:
            up = converted[f"transformer.{place.module}.lora_B.weight"]
            assert torch.equal(up, rows_of(values[f"{one.source}.weight"], place)), one.source


FORMATS = (
    Path(os.environ.get("KLORA_SHARED_DATA", Path(__file__).parents[3] / "shared/data")) / "formats"
)
ONE_KEY = re.compile(
    r"(?P<stem>.+?)\.(?:(?:lora_)?(?P<part>A|B|down|up)\.(?P<parameter>weight|bias)"
    r"|alpha|scale|dora_scale|lokr_w[12])"
)
BFL_PEFT = {"diffusion_model.": (flux1.BFL, False)}
FLUX_DIFFUSERS = flux1.BFL.in_diffusers_names()

#: Name of a key list -> prefix -> layout, and whether underscores stand for dots.
FILES: Mapping[str, Mapping[str, tuple[Layout, bool]]] = {
    "anima_lora_kohya_format": {"lora_unet_": (anima.COSMOS, True)},
    "anima_lora_lokr_format": {"diffusion_model.": (anima.COSMOS, False)},
    "anima_lora_peft_format": {"diffusion_model.": (anima.COSMOS, False)},
    "flux_control_lora_format": {"": (flux1.BFL, False)},
    "flux_dora_onetrainer_format": {
        "lora_transformer_": (FLUX_DIFFUSERS, True),
        "lora_te1_": (encoder_inside(CLIP), True),
        "lora_te2_": (encoder_names(T5, "text_encoder_2"), True),
    },
    "flux_lokr_bfl_format": BFL_PEFT,
    "flux_lora_aitoolkit_format": BFL_PEFT,
    "flux_lora_diffusers_base_model_format": {"base_model.model.": (FLUX_DIFFUSERS, False)},
    "flux_lora_diffusers_format": {"transformer.": (FLUX_DIFFUSERS, False)},
    "flux_lora_diffusers_with_norm_out_format": {"transformer.": (FLUX_DIFFUSERS, False)},
    "flux_lora_kohya_format": {"lora_unet_": (flux1.BFL, True)},
    "flux_lora_xlabs_format": {"": (flux1.XLABS, False)},
    "flux_slider_safetensors": {"transformer.": (FLUX_DIFFUSERS, False)},
    "krea2_lora_kohya_format": {"lora_unet_": (krea2.ORIGINAL, True)},
    "qwen_image_lora_diffusers_format": {"": (qwen_image.DIFFUSERS, False)},
    "sdxl_lora_kohya_te1_te2_alien_style": {
        "lora_unet_": (sdxl.LDM, True),
        "lora_te1_": (encoder_inside(CLIP), True),
        "lora_te2_": (encoder_inside(CLIP, "text_encoder_2"), True),
    },
}
#: (file, module path) -> shape that is not the model's: a control LoRA's, which sees the picture
#: and its depths; and Anima's lists are samples, in which most layers are made 2048 wide.
OTHER_SHAPES: Mapping[tuple[str, str], tuple[int, int]] = {
    ("flux_control_lora_format", "img_in"): (3072, 128),
    ("anima_lora_kohya_format", "blocks_0_adaln_modulation_cross_attn_1"): (2048, 2048),
    ("anima_lora_kohya_format", "blocks_0_cross_attn_k_proj"): (2048, 2048),
    ("anima_lora_kohya_format", "blocks_0_cross_attn_v_proj"): (2048, 2048),
    ("anima_lora_peft_format", "blocks.0.cross_attn.k_proj"): (2048, 2048),
    ("anima_lora_peft_format", "blocks.0.cross_attn.v_proj"): (2048, 2048),
}


@pytest.mark.parametrize("name", FILES)
def test_real_key_lists_fit_a_layout_and_the_model(name: str) -> None:
    """Names and, of LoRA pairs, shapes. The two lists of LoKr keys have shapes of no real layer."""
    path = FORMATS / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path.name} of the shared data is absent")
    found: dict[tuple[str, str], dict[str, list[int]]] = {}
    for key, shape in json.loads(path.read_text()).items():
        prefix = next(p for p in FILES[name] if key.startswith(p))
        taken = ONE_KEY.fullmatch(key.removeprefix(prefix))
        assert taken is not None, key
        parts = found.setdefault((prefix, taken["stem"]), {})
        if taken["parameter"] == "weight":
            parts["down" if taken["part"] in ("A", "down") else "up"] = shape
    for (prefix, stem), parts in found.items():
        layout, flat = FILES[name][prefix]
        match = layout.match(stem, flat=flat)
        assert match is not None, stem
        model = weights(layout.family, layout.component)
        row, numbers = match
        if not parts:
            assert all(target.format(*numbers) in model for target in row.targets)
            continue
        (out, _), (_, inner) = parts["up"][:2], parts["down"][:2]
        for place in row.placements(numbers, out, inner):
            rows = out if place.rows is None else sum(map(len, place.rows))
            shape = OTHER_SHAPES.get((name, stem), model[place.module][:2])
            assert (rows, inner) == shape, (stem, place.module)


def test_every_key_list_is_read() -> None:
    if not FORMATS.is_dir():
        pytest.skip("the shared data is absent")
    assert {path.stem for path in FORMATS.glob("*.json")} - {"index"} == set(FILES)


def test_names_of_sd1_and_sdxl_mean_the_same_where_both_have_them() -> None:
    targets = {row.source: row.targets for row in sdxl.LDM.rows}
    common = [row for row in sd1.LDM.rows if row.source in targets]
    assert len(common) > 200
    assert all(targets[row.source] == row.targets for row in common)


@pytest.mark.parametrize(
    ("layout", "stem", "flat"),
    [
        (sdxl.LDM, "input_blocks_4_1_transformer_blocks_2_attn1_to_q", True),
        (sdxl.LDM, "input_blocks.1.1.proj_in", False),
        (sd1.LDM, "input_blocks.4.1.transformer_blocks.1.attn1.to_q", False),
        (sd1.LDM, "input_blocks_04_1_proj_in", True),
        (sd1.LDM, "input_blocks.4.1.proj_in", True),
        (sd1.LDM, "input_blocks_4_1_proj_in", False),
        (flux1.BFL, "double_blocks.0.img_mlp.1", False),
        (flux1.BFL, "double_blocks.0.img_mlp.0.0", False),
        (flux1.BFL, "double_blocks.{}.img_mlp.0", False),
        (flux1.BFL, "double_blocks.٣.img_mlp.0", False),
        (flux1.BFL, "double_blocks.0.img_mlp.0\n", False),
        (flux1.BFL, "single_blocks_0_linear3", True),
        (flux1.BFL, "", False),
    ],
)
def test_what_no_row_says_is_no_module(layout: Layout, stem: str, flat: bool) -> None:
    assert layout.match(stem, flat=flat) is None


@pytest.mark.parametrize(
    ("split", "out", "inner", "rows"),
    [
        (thirds, 6, 9, [[0, 1], [2, 3], [4, 5]]),
        (halves, 4, 9, [[0, 1], [2, 3]]),
        (square_thirds_and_rest, 5, 1, [[0], [1], [2], [3, 4]]),
        (square_and_halves, 8, 4, [[0, 1, 2, 3], [4, 5], [6, 7]]),
        (swapped_halves, 4, 9, [[2, 3, 0, 1]]),
        (swapped_where_two, 4, 2, [[2, 3, 0, 1]]),
        (swapped_where_two, 12, 2, [list(range(12))]),
    ],
)
def test_a_split_shares_rows_out(split: Split, out: int, inner: int, rows: list[list[int]]) -> None:
    assert [[*chain(*share)] for share in split(out, inner)] == rows


@pytest.mark.parametrize(
    ("split", "out", "inner", "message"),
    [
        (thirds, 7, 9, "7 rows are not three equal parts"),
        (halves, 7, 9, "7 rows are not two equal parts"),
        (square_thirds_and_rest, 6, 2, "6 rows are not three times 2 and a rest"),
        (square_and_halves, 4, 4, "4 rows are not 4 and two equal parts"),
        (square_and_halves, 7, 4, "7 rows are not 4 and two equal parts"),
        (swapped_halves, 7, 9, "7 rows are not two equal parts"),
    ],
)
def test_rows_that_cannot_be_shared_out_are_refused(
    split: Split, out: int, inner: int, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        split(out, inner)
    assert str(error.value) == message
