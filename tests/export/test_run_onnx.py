"""The example shipped in the folder: what it answers is what torch answers."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from exports import answer_of, cut_model, tiny_samples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import FACTORIES
from tiny_processors import tiny_processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.data.images import decode_image
from slimvlm.compress.data.samples import open_image
from slimvlm.compress.models.families import find_family
from slimvlm.export import ExportOptions
from slimvlm.export.checks.reference import generated_sample
from slimvlm.export.client import run_onnx
from slimvlm.export.client.preprocessing import check_recipe, make_recipe, one_tile, single_batches
from slimvlm.export.job import export_model

FAMILIES = tuple(name for name in FACTORIES if name not in ("clip", "siglip"))


def test_the_example_is_short_and_needs_three_packages_and_a_runtime() -> None:
    lines = Path(run_onnx.__file__).read_text().splitlines()
    assert len(lines) <= 136
    imports = {line.split()[1].split(".")[0] for line in map(str.strip, lines) if line.startswith(("import ", "from "))}
    needed = imports - {"argparse", "json", "sys", "pathlib"} - {"onnxruntime", "openvino"}  # one of these two
    assert needed == {"numpy", "PIL", "tokenizers"}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_example_gives_the_answer_of_torch(exported, name):
    result = exported(name)
    assert "why_not" not in result.manifest.run
    model = run_onnx.Model(result.out)
    sample = generated_sample(4, seed=0)  # the one that is stored
    found = model.answer(open_image(sample), sample.turns[0].prompt, 6)
    assert found == answer_of(result, name)


def test_positions_of_an_image_count_rows_and_columns_apart():
    ids = np.array([[5, 9, 9, 9, 9, 9, 9, 7, 7]])
    generation = {"positions": "mrope", "merge": 2, "image_token": 9}
    place = run_onnx.positions(ids, generation, [1, 4, 6])
    assert place[:, 0].tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5],
    ]


@given(st.integers(8, 400), st.integers(8, 400), st.integers(1, 12))
def test_the_grid_of_tiles_is_the_processors(height, width, most):
    counts = range(1, most + 1)
    grids = sorted(([rows, columns] for columns in counts for rows in counts if rows * columns <= most), key=math.prod)
    columns, rows = get_optimal_tiled_canvas((height, width), (16, 16), 1, most)
    views = run_onnx.tiled(Image.new("RGB", (width, height)), {"tile": [16, 16], "grids": grids})
    assert views[0]["size"] == [rows * 16, columns * 16]
    assert len(views) == rows * columns + (rows * columns > 1)


@pytest.mark.parametrize("size", ((16, 16), (40, 100), (90, 30)))
def test_an_image_of_any_shape_is_cut_into_the_tiles_of_its_processor(exported, size):
    """InternVL: another number of tiles, and of tokens for them, for every shape."""
    recipe = exported("internvl").manifest.run
    collator = cut_model("internvl")[1]
    sample = tiny_samples(1, size)[0]
    check_recipe(collator, recipe, [sample], single_batches(collator, [sample]))


def test_where_the_example_would_not_do_what_the_processor_does_it_says_so(tmp_path):
    model, _ = cut_model("llava")
    processor = tiny_processor("llava")
    processor.chat_template = processor.chat_template.replace("part['text']", "part['text'] | upper")
    collator = Collator(processor, find_family(model.config), model.config)
    options = ExportOptions(exporter="torchscript", samples=2, max_new_tokens=4)
    result = export_model(model, collator, tmp_path / "export", options, lambda *_: None, {"family": "llava"})
    assert "does not hold the question as it is" in result.manifest.run["why_not"]
    assert not (result.out / "run_onnx.py").exists()


@pytest.mark.parametrize("size", ((16, 16), (96, 128), (37, 91), (100, 31)))
@pytest.mark.parametrize("longest", (24, 32))
def test_an_image_of_odd_size_is_prepared_as_by_its_processor(size, longest):
    """Idefics3 and SmolVLM bring an image to its longest side first, and from there to one square."""
    collator = cut_model("smolvlm")[1]
    images = collator.processor.image_processor
    images.do_image_splitting, images.size = True, {"longest_edge": longest}
    samples = tiny_samples(2, size)
    with one_tile(collator) as plain:
        alone = single_batches(plain, samples)
        recipe = make_recipe(plain, samples[0], alone[0], None)
        check_recipe(plain, recipe, samples, alone)
    assert recipe["image"]["longest_edge"] == longest


def test_an_image_cut_into_tiles_runs_as_in_torch_and_the_example_shows_the_whole_image(tmp_path):
    model, collator = cut_model("smolvlm")
    images = collator.processor.image_processor
    images.do_image_splitting, images.size = True, {"longest_edge": 32}
    options = ExportOptions(exporter="torchscript", samples=4, max_new_tokens=4)
    result = export_model(model, collator, tmp_path / "export", options, lambda *_: None, {"family": "smolvlm"})
    assert result.manifest.checks[0]["equal"] == 4
    tiles = {difference["shapes"]["pixel_values"][1] for difference in result.manifest.artifacts[0].parity}
    assert max(tiles) > 1
    assert "whole image only" in result.manifest.run["note"]
    assert run_onnx.Model(result.out).answer(open_image(generated_sample(0, seed=0)), "What is it?", 4)
    assert images.do_image_splitting


@pytest.mark.parametrize("kind", ["16-bit grey", "float grey", "turned"])
def test_the_example_sees_an_image_as_the_command_does(exported, kind):
    """Deep grey keeps its brightness, and an image lies as its EXIF record says."""
    ramp = np.linspace(0, 1, 320).reshape(16, 20)
    options = {}
    if kind == "turned":
        image, options["exif"] = Image.fromarray((ramp * 255).astype(np.uint8)), Image.Exif()
        options["exif"][0x0112] = 6
    else:
        values = (ramp * 65535).astype(np.uint16) if kind == "16-bit grey" else ramp.astype(np.float32)
        image = Image.fromarray(values)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", **options)
    spec = exported("llava").manifest.run["image"]
    seen = run_onnx.pixels(Image.open(buffer), spec)
    assert np.abs(seen - run_onnx.pixels(decode_image(buffer.getvalue()), spec)).max() < 0.02
    assert np.ptp(seen) > 1
