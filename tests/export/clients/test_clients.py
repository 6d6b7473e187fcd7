"""transformers.js, onnxruntime-genai and a Python without torch on exported folders."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from client_programs import PYTHON
from exports import answer_of, export_tiny
from windowed import WINDOW, export_windowed, long_samples, windowed_model

from slimvlm.compress.data.samples import load_samples, open_image
from slimvlm.compress.models.families import FAMILIES
from slimvlm.demo import SAMPLES
from slimvlm.export.checks.answers import torch_answers
from slimvlm.export.checks.reference import generated_sample
from slimvlm.export.checks.sample import read_sample
from slimvlm.export.job import ExportResult
from slimvlm.export.running.generation import generate
from slimvlm.export.running.names import VISION
from slimvlm.export.running.runners import SessionRunner
from slimvlm.export.variants import FULL, VARIANTS

JS_TENSORS = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask", "image_grid_thw")
GENAI_TENSORS = ("input_ids", "pixel_values", "image_grid_thw")
JS_FAMILIES = ("llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "paligemma")


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


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != FULL])
def test_transformers_js_runs_every_variant_by_its_name(demo, tmp_path, variant):
    given = read_sample(demo.out)[0]
    request = {"max_new_tokens": 8, "dtype": variant, "tensors": tensors_of(given)}
    assert in_node(demo.out, request, tmp_path) == own_tokens(demo, variant, given, 8)


def own_tokens(result: ExportResult, variant: str, given: dict, most: int) -> list[list[int]]:
    """What our loop generates from a variant."""
    files = {
        artifact.graph: result.out / artifact.file
        for artifact in result.manifest.artifacts
        if artifact.variant == variant
    }
    prompting = result.manifest.generation
    tokens = generate(SessionRunner(files), prompting, given, most).tokens
    return [ended(row, prompting.end) for row in tokens.tolist()]


GENAI_FAMILIES = [family.name for family in FAMILIES if family.export.genai]


def in_genai(result: ExportResult, given: dict, most: int, scratch: Path) -> list[int]:
    """New tokens by onnxruntime-genai, of the variant that its config names; pixels in the type of its graph."""
    vision = next(artifact for artifact in result.manifest.artifacts if artifact.graph == VISION)
    pixels = given["pixel_values"].astype(vision.inputs[0].dtype)
    tensors = [one for one in tensors_of({**given, "pixel_values": pixels}) if one["name"] in GENAI_TENSORS]
    images = int((given["input_ids"] == result.manifest.generation.image_token).sum())
    tensors.append({"name": "num_image_tokens", "type": "int64", "dims": [1], "data": [images]})
    request = {"max_new_tokens": most, "max_length": 96, "tensors": tensors}
    (scratch / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("client_genai.py")
    command = [str(PYTHON), str(script), str(result.out), str(scratch / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)[0]


@pytest.mark.parametrize("name", GENAI_FAMILIES)
def test_onnxruntime_genai_generates_the_tokens_of_torch(exported, tmp_path, name):
    result = exported(name)
    given, expected = read_sample(result.out)
    prompting, wanted = result.manifest.generation, expected["tokens"][0].tolist()
    found = in_genai(result, given, len(wanted), tmp_path)
    assert ended(found, prompting.end) == ended(wanted, prompting.end)


@pytest.mark.parametrize("name", GENAI_FAMILIES)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != FULL])
def test_onnxruntime_genai_runs_the_variant_that_its_config_names(tmp_path, name, variant):
    result = export_tiny(name, tmp_path / "export", variants=(variant,))
    given, prompting = read_sample(result.out)[0], result.manifest.generation
    found = in_genai(result, given, 6, tmp_path)
    assert [ended(found, prompting.end)] == own_tokens(result, variant, given, 6)


def beyond_a_window(kind: str, folder: Path) -> tuple[ExportResult, dict, list[int]]:
    """The export of a model with windows, a prompt two times as long as they are, and torch's answer."""
    model, collator = windowed_model(kind)
    result = export_windowed(model, collator, folder)
    prompts = collator.prompts(long_samples(collator, 2 * WINDOW + 3, 1))
    given = {name: tensor.numpy() for name, tensor in prompts.items()}
    return result, given, torch_answers(model, collator, given, result.manifest.generation, 6).tokens[0].tolist()


@pytest.mark.parametrize("kind", ("llava, mistral", "gemma3", "qwen2_vl"))
def test_transformers_js_answers_beyond_a_window_as_torch(tmp_path, kind):
    result, given, expected = beyond_a_window(kind, tmp_path / "export")
    request = {"max_new_tokens": 6, "tensors": tensors_of(given)}
    end = result.manifest.generation.end
    assert [ended(row, end) for row in in_node(result.out, request, tmp_path)] == [ended(expected, end)]


def test_onnxruntime_genai_answers_beyond_a_window_as_torch(tmp_path):
    result, given, expected = beyond_a_window("qwen2_5_vl", tmp_path / "export")
    prompting = result.manifest.generation
    found = in_genai(result, given, 6, tmp_path)
    assert ended(found, prompting.end) == ended(expected, prompting.end)


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
