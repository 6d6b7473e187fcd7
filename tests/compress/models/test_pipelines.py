"""Pipelines of transformers take what slimvlm.load gives, and the folder itself, of every family."""

from __future__ import annotations

import pytest
import torch
import transformers
from plans import random_plan, uniform_plan
from tiny_models import tiny_model
from tiny_processors import PROCESSORS, tiny_image, tiny_processor

import slimvlm
from slimvlm.compress.errors import MissingDependencyError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.options import LAYOUTS
from slimvlm.compress.slicing.apply import apply_plan

LABELS = ["cat", "dog", "red fox"]


def whole(name):
    """A tiny model; SigLIP's pipeline pads to 64 tokens, which the tiny one has no positions for."""
    model = tiny_model(name).model
    if find_family(model.config).contrastive and "siglip" in model.config.model_type:
        model.config.text_config.max_position_embeddings = 64
        torch.manual_seed(0)
        model = type(model)(model.config).eval()
    return model


def saved(folder, name, layout):
    """A cut tiny model, and how a pipeline gets its processor: from the folder, or as it is where that cannot be saved
    or read from there without torchvision.
    """
    model, processor = whole(name), tiny_processor(name)
    plan = random_plan(model, seed=1) if layout == "per-layer" else uniform_plan(model, "kv-group")
    apply_plan(model, plan)
    try:
        save_checkpoint(folder, model, processor, plan, layout)
        slimvlm.load(folder)
        return folder, {}
    except (AttributeError, MissingDependencyError):
        bare = folder.with_name("bare")
        save_checkpoint(bare, model, None, plan, layout)
        return bare, {"processor": processor}


def said(run, processor, contrastive):
    image = tiny_image()
    if contrastive:
        return run(image, candidate_labels=LABELS, hypothesis_template="a {}")
    if getattr(processor, "chat_template", None) is None:
        return run(images=image, text="what is it ?", max_new_tokens=3, do_sample=False, return_full_text=False)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is it ?"}]
    chat = [{"role": "user", "content": content}]
    return run(text=chat, max_new_tokens=3, do_sample=False, return_full_text=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_pipeline_takes_what_load_gives_and_the_folder_itself(tmp_path, monkeypatch, name, layout):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))
    folder, given = saved(tmp_path / "slim", name, layout)
    model, processor = slimvlm.load(folder)
    contrastive = find_family(model.config).contrastive
    processor = processor or given["processor"]
    if contrastive:
        task, parts = "zero-shot-image-classification", {"image_processor": processor.image_processor}
        parts["tokenizer"] = processor.tokenizer
    else:
        task, parts = "image-text-to-text", {"processor": processor}
    by_load = transformers.pipeline(task, model=model, **parts, device="cpu")
    code = {"trust_remote_code": True} if layout == "per-layer" else {}
    by_folder = transformers.pipeline(task, model=str(folder), **given, **code, device="cpu")
    assert type(by_folder.model).__name__.startswith("Slim") == (layout == "per-layer")
    one, other = (said(run, processor, contrastive) for run in (by_load, by_folder))
    if contrastive:
        assert one == other and {row["label"] for row in one} == set(LABELS)
    else:
        assert one[0]["generated_text"] == other[0]["generated_text"] != ""
