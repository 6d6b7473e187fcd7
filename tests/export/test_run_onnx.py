"""The example shipped in the folder: what it answers is what torch answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from exports import answer_of, cut_model
from tiny_models import FACTORIES

from slimvlm.compress.samples import open_image
from slimvlm.export import ExportOptions, run_onnx
from slimvlm.export.job import export_model
from slimvlm.export.reference import generated_sample

FAMILIES = tuple(name for name in FACTORIES if name not in ("clip", "siglip", "internvl"))


def test_the_example_is_short_and_needs_four_packages() -> None:
    text = Path(run_onnx.__file__).read_text()
    assert text.count("\n") <= 120
    imports = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imports - {"argparse", "json", "sys", "pathlib"} == {"numpy", "onnxruntime", "PIL", "tokenizers"}


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


def test_where_the_example_would_not_do_what_the_processor_does_it_says_so(exported):
    result = exported("internvl")
    assert "tiles" in result.manifest.run["why_not"]
    assert not (result.out / "run_onnx.py").exists()


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
