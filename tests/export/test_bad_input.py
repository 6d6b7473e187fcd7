"""What cannot be exported is refused in one sentence, before anything is written."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from exports import cut_model, export_tiny
from safetensors.numpy import load_file, save_file
from tiny_models import FACTORIES, IMAGE_TOKEN, TEXT, VISION, tiny_model
from tiny_processors import tiny_processor

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.errors import (
    CheckFailedError,
    CheckpointError,
    OutputError,
    SlimvlmError,
    UnsuitableOptionError,
    UnsupportedModelError,
)
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.export import ExportOptions, export_checkpoint, verify
from slimvlm.export.checks.parity import TokenCheck
from slimvlm.export.checks.reference import image_size
from slimvlm.export.graphs.windows import refuse_unknown_windows
from slimvlm.export.job import export_model, refuse_occupied
from slimvlm.export.running.manifest import Manifest
from slimvlm.export.variants import VARIANTS


def test_an_export_that_the_disk_has_no_room_for_is_refused_before_a_weight_is_read(tmp_path):
    config = tiny_model("llava").model.config
    config.text_config.vocab_size = 2**36
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(OutputError, match=r"would take about .* of space are free there; make room") as refused:
        export_checkpoint(tmp_path / "model", tmp_path / "out", ExportOptions(variants=("fp32", "q4")))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "options, words",
    (
        ({"formats": ("tflite",)}, "the format tflite is unknown; choose from onnx, torchscript, pt2"),
        ({"formats": ()}, "the format nothing"),
        ({"opset": 12}, "--opset 12 is not supported; choose 18 to 23"),
        ({"dtype": "int4"}, "--dtype int4 is unknown"),
        ({"variants": ("q5",)}, "--variants q5 is unknown; choose from fp32, fp16, int8"),
        ({"variants": ("q4",), "quantize": "int8"}, "leave --dtype and --quantize out"),
        ({"variants": ("q4",), "formats": ("onnx", "torchscript")}, "graphs of torch are fp32 or fp16"),
        ({"variants": ("fp32", "q4"), "formats": ("pt2",)}, "add onnx to --format"),
        ({"quantize": "int8", "formats": ("torchscript",)}, "add onnx to --format"),
        ({"aoti": True}, "add pt2 to --format"),
        ({"samples": 0}, "always checked"),
        ({"seed": -1}, "--seed must be 0 or more"),
        ({"image_size": (0, 32)}, "sides of --image-size 1 or more"),
    ),
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, words):
    with pytest.raises(UnsuitableOptionError, match=words) as caught:
        export_checkpoint(tmp_path / "no", tmp_path / "out", ExportOptions(**options))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_options_are_known_without_torch():
    code = "import sys, slimvlm.export; slimvlm.export.ExportOptions(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_export_is_verified_without_torch(exported):
    out = exported("llava").out
    code = f"import sys, slimvlm.export; slimvlm.export.verify({str(out)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "name, size, words",
    (
        ("qwen2_vl", (30, 32), "30x32: this tower takes multiples of 8; use 32x32"),
        ("llava", (32, 32), "32x32: this tower takes 16x16 only"),
    ),
)
def test_an_image_size_that_the_tower_cannot_take_is_refused(name, size, words):
    model, collator = cut_model(name)
    with pytest.raises(UnsuitableOptionError, match=words):
        image_size(collator, model.config, ExportOptions(image_size=size))


@pytest.mark.parametrize("name", ("llava", "blip2_opt"))
def test_more_new_tokens_than_the_model_has_places_for_are_refused(tmp_path, name):
    with pytest.raises(UnsuitableOptionError, match="--max-new-tokens 300: after a prompt of .* takes at most"):
        export_tiny(name, tmp_path / "export", max_new_tokens=300)
    assert list(tmp_path.iterdir()) == []


def test_a_family_nobody_knows_is_refused_by_name(tmp_path):
    config = tf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
    tf.BertModel(config).save_pretrained(tmp_path / "m")
    with pytest.raises(UnsupportedModelError, match="'bert' is not supported"):
        export_checkpoint(tmp_path / "m", tmp_path / "out", ExportOptions())


UNKNOWN = {
    "a field that only its code reads": (tf.LlamaConfig, {"attention_chunk_size": 8}, "attention_chunk_size is 8"),
    "a window that its class does not read": (tf.LlamaConfig, {"sliding_window": 8}, "sliding_window is 8"),
    "layers that its class does not tell apart": (
        tf.LlamaConfig,
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
        "layer_types is 'sliding_attention'",
    ),
    "another kind of layer": (tf.Qwen2Config, {"layer_types": ["linear_attention"] * 2}, "layer_types is 'linear_"),
    "a window of no size": (tf.Qwen2Config, {"layer_types": ["sliding_attention"] * 2}, "sliding_window is None"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_limit_of_attention_that_nobody_knows_is_refused(kind):
    make, fields, words = UNKNOWN[kind]
    with pytest.raises(UnsupportedModelError, match=f"text_config.{words}.*use the torch checkpoint"):
        refuse_unknown_windows(tf.LlavaConfig(text_config=make(**TEXT, **fields)))


def test_a_window_inside_a_nested_config_is_refused():
    inner = tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT, sliding_window=8))
    with pytest.raises(UnsupportedModelError, match="text_config.text_config.sliding_window is 8"):
        refuse_unknown_windows(tf.LlavaConfig(text_config=inner))


@pytest.mark.parametrize("name", FACTORIES)
def test_no_family_has_unknown_windows_of_itself(name):
    refuse_unknown_windows(tiny_model(name).model.config)


def test_unknown_windows_are_refused_before_the_weights_are_read(tmp_path):
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**TEXT, sliding_window=8)
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(UnsupportedModelError, match="sliding_window is 8"):
        export_checkpoint(tmp_path / "m", tmp_path / "out", ExportOptions())
    assert not (tmp_path / "out").exists()


def test_a_window_that_no_config_names_is_found_by_a_long_prompt(tmp_path):
    """It is longer than the samples' prompts."""
    model, collator = llava_with_hidden_window(64)
    options = ExportOptions(exporter="torchscript", samples=3, max_new_tokens=3)
    with pytest.raises(CheckFailedError, match="logits of answers differ.*prompts of up to 2.. tokens"):
        export_model(model, collator, tmp_path / "export", options, lambda *_: None, {"family": "llava"})


def llava_with_hidden_window(window):
    """A tiny LLaVA whose language model attends through a window while it runs, and a config that does not say so."""
    torch.manual_seed(0)
    text = tf.MistralConfig(**TEXT, sliding_window=None)
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=text, image_token_index=IMAGE_TOKEN
    )
    model = tf.LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(10 if parameter.ndim > 1 else 1)  # attention that is not nearly even
    language = model.model.language_model
    language.register_forward_pre_hook(lambda *_: setattr(language.config, "sliding_window", window))
    language.register_forward_hook(lambda *_: setattr(language.config, "sliding_window", None))
    return model, Collator(tiny_processor("llava"), find_family(model.config), model.config)


GOOD = TokenCheck(100, 100, 1.0, 0.5, 0.5, 0.0, 1e-6, 1.0, 400, 0, 0.9, 0.9)


@pytest.mark.parametrize(
    "change, words",
    (
        ({"divergence": 1.5}, "what comes next is 1.5 nats a token from what torch says, 1.0 are accepted"),
        ({"divergence": float("nan")}, "nan nats a token"),
        ({"token_share": 0.3}, "30.0% of torch's tokens are its choice, 40% are asked for"),
        ({"accuracy": 0.84}, "84.0% of the answers are right, in torch 90.0%"),
    ),
)
def test_an_int8_export_that_costs_quality_is_not_accepted(change, words):
    assert GOOD.wrong(VARIANTS["int8"]) is None
    assert words in replace(GOOD, **change).wrong(VARIANTS["int8"])


@pytest.mark.parametrize(
    "change, words",
    (
        ({"max_relative": 0.6}, "relative error 6.0e-01"),
        ({"cosine": 0.9}, "cosine 0.900000"),
        ({"max_relative": float("nan")}, "relative error nan"),
    ),
)
def test_logits_decide_where_weights_are_as_they_were_and_answers_where_they_are_rounded(change, words):
    worse = replace(GOOD, **change)
    assert words in worse.wrong(VARIANTS["fp16"]) and words in worse.wrong(VARIANTS["fp32"])
    assert worse.wrong(VARIANTS["int8"]) is None and worse.wrong(VARIANTS["q4"]) is None


def test_two_wrong_answers_more_are_accepted_of_a_few_where_weights_are_rounded_and_one_where_not():
    for name, accepted in (("fp16", 1), ("int8", 2), ("q4", 2)):
        assert replace(GOOD, samples=16, accuracy=0.9 - accepted / 16).wrong(VARIANTS[name]) is None
        assert replace(GOOD, samples=16, accuracy=0.9 - (accepted + 1) / 16).wrong(VARIANTS[name]) is not None


def test_an_occupied_folder_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    for overwrite in (False, True):  # it is no export, so --overwrite does not take it either
        with pytest.raises(OutputError, match="is not empty"):
            export_checkpoint(tmp_path / "no", tmp_path / "out", ExportOptions(overwrite=overwrite))
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_overwrite_takes_an_export_but_no_checkpoint(exported, tmp_path):
    shutil.copytree(exported("llava").out, tmp_path / "export")
    refuse_occupied(tmp_path / "export", overwrite=True)
    model, _ = cut_model("llava")
    save_checkpoint(tmp_path / "model", model, None, None)
    with pytest.raises(OutputError, match="is not empty"):
        refuse_occupied(tmp_path / "model", overwrite=True)


def test_a_missing_package_is_named_with_its_command(tmp_path):
    code = (
        "import sys; sys.modules['onnxscript'] = None\n"
        "from slimvlm.export.packages import require_packages\n"
        "from slimvlm.export import ExportOptions\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'onnxscript' else find(name)\n"
        "try: require_packages(ExportOptions())\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == (
        "the format onnx needs onnxscript: pip install 'slimvlm[onnx]' ('slimvlm[gpu]' for CUDA)"
    )


# ------------------------------------------------------------------ exported folders


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy of an export that a test may damage."""
    return shutil.copytree(exported("llava").out, tmp_path / "export")


def test_a_whole_export_is_verified(folder):
    result = verify(folder)
    [check] = result.checks
    assert check["ok"]
    assert check["token_share"] == 1.0
    assert result.files == len(json.loads((folder / "manifest.json").read_text())["files"])


@pytest.mark.parametrize(
    "damage, words",
    (
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "was changed"),
    ),
)
def test_a_damaged_file_is_named(folder, damage, words):
    damage(folder / "onnx" / "embed_tokens.onnx")
    with pytest.raises(CheckFailedError, match=f"embed_tokens.onnx {words}|embed_tokens.onnx has .* {words}") as caught:
        verify(folder)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", ("../outside.onnx", "/etc/passwd", "onnx/../../outside"))
def test_a_manifest_that_leaves_its_folder_is_refused(folder, name):
    document = json.loads((folder / "manifest.json").read_text())
    document["files"][name] = {"bytes": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="outside its folder"):
        verify(folder)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    (tmp_path / "outside").write_text("x")
    (folder / "linked").symlink_to(tmp_path / "outside")
    document = json.loads((folder / "manifest.json").read_text())
    document["files"]["linked"] = {"bytes": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="outside its folder"):
        verify(folder)


@pytest.mark.parametrize("content", (b"", b"no graph", b"\x08\x07" * 50))
def test_a_graph_that_no_runtime_loads_fails_the_check_in_one_sentence(folder, content):
    """Its digest in the manifest is right: whoever made the folder wrote it so."""
    (folder / "onnx" / "vision_encoder.onnx").write_bytes(content)
    Manifest.read(folder).write(folder)
    with pytest.raises(CheckFailedError, match="onnx fp32 does not run here") as caught:
        verify(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ("given.input_ids", "expected.tokens", "given.pixel_values"))
def test_a_sample_of_another_shape_fails_the_check_in_one_sentence(folder, name):
    tensors = load_file(folder / "sample.safetensors")
    save_file({**tensors, name: np.zeros((1, 2, 3), np.int64)}, folder / "sample.safetensors")
    Manifest.read(folder).write(folder)
    with pytest.raises(CheckFailedError, match="onnx fp32") as caught:
        verify(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read .*give a folder"):
        verify(tmp_path)


def test_the_bundle_is_one_tar_with_everything_in_it(tmp_path):
    result = export_tiny("llava", tmp_path / "export", bundle=True)
    with tarfile.open(tmp_path / "export.tar") as archive:
        names = {name.removeprefix("export/") for name in archive.getnames()}
    assert names == {*result.manifest.files, "manifest.json"}
    assert {"README.md", "run_onnx.py", "tokenizer.json", "onnx/decoder_model_merged.onnx"} <= names
    assert "python run_onnx.py" in (tmp_path / "export" / "README.md").read_text()


def test_a_full_disk_is_said_so_and_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(SlimvlmError, match="cannot write .*free space"):
            export_tiny("llava", tmp_path / "export")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
