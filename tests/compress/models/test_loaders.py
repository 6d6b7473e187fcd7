"""What a stranger's checkpoint is refused for instead of being loaded wrong, or ending in a traceback; all families."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FACTORIES, tiny_model
from tiny_processors import tiny_processor

from slimvlm.compress.errors import CheckpointError, SlimvlmError
from slimvlm.compress.models.checkpoint import build_meta, load_model
from slimvlm.compress.models.loaders import foreign, load_processor

SIZES = ("hidden_size", "d_model", "num_attention_heads", "num_heads", "intermediate_size", "d_ff", "ffn_dim")
WRONG = ("x", None, -8, [], True, float("nan"), 2**40)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Every family, saved by transformers."""
    root = tmp_path_factory.mktemp("models")
    for name in FACTORIES:
        tiny_model(name).model.save_pretrained(root / name)
    return root


@pytest.fixture(params=sorted(FACTORIES))
def folder(request, models, tmp_path):
    return shutil.copytree(models / request.param, tmp_path / "model")


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def refused(folder, words, load=load_model):
    with pytest.raises(CheckpointError, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_wrong_sizes_in_a_config_are_refused_before_memory_is_taken(folder):
    """Each is refused, or is no size this model is built by; never anything else."""
    sound = (folder / "config.json").read_text()
    refusals = 0
    for part in ("text_config", "vision_config"):
        for name in (name for name in SIZES if name in json.loads(sound)[part]):
            for value in WRONG:
                (folder / "config.json").write_text(sound)
                change_config(
                    folder, lambda config, part=part, name=name, value=value: config[part].update({name: value})
                )
                try:
                    load_model(folder)
                except SlimvlmError as error:
                    assert "\n" not in str(error)
                    refusals += 1
    assert refusals >= 20


def test_so_many_layers_that_building_takes_forever_are_refused(folder):
    change_config(folder, lambda config: config["vision_config"].update(num_hidden_layers=2**31, depth=2**31))
    refused(folder, r"config.json says vision_config\.(depth|num_hidden_layers) = 2.15e\+09; accepted is at most 1024")
    refused(folder, "at most 1024", load=build_meta)


def test_a_negative_count_is_refused(folder):
    change_config(folder, lambda config: config["vision_config"].update(num_attention_heads=-1, num_heads=-1))
    refused(folder, r"config.json says vision_config\.num_(attention_)?heads = -1; accepted is 0 or more", build_meta)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_weights_is_refused_with_how_to_merge_it(folder, name):
    (folder / name).write_text("{}")
    refused(folder, rf"holds an adapter \({name}\).*merge_and_unload")


def test_an_adapter_instead_of_the_weights_is_refused_with_how_to_merge_it(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    refused(folder, "holds an adapter .*merge_and_unload")


@pytest.mark.parametrize("part", [None, "text_config"])
def test_weights_that_somebody_quantized_are_refused(folder, part):
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    change_config(
        folder, lambda config: (config if part is None else config[part]).update(quantization_config=quantized)
    )
    refused(folder, "quantized .*bitsandbytes.*dequantized")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_weight_that_is_not_finite_is_refused_by_name(models, tmp_path, value, dtype):
    folder = shutil.copytree(models / "llava", tmp_path / "model")
    change_config(folder, lambda config: config.update(dtype=str(dtype).removeprefix("torch.")))

    def spoil(state):
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
        next(state[name] for name in state if name.endswith("layers.0.mlp.fc1.weight"))[3, 5] = value
        return state

    change_weights(folder, spoil)
    refused(folder, r"1 weights hold values that are not finite .*layers\.0\.mlp\.fc1\.weight")


def test_every_family_is_refused_with_a_weight_that_is_not_finite_or_an_integer(folder):
    sound = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(sound) if sound[name].ndim == 2)
    spoiled = sound[name].clone()
    spoiled[0, 0] = float("nan")
    for weight, words in (
        (spoiled, "1 weights hold values that are not finite"),
        (sound[name].char(), "1 weights are I8"),
    ):
        save_file({**sound, name: weight}, folder / "model.safetensors", {"format": "pt"})
        refused(folder, words)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_are_no_floating_point_numbers_are_refused(models, tmp_path, dtype):
    folder = shutil.copytree(models / "qwen2_vl", tmp_path / "model")
    name = sorted(load_file(folder / "model.safetensors"))[0]
    change_weights(folder, lambda state: {**state, name: state[name].to(dtype)})
    refused(folder, rf"1 weights are \w+ \({name}\); accepted are F16, BF16, F32, F64")


def test_positions_that_old_checkpoints_keep_as_integers_are_no_weights(models, tmp_path):
    folder = shutil.copytree(models / "clip", tmp_path / "model")
    positions = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    change_weights(folder, lambda state: {**state, **positions})
    assert load_model(folder).model is not None


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{}", '"x"', "null", '{"model": 5}', NESTED], ids=lambda text: text[:12])
def test_broken_files_of_a_processor_are_refused_or_read(tmp_path, name, text):
    tiny_processor("llava").save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    try:
        load_processor(tmp_path)
    except SlimvlmError as error:
        assert "its processor cannot be loaded" in str(error)
        assert "\n" not in str(error)


def test_a_panic_of_foreign_code_is_a_refusal():
    class PanicException(BaseException):
        """As pyo3's: past Exception."""

    refusal = pytest.raises(CheckpointError, match=r"x is damaged \(index out of bounds\); copy it again")
    with refusal, foreign("x is damaged", "copy it again"):
        raise PanicException("index out of\nbounds")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't allocate memory: you tried"), KeyboardInterrupt()]
)
def test_want_of_memory_and_ctrl_c_are_no_fault_of_a_file(error):
    with pytest.raises(type(error)), foreign("x is damaged"):
        raise error
