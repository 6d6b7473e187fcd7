"""Weights in 8 and 4 bits: of every family, near the float model, the same again from disk; and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys

import pytest
import torch
from plans import random_plan
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import EVERY, FACTORIES, tiny_model
from torch.nn import functional

from slimvlm import load
from slimvlm.compress.errors import CheckpointError, MissingDependencyError, OutputError, UnsuitableOptionError
from slimvlm.compress.models.checkpoint import load_model, stream_model
from slimvlm.compress.models.computing import load_to_compute
from slimvlm.compress.models.quantized import CONFIGS, TYPES, held_form, quantize
from slimvlm.compress.models.saving import quantize_checkpoint, save_checkpoint
from slimvlm.compress.options import IN_TORCH, ComputeOptions
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.export.variants import TORCH_FORMS

BATCH = 4
REORDERED = 0.05  # relative, of sums in bfloat16
# What anybody does with these folders, in a process that never saw this package: how far its outputs are from ours.
ANYBODY = """
import sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file
for folder in map(Path, sys.argv[1:]):
    auto = transformers.AutoModelForImageTextToText
    model = auto.from_pretrained(folder, trust_remote_code=folder.name != "stock").eval()
    batch = load_file(f"{folder}.in")
    ours = batch.pop("ours")
    batch = {name: one.to(model.dtype) if one.is_floating_point() else one for name, one in batch.items()}
    with torch.inference_mode():
        found = model(**batch).logits.float()
    print(folder.name, float((found - ours).norm() / ours.norm()))
assert not [name for name in sys.modules if name.startswith("slimvlm")]
"""


def outputs(model, batch) -> torch.Tensor:
    """Scores of every token, or of every image among the texts, in fp32."""
    given = {name: one.to(model.dtype) if one.is_floating_point() else one for name, one in batch.items()}
    with torch.inference_mode():
        found = model(**given)
    return (found.logits if "logits" in found else found.logits_per_image).float()


def dense(name: str):
    """A tiny model and a batch."""
    tiny = tiny_model(name, "sdpa")
    return tiny.model.eval(), tiny.inputs(BATCH)


def cut(name: str):
    """The same, every layer of another width."""
    model, batch = dense(name)
    return apply_plan(model, random_plan(model, 1)), batch


def test_the_tables_name_the_same_forms():
    assert set(IN_TORCH) == set(CONFIGS) == set(TYPES.values()) == set(TORCH_FORMS)


@pytest.mark.parametrize("name", FACTORIES)
def test_every_form_of_every_family_is_the_cut_model_within_its_tolerance_and_the_same_again_from_disk(tmp_path, name):
    model, batch = cut(name)
    wanted = outputs(model, batch).log_softmax(-1)
    for form, limits in ((form, row.tolerance) for form, row in TORCH_FORMS.items()):
        small = copy.deepcopy(model)
        linears = quantize(small, form)
        save_checkpoint(tmp_path / form, small, None, None)
        again = load_model(tmp_path / form, form=form).model
        found = outputs(again, batch).log_softmax(-1)
        divergence = functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean().item()
        agreement = (found.argmax(-1) == wanted.argmax(-1)).float().mean().item()
        assert divergence <= limits.divergence and agreement >= limits.agreement
        assert functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) >= limits.cosine
        apart = (outputs(small, batch).log_softmax(-1) - found).norm() / found.norm()
        assert apart <= (REORDERED if form == "int4" else 0)
        kinds = [type(weight.data).__name__ for weight in again.parameters()]
        assert (kinds.count("Int4OpaqueTensor"), kinds.count("Int8Tensor")) == (linears.get("int4", 0), linears["int8"])
        assert ("int4" in linears) == (form == "int4")


@pytest.mark.parametrize("name", EVERY)
def test_a_weight_at_a_time_the_same_is_written(tmp_path, name):
    """In 4 bits, of which some rows are in 8."""
    save_checkpoint(tmp_path / "dense", tiny_model(name).model, None, None)
    for kind, load_it in (("whole", load_model), ("streamed", stream_model)):
        model = load_it(tmp_path / "dense").model
        quantize(model, "int4")
        save_checkpoint(tmp_path / kind, model, None, None, max_shard_size="60KB")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        one, two = (safe_open(tmp_path / kind / file.name, "pt") for kind in ("whole", "streamed"))
        assert one.metadata() == two.metadata() and list(one.keys()) == list(two.keys())
        for key in one.keys():  # noqa: SIM118 (no mapping)
            assert one.get_tensor(key).dtype == two.get_tensor(key).dtype
            assert torch.equal(one.get_tensor(key), two.get_tensor(key)), key


def test_a_folder_holds_what_loading_makes_of_the_float_one_and_transformers_alone_computes_the_same(tmp_path):
    """Of 4 bits transformers unpacks a row at every use: the same values, added in another order."""
    asked = []
    for name, form, layout in (("llava", "int4", "per-layer"), ("blip2_opt", "int8", "stock")):
        model, batch = cut(name) if layout == "per-layer" else dense(name)
        slim, out = tmp_path / f"{layout}-float", tmp_path / layout
        plan = random_plan(dense(name)[0], 1)
        save_checkpoint(slim, model, None, plan, layout)
        quantize_checkpoint(slim, out, form)
        assert (out / "plan.json").read_bytes() == (slim / "plan.json").read_bytes()
        ours = outputs(load_model(slim, form=form).model, batch)
        assert torch.equal(outputs(load(out)[0], batch), ours)
        save_file(
            {name: one for name, one in batch.items() if name != "labels"} | {"ours": ours}, tmp_path / f"{layout}.in"
        )
        asked.append(str(out))
    told = [sys.executable, "-c", ANYBODY, *asked]
    done = subprocess.run(told, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    apart = dict(line.split() for line in done.stdout.splitlines())
    assert set(apart) == {"per-layer", "stock"}
    assert float(apart["per-layer"]) <= REORDERED and float(apart["stock"]) <= 1e-5


def test_weights_of_a_half_precision_checkpoint_compute_in_what_is_asked_for(tmp_path):
    model, batch = dense("llava")
    save_checkpoint(tmp_path / "half", model.half(), None, None)
    quantize_checkpoint(tmp_path / "half", tmp_path / "int8", "int8")
    for folder in ("half", "int8"):
        loaded = load_to_compute(ComputeOptions(device="cpu"), str(tmp_path / folder), form="int8")
        assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}
        assert outputs(loaded.model, batch).isfinite().all()


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    save_checkpoint(folder / "slim", cut("llava")[0], None, None)
    quantize_checkpoint(folder / "slim", folder / "int8", "int8")
    return folder / "int8"


def test_quantized_weights_are_run_in_their_form_and_changed_by_nobody(int8, tmp_path):
    assert (held_form(int8), held_form(int8.parent / "slim"), held_form(tmp_path)) == ("int8", None, None)
    with pytest.raises(CheckpointError, match="only floating-point weights can be cut"):
        load_model(int8)
    with pytest.raises(CheckpointError, match="only floating-point weights can be cut"):
        quantize_checkpoint(int8, tmp_path / "again", "int4")
    with pytest.raises(UnsuitableOptionError, match=r"holds int8 weights, which run as torch:int8; for torch:int4"):
        load_model(int8, form="int4")
    with pytest.raises(OutputError, match="not an empty folder"):
        quantize_checkpoint(int8.parent / "slim", int8, "int8")
    assert not (tmp_path / "again").exists()


def test_four_bits_compute_in_the_dtype_of_their_kernel(int8):
    with pytest.raises(UnsuitableOptionError, match="--dtype float32: torch:int4 computes in bfloat16 only"):
        load_to_compute(ComputeOptions(device="cpu", dtype="float32"), str(int8.parent / "slim"), form="int4")


def test_without_torchao_a_sentence_says_what_to_install(int8, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for asked in (int8, int8.parent / "slim"):
        with pytest.raises(MissingDependencyError, match=r"pip install 'slimvlm\[torchao\]'"):
            load_model(asked, form="int8")
