"""Programs of others on the exported folders: `make clients` installs them and says where in SLIMVLM_CLIENTS."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from exports import answer_of
from plans import random_plan

from slimvlm.compress.data.samples import load_samples, open_image
from slimvlm.compress.models.checkpoint import load_model
from slimvlm.compress.models.families import FAMILIES
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.export import ExportOptions, export_checkpoint
from slimvlm.export.checks.reference import generated_sample
from slimvlm.export.checks.sample import read_sample
from slimvlm.export.running.generation import generate
from slimvlm.export.running.runners import SessionRunner

CLIENTS = os.environ.get("SLIMVLM_CLIENTS", "")
JS_TENSORS = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask", "image_grid_thw")
PYTHON = Path(CLIENTS) / "venv" / "bin" / "python"
GENAI_TENSORS = ("input_ids", "pixel_values", "image_grid_thw")
GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
JS_FAMILIES = ("llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "paligemma")

pytestmark = pytest.mark.skipif(not CLIENTS, reason="make clients installs transformers.js and a Python without torch")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo model, cut to another number of KV heads and channels in every layer, as an export with int8."""
    folder = tmp_path_factory.mktemp("demo")
    loaded = load_model(MODEL)
    plan = random_plan(loaded.model, seed=3)
    save_checkpoint(folder / "model", apply_plan(loaded.model, plan), loaded.processor, plan)
    options = ExportOptions(data=SAMPLES / "val.jsonl", exporter="torchscript", quantize="int8", max_new_tokens=8)
    return export_checkpoint(folder / "model", folder / "export", options)


def in_node(folder: Path, request: dict, scratch: Path) -> list[list[int]]:
    """New tokens by transformers.js."""
    (scratch / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("client.mjs")
    command = ["node", str(script), str(folder.parent), folder.name, str(scratch / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def tensors_of(given: dict) -> list[dict]:
    found = []
    for name in JS_TENSORS:
        if name in given:
            array = given[name]
            kind = "bool" if name == "pixel_attention_mask" else str(array.dtype)
            found.append({"name": name, "type": kind, "dims": list(array.shape), "data": array.ravel().tolist()})
    return found


def ended(row: list[int], end: list[int]) -> list[int]:
    at = next((index for index, token in enumerate(row) if token in end), len(row))
    return row[: at + 1]


@pytest.mark.parametrize("name", JS_FAMILIES)
def test_transformers_js_generates_the_tokens_of_torch(exported, tmp_path, name):
    result = exported(name)
    given, expected = read_sample(result.out)
    request = {"max_new_tokens": expected["tokens"].shape[1], "tensors": tensors_of(given)}
    end = result.manifest.generation.end
    assert [ended(row, end) for row in in_node(result.out, request, tmp_path)] == [
        ended(row, end) for row in expected["tokens"].tolist()
    ]


def test_transformers_js_reads_image_and_prompt_of_the_pruned_demo_by_itself(demo, tmp_path):
    """Its own tokenizer and image processor, from the files of the folder."""
    expected = read_sample(demo.out)[1]
    recipe = demo.manifest.run["prompt"]
    samples = load_samples(SAMPLES / "val.jsonl", limit=16, seed=0).samples
    open_image(samples[-1]).save(tmp_path / "image.png")
    text = recipe["text"].replace("{question}", samples[-1].turns[0].prompt)
    request = {"max_new_tokens": 8, "image": str(tmp_path / "image.png"), "text": text}
    end = demo.manifest.generation.end
    assert [ended(row, end) for row in in_node(demo.out, request, tmp_path)] == [
        ended(row, end) for row in expected["tokens"].tolist()
    ]


def test_transformers_js_runs_the_int8_variant(demo, tmp_path):
    given, expected = read_sample(demo.out)
    runner = SessionRunner({graph: demo.out / "onnx" / f"{graph}_int8.onnx" for graph in GRAPHS})
    prompting = demo.manifest.generation
    own = generate(runner, prompting, given, 8).tokens.tolist()
    request = {"max_new_tokens": 8, "dtype": "int8", "tensors": tensors_of(given)}
    found = in_node(demo.out, request, tmp_path)
    assert [ended(row, prompting.end) for row in found] == [ended(row, prompting.end) for row in own]
    assert expected["tokens"].shape[0] == len(found)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.export.genai])
def test_onnxruntime_genai_generates_the_tokens_of_torch(exported, tmp_path, name):
    result = exported(name)
    given, expected = read_sample(result.out)
    tensors = [tensor for tensor in tensors_of(given) if tensor["name"] in GENAI_TENSORS]
    images = int((given["input_ids"] == result.manifest.generation.image_token).sum())
    tensors.append({"name": "num_image_tokens", "dims": [1], "data": [images]})
    request = {"max_new_tokens": expected["tokens"].shape[1], "max_length": 64, "tensors": tensors}
    (tmp_path / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("client_genai.py")
    command = [str(PYTHON), str(script), str(result.out), str(tmp_path / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    end = result.manifest.generation.end
    assert ended(json.loads(done.stdout)[0], end) == ended(expected["tokens"][0].tolist(), end)


@pytest.mark.parametrize("name", ("llava", "qwen2_vl", "paligemma", "internvl", "blip2_t5"))
def test_the_example_answers_where_there_is_no_torch(exported, tmp_path, name):
    result = exported(name)
    image = tmp_path / "image.png"
    sample = generated_sample(4, seed=0)  # the one that is stored
    open_image(sample).save(image)
    command = [
        str(PYTHON),
        str(result.out / "run_onnx.py"),
        str(image),
        sample.turns[0].prompt,
        "--max-new-tokens",
        "6",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    absent = subprocess.run([str(PYTHON), "-c", "import torch"], capture_output=True, check=False)
    assert absent.returncode != 0
    assert done.stdout.strip() == answer_of(result, name)
