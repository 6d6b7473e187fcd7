"""llama.cpp on slim models: stock layouts by its own converter, per-layer ones by examples/to_gguf.py."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from client_programs import CLIENTS, packages
from exports import tiny_samples
from plans import give_biases, make_plan, random_plan
from tiny_models import tiny_model
from tiny_processors import TEXT, tiny_processor

from slimvlm.compress.data.samples import open_image
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.export.running.generation import divergences
from slimvlm.export.variants import VARIANTS

PYTHON = CLIENTS / "llama" / "bin" / "python"
VOCABULARY = 384
MARKS = [
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<row_1_col_1>",
    "\n\n",
    "\n",
]  # all but the last are in a prompt
ASKED = " what is it"
GATE = VARIANTS["fp16"].tolerance  # llama.cpp looks activations up in tables of half precision


@pytest.fixture(scope="module")
def pieces():
    """A sentencepiece tokenizer with the bytes and the marks of images: llama.cpp reads no words of others."""
    model = io.BytesIO()
    texts, size = iter([TEXT] * 50), {"vocab_size": VOCABULARY, "hard_vocab_limit": False, "minloglevel": 2}
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "user_defined_symbols": MARKS, "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, model_type="bpe", **size, **ids
    )
    return model.getvalue()


@dataclass
class Folder:
    """A checkpoint that llama.cpp's converter takes, and its model."""

    path: Path
    model: torch.nn.Module

    def convert(self, name, *options):
        """A GGUF file by llama.cpp's own converter."""
        converter = next(Path(packages("llama")).glob("**/convert_hf_to_gguf.py"))
        gguf = self.path.parent / f"{self.path.name}-{name}.gguf"
        command = [sys.executable, converter, self.path, "--outtype", "f32", "--outfile", gguf, *options]
        run(command)
        return gguf

    def like(self, like, name):
        """A GGUF file by the example."""
        gguf = self.path.parent / f"{self.path.name}-{name}.gguf"
        run([sys.executable, Path(__file__).parents[3] / "examples" / "to_gguf.py", self.path, like, gguf])
        return gguf


def run(command):
    paths = {**os.environ, "PYTHONPATH": packages("llama") if "to_gguf" in str(command[1]) else ""}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=paths)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def dense_model(name):
    """A tiny model with room for the tokens of `pieces`."""
    model = tiny_model(name, "sdpa").model
    model.resize_token_embeddings(VOCABULARY)
    model.config.image_token_id = model.config.image_token_index = 4
    if name in ("smolvlm", "idefics3"):
        model.config.text_config.architectures = ["VLlama3ForCausalLM"]  # as those on the hub have it
        model.model.image_token_id = 4
    return model


def saved(path, name, model, pieces, plan=None, layout="per-layer"):
    processor = tiny_processor(name) if name in ("smolvlm", "idefics3") else None  # of an image, where there is one
    save_checkpoint(path, model, processor, plan, layout)
    (path / "tokenizer.model").write_bytes(pieces)
    (path / "added_tokens.json").write_text(json.dumps({mark: 4 + index for index, mark in enumerate(MARKS)}))
    return Folder(path, model)


def uniform(group):
    """Half of the channels and of the heads, wherever plain config fields can say so."""
    if not group.part.fields:
        return range(group.size)
    return range(group.layer, group.layer + group.size // 2) if group.kind == "mlp" else range(group.heads_per_kv)


def answer(scratch, request):
    (scratch / "request.json").write_text(json.dumps({"vocabulary": VOCABULARY, "new": 6, **request}, default=str))
    command = [PYTHON, Path(__file__).with_name("client_llama.py"), scratch / "request.json"]
    return json.loads(run(command).splitlines()[-1])


def hold_against_torch(found, logits):
    """`logits` [T, V] of torch along the tokens that were found."""
    logprobs, wanted = np.array(found["logprobs"]), logits.float().numpy()
    assert divergences(wanted, logprobs).mean() <= GATE.divergence
    assert np.mean(wanted.argmax(-1) == found["tokens"]) >= GATE.agreement


def hold_text(scratch, gguf, model):
    """A prompt without an image."""
    ids = [1, *range(20, 32)]
    found = answer(scratch, {"text": gguf, "ids": ids})
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids + found["tokens"]])).logits[0, len(ids) - 1 : -1]
    hold_against_torch(found, logits)


def hold_image(scratch, gguf, projector, model):
    """An image of one tile and a question, by llama.cpp's own preparation and its own tokenizer."""
    sample = tiny_samples(1)[0]
    (scratch / "image.png").write_bytes(sample.content)
    found = answer(scratch, {"text": gguf, "projector": projector, "image": scratch / "image.png", "question": ASKED})
    image, around, whole, tile, apart, _ = range(4, 4 + len(MARKS))
    views = [around, tile, *[image] * 4, apart, around, whole, *[image] * 4, around]  # as llama.cpp shows one tile
    ids = [1, *views, *found["question"]]
    assert len(ids) == found["asked"]
    pixels = tiny_processor("smolvlm").image_processor([[open_image(sample)] * 2], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids + found["tokens"]]), pixel_values=pixels).logits[
            0, len(ids) - 1 : -1
        ]
    hold_against_torch(found, logits)


@pytest.mark.parametrize("name", ("smolvlm", "idefics3"))
def test_its_own_converter_takes_a_stock_layout_with_its_vision_tower(tmp_path, pieces, name):
    dense = dense_model(name)
    plan = make_plan(dense, uniform, "kv-group", "stock")
    folder = saved(tmp_path / "model", name, apply_plan(dense, plan), pieces, plan, "stock")
    hold_image(tmp_path, folder.convert("text"), folder.convert("vision", "--mmproj"), folder.model)


@pytest.mark.parametrize("name", ("smolvlm", "idefics3"))
def test_layers_of_different_sizes_have_a_place_in_gguf(tmp_path, pieces, name):
    dense = saved(tmp_path / "dense", name, dense_model(name), pieces)
    text, vision = dense.convert("text"), dense.convert("vision", "--mmproj")
    plan = random_plan(dense.model, seed=3)
    slim = saved(tmp_path / "slim", name, apply_plan(dense.model, plan), pieces, plan)
    hold_image(tmp_path, slim.like(text, "text"), slim.like(vision, "vision"), slim.model)


def test_biases_that_a_compensation_gave_go_along(tmp_path, pieces):
    dense = saved(tmp_path / "dense", "llava", dense_model("llava"), pieces)
    text = dense.convert("text")
    plan = random_plan(dense.model, seed=2)
    slim = saved(tmp_path / "slim", "llava", give_biases(apply_plan(dense.model, plan)), pieces, plan)
    hold_text(tmp_path, slim.like(text, "text"), slim.model)
