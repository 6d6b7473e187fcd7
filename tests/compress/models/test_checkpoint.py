"""Checkpoints: three ways to reload every family, and what is refused instead of being loaded wrong."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from outputs import greedy_tokens, logits
from plans import random_plan
from safetensors.torch import load_file, save_file
from tiny_models import EVERY, tiny_model
from tiny_processors import tiny_processor

import slimvlm
from slimvlm.compress.errors import CheckpointError, OutputError, UnsupportedModelError
from slimvlm.compress.models.checkpoint import build_meta, check_weights, load, load_model
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.plan import Plan
from slimvlm.compress.slicing.apply import apply_plan

DUAL = ("clip", "siglip")
# Stacked experts are computed by another kernel; odd widths by one that depends on where the weights lie.
ROUNDED = {"qwen3_vl_moe": 1e-5, "lfm2_vl": 1e-5}
SHARD = "60KB"  # several shards per tiny model


def auto_class(name):
    return transformers.AutoModel if name in DUAL else transformers.AutoModelForImageTextToText


def save_slim(folder, name, **options):
    """A cut tiny model, written to `folder`; gives the model, a batch and its plan."""
    tiny = tiny_model(name, "sdpa")
    plan = random_plan(tiny.model, seed=1)
    model = apply_plan(tiny.model, plan)
    save_checkpoint(folder, model, None, plan, **options)
    return model, tiny.inputs(2), plan


def refused(folder, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every family cut, saved in shards, with a batch and what the model in memory answered."""
    root = tmp_path_factory.mktemp("saved")
    for name in EVERY:
        model, batch, _ = save_slim(root / name, name, max_shard_size=SHARD)
        answers = {"logits": logits(model, batch).contiguous()}
        if name not in DUAL:
            answers["tokens"] = torch.tensor(greedy_tokens(model, batch, 3))
        save_file({key: value.contiguous() for key, value in batch.items()}, root / f"{name}.batch")
        save_file(answers, root / f"{name}.answers")
    return root


PLAIN = """
import importlib.abc, json, sys
from pathlib import Path

class NoSlimvlm(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "slimvlm":
            raise ImportError("slimvlm is not installed here")

sys.meta_path.insert(0, NoSlimvlm())
import torch, transformers
from safetensors.torch import load_file
torch.set_num_threads(1)
root, report = Path(sys.argv[1]), {}

def error(model, batch, answers):
    with torch.no_grad():
        output = model(**batch)
    got = output.logits if hasattr(output, "logits") else output.logits_per_image
    return (got - answers["logits"]).abs().max().item()

for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    batch, answers = (load_file(f"{folder}.{kind}") for kind in ("batch", "answers"))
    auto = transformers.AutoModelForImageTextToText if "tokens" in answers else transformers.AutoModel
    options = {"trust_remote_code": True, "device_map": "cpu"}
    model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    found = {"class": type(model).__name__, "keys": [key for keys in info.values() for key in keys]}
    found["error"] = error(model, batch, answers)
    if "tokens" in answers:
        prompt = {key: value for key, value in batch.items() if key != "labels"}
        tokens = model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        found["tokens"] = tokens[:, -3:].tolist() == answers["tokens"].tolist()
    half = auto.from_pretrained(folder, dtype=torch.bfloat16, **options)
    found["half"] = sorted({str(parameter.dtype) for parameter in half.parameters()})
    model.save_pretrained(Path(sys.argv[2], folder.name))
    again = auto.from_pretrained(Path(sys.argv[2], folder.name), **options)
    found["again"] = error(again, batch, answers)
    report[folder.name] = found
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def plainly_loaded(saved, tmp_path_factory):
    """What plain transformers makes of all of them, in one process where slimvlm cannot be imported."""
    work = tmp_path_factory.mktemp("plain")
    (work / "script.py").write_text(PLAIN)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "code"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(work / "script.py"), str(saved), str(work / "again")]
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", EVERY)
def test_slimvlm_load_gives_identical_logits_and_tokens(saved, name):
    model, processor = slimvlm.load(saved / name)
    batch, answers = load_file(saved / f"{name}.batch"), load_file(saved / f"{name}.answers")
    assert len(list((saved / name).glob("*.safetensors"))) > 1
    assert processor is None
    assert not model.training
    assert (logits(model, batch) - answers["logits"]).abs().max() <= ROUNDED.get(name, 0)
    if name not in DUAL:
        assert greedy_tokens(model, batch, 3) == answers["tokens"].tolist()


@pytest.mark.parametrize("name", EVERY)
def test_plain_transformers_loads_it_where_slimvlm_is_not_importable(plainly_loaded, name):
    found = plainly_loaded[name]
    assert found["class"].startswith("Slim")
    assert found["keys"] == []
    assert found["error"] <= ROUNDED.get(name, 0)
    assert found.get("tokens", True)
    assert found["half"] == ["torch.bfloat16"]
    assert found["again"] <= ROUNDED.get(name, 0)  # what plain save_pretrained writes loads again


@pytest.mark.parametrize("name", ["llava", "clip"])
def test_the_stock_class_refuses_a_per_layer_folder_instead_of_initialising_weights(saved, name):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        auto_class(name).from_pretrained(saved / name)


def test_bfloat16_weights_are_kept_or_cast_as_asked(tmp_path):
    tiny = tiny_model("llava", "sdpa")
    save_checkpoint(tmp_path / "dense", tiny.model.to(torch.bfloat16), None, None)
    model = load(tmp_path / "dense")[0]
    plan = random_plan(model, seed=1)
    save_checkpoint(tmp_path / "slim", apply_plan(model, plan), None, plan)
    kept, cast = load_model(tmp_path / "slim").model, load_model(tmp_path / "slim", dtype=torch.float32).model
    batch = tiny.inputs(2)
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    assert torch.equal(logits(kept, batch), logits(model, batch))
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in cast.parameters()} == {torch.float32}


def test_the_config_alone_builds_the_sizes_of_a_slim_model(saved, tmp_path):
    shutil.copyfile(saved / "blip2_t5" / "config.json", tmp_path / "config.json")
    model, family = build_meta(tmp_path)
    expected = {name: tensor.shape for name, tensor in load(saved / "blip2_t5")[0].state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == expected
    assert all(parameter.is_meta for parameter in model.parameters())
    assert family.name == "blip2_t5"


def test_the_attention_implementation_is_the_one_asked_for(saved):
    assert load_model(saved / "llava", attention="eager").model.config._attn_implementation == "eager"


def test_tied_weights_are_saved_once_and_tied_again(saved):
    model, _ = load(saved / "paligemma")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_t5_head_that_differs_from_the_embedding_stays_apart(tmp_path):
    model = tiny_model("blip2_t5").model
    model.config.text_config.tie_word_embeddings = False
    dense = type(model)(model.config)
    dense.language_model.encoder.embed_tokens = dense.language_model.decoder.embed_tokens = dense.language_model.shared
    save_checkpoint(tmp_path / "dense", dense.eval(), None, None)
    loaded = load_model(tmp_path / "dense").model
    plan = random_plan(loaded, seed=1)
    batch = tiny_model("blip2_t5").inputs(2)
    expected = logits(apply_plan(loaded, plan), batch)
    save_checkpoint(tmp_path / "slim", loaded, None, plan)
    reloaded = load(tmp_path / "slim")[0]
    head = reloaded.language_model.lm_head.weight
    assert torch.equal(head, dense.language_model.lm_head.weight)
    assert not torch.equal(head, reloaded.language_model.shared.weight)
    assert torch.equal(logits(reloaded, batch), expected)


@pytest.mark.parametrize("name", ["blip2_t5", "internvl"])
def test_a_loaded_slim_model_can_be_cut_and_saved_again(saved, tmp_path, name):
    model, _ = load(saved / name)
    plan = random_plan(model, seed=9)
    apply_plan(model, plan)
    save_checkpoint(tmp_path / "out", model, None, plan)
    batch = load_file(saved / f"{name}.batch")
    assert torch.equal(logits(load(tmp_path / "out")[0], batch), logits(model, batch))


def test_save_pretrained_of_a_slim_model_writes_a_folder_that_loads(saved, tmp_path):
    model, _ = load(saved / "llava")
    model.save_pretrained(tmp_path / "mine")
    batch = load_file(saved / "llava.batch")
    assert torch.equal(logits(load(tmp_path / "mine")[0], batch), logits(model, batch))
    assert (tmp_path / "mine" / "modeling_slimvlm.py").is_file()


def test_a_folder_holds_plan_manifest_and_no_pickle(tmp_path):
    _, _, plan = save_slim(tmp_path / "out", "llava")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert Plan.from_json((tmp_path / "out" / "plan.json").read_text()) == plan
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert set(listed) == files - {"manifest.json"}
    assert all(entry["bytes"] == (tmp_path / "out" / name).stat().st_size for name, entry in listed.items())
    assert {Path(name).suffix for name in files} == {".json", ".md", ".py", ".safetensors"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_the_record_lists_sizes_per_layer(tmp_path):
    _, _, plan = save_slim(tmp_path / "out", "llava")
    record = json.loads((tmp_path / "out" / "config.json").read_text())["slimvlm"]
    layer = record["per_layer_config"]["language"]["1"]
    assert layer["intermediate_size"] == len(plan.keep["language.1.mlp"])
    assert layer["num_attention_heads"] == len(plan.keep["language.1.attn"])


def test_processor_and_licence_travel_with_the_model(tmp_path):
    tiny, processor = tiny_model("llava"), tiny_processor("llava")
    save_checkpoint(tmp_path / "dense", tiny.model, processor, None)
    (tmp_path / "dense" / "LICENSE").write_text("free")
    (tmp_path / "dense" / "trainer_state.json").write_text("{}")
    loaded = load_model(tmp_path / "dense")
    plan = random_plan(loaded.model, seed=1)
    save_checkpoint(tmp_path / "slim", apply_plan(loaded.model, plan), loaded.processor, plan)
    again = load_model(tmp_path / "slim")
    assert type(again.processor) is type(processor)
    assert again.processor.chat_template == processor.chat_template
    assert again.processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert (tmp_path / "slim" / "LICENSE").read_text() == "free"
    assert not (tmp_path / "slim" / "trainer_state.json").exists()
    assert (again.family.name, again.folder) == ("llava", tmp_path / "slim")


def test_the_digest_identifies_the_weights(tmp_path):
    for name in ("one", "two"):
        save_slim(tmp_path / name, "clip")
    assert check_weights(tmp_path / "one") == check_weights(tmp_path / "two") == load_model(tmp_path / "one").digest
    tiny = tiny_model("clip")
    save_checkpoint(tmp_path / "dense", tiny.model, None, None)
    assert check_weights(tmp_path / "dense") != check_weights(tmp_path / "one")


@pytest.fixture
def folder(saved, tmp_path):
    """A private copy of a sharded slim checkpoint, to be damaged."""
    return Path(shutil.copytree(saved / "llava", tmp_path / "copy"))


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def test_a_truncated_weight_file_is_refused(folder):
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, f"{path.name} is damaged .*; copy or download it again")


def test_a_missing_shard_is_refused(folder):
    shards(folder)[0].unlink()
    refused(folder, f"weight file {shards(folder)[0].name[:6]}.* is missing")


def test_a_changed_byte_is_refused(folder):
    path = shards(folder)[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(folder, f"{path.name} is not what manifest.json says")


def test_an_unreadable_index_is_refused(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    refused(folder, r"index\.json does not fit: key 'weight_map' is missing")
    index.write_text("{")
    refused(folder, r"index\.json does not fit: it is not JSON")


def rewrite_weights(folder, change):
    """All weights of `folder` in one file, after `change` was applied to the state."""
    state = {name: tensor for path in shards(folder) for name, tensor in load_file(path).items()}
    for path in [*shards(folder), folder / "manifest.json", folder / "model.safetensors.index.json"]:
        path.unlink()
    save_file(change(state), folder / "model.safetensors", {"format": "pt"})


NORM = "model.language_model.norm.weight"


def test_a_missing_weight_is_refused_by_name(folder):
    rewrite_weights(folder, lambda state: {name: tensor for name, tensor in state.items() if name != NORM})
    refused(folder, rf"1 missing weights \({NORM}\)")


def test_an_unexpected_weight_is_refused_by_name(folder):
    rewrite_weights(folder, lambda state: {**state, "model.extra": torch.zeros(1)})
    refused(folder, r"1 unexpected weights \(model.extra\)")


def test_a_weight_of_another_size_is_refused_by_name(folder):
    rewrite_weights(folder, lambda state: {**state, NORM: torch.zeros(5)})
    refused(folder, rf"1 mismatched weights \({NORM}\)")


def test_a_broken_config_is_refused(folder):
    (folder / "config.json").write_text("{")
    refused(folder, "config.json cannot be read")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


def test_a_record_that_does_not_fit_the_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["slimvlm"]["schema"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "the model cannot be built .*schema 7 is not the 1")


def test_pickled_weights_are_not_read(folder):
    rewrite_weights(folder, lambda state: state)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "holds no model.safetensors .pickled weights are not read")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "word", "a/b/c", "~/nothing"])
def test_a_name_that_is_neither_folder_nor_hub_name_is_refused_without_the_network(name):
    refused(name, "is not a folder; give a checkpoint folder or a hub name")


def test_a_hub_name_that_cannot_be_reached_is_refused():
    refused("nobody/nothing", "is no folder here, and the hub does not give it")


def test_a_model_of_no_family_is_refused(tmp_path):
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedModelError, match="'bert' is not supported"):
        load(tmp_path / "bert")


def test_a_folder_that_is_not_empty_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="out is not an empty folder"):
        save_slim(tmp_path / "out", "clip")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_what_a_killed_save_left_is_replaced(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00001-of-00009.safetensors").write_text("half")
    save_slim(tmp_path / "out", "clip")
    assert not list((tmp_path / "out").glob("*-of-00009*"))
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write .*check free space and permissions"):
        save_slim(tmp_path / "file" / "out", "clip")


def test_running_out_of_space_leaves_nothing_behind(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the weights need more in one file
    try:
        with pytest.raises(OutputError, match="cannot write") as caught:
            save_slim(tmp_path / "out", "llava")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layout 'flat' is unknown; choose one of per-layer, stock"):
        save_slim(tmp_path / "out", "clip", layout="flat")
