"""The stock layout: what the unmodified transformers class loads from plain config fields, and what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from outputs import logits
from plans import make_plan, uniform_plan
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.errors import CheckpointError
from slimvlm.compress.models.checkpoint import load
from slimvlm.compress.models.saving import save_checkpoint, set_fields, stock_model
from slimvlm.compress.slicing.apply import apply_plan


@pytest.mark.parametrize("unit", ["kv-group", "query-slot"])
@pytest.mark.parametrize("name", FACTORIES)
def test_the_unmodified_class_loads_the_stock_layout(tmp_path, name, unit):
    tiny = tiny_model(name, "sdpa")
    plan = uniform_plan(tiny.model, unit)
    model, batch = apply_plan(tiny.model, plan), tiny.inputs(2)
    save_checkpoint(tmp_path / "out", model, None, plan, "stock")
    auto = transformers.AutoModel if name in ("clip", "siglip") else transformers.AutoModelForImageTextToText
    loaded, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded).__module__.startswith("transformers.models.")
    assert not any(info.values())
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert not hasattr(loaded.config, "slimvlm")
    assert hasattr(model.config, "slimvlm")  # saving left the model as it was
    assert torch.equal(logits(load(tmp_path / "out")[0], batch), logits(model, batch))
    assert not list((tmp_path / "out").glob("*.py"))


def cut_one(name, key, count):
    """The groups whose key begins with `key` keep their first `count` indices."""
    model = tiny_model(name).model
    plan = make_plan(model, lambda group: range(count if group.key.startswith(key) else group.size))
    return apply_plan(model, plan)


@pytest.mark.parametrize(
    ("name", "key", "words"),
    [
        (
            "llava",
            "language.1.mlp",
            "text_config.intermediate_size would have to be 40 for .*0.mlp, 8 for language.1",
        ),
        ("llava", "vision.", "the unmodified class cannot build a narrower vision.0.attn"),
        ("qwen2_vl", "vision.0.mlp", "vision_config.mlp_ratio would have to be 0.265625 for vision.0.mlp, 2 for"),
        ("blip2_t5", "encoder.0.attn", "cannot build a narrower encoder.0.attn"),
        ("siglip", "vision.0.mlp", "cannot build a narrower vision.0.mlp"),
    ],
)
def test_sizes_the_unmodified_class_cannot_build_are_refused_by_name(tmp_path, name, key, words):
    model = cut_one(name, key, 8 if "mlp" in key else 2)
    with pytest.raises(CheckpointError, match=f"layout stock: .*{words}.*--layout per-layer"):
        save_checkpoint(tmp_path / "out", model, None, None, "stock")
    assert list(tmp_path.iterdir()) == []


def test_a_whole_ratio_is_written_as_the_config_has_it():
    config = transformers.Step3p7Config().vision_config  # it refuses a whole number
    set_fields(config, {"mlp_ratio": 3})
    assert isinstance(config.mlp_ratio, float)


def test_a_width_that_a_pooling_head_shares_is_refused_by_name():
    config = tiny_model("paligemma").model.config
    config.vision_config.vision_use_head = True
    model = transformers.PaliGemmaForConditionalGeneration(config)
    plan = make_plan(model, lambda group: range(group.size // (2 if group.kind == "mlp" else 1)))
    with pytest.raises(CheckpointError, match=r"layout stock: .* narrower vision\.0\.mlp"):
        stock_model(apply_plan(model, plan))


def test_a_number_of_heads_that_the_config_refuses_is_refused_with_its_reason():
    text = transformers.LlamaConfig(hidden_size=32, num_attention_heads=4, intermediate_size=8, num_hidden_layers=1)
    config = tiny_model("llava").model.config
    config.text_config = text
    model = transformers.LlavaForConditionalGeneration(config)
    plan = make_plan(model, lambda group: range(3 if group.key == "language.0.attn" else group.size))
    apply_plan(model, plan)  # Llama wants a number of heads that divides the hidden size
    with pytest.raises(CheckpointError, match="refuses these sizes .*32. is not a multiple of .* heads .3."):
        stock_model(model)


def test_a_width_that_the_config_has_no_ratio_for_is_refused_with_its_reason():
    model = tiny_model("qwen2_vl").model
    plan = make_plan(model, lambda group: range(8 if group.kind == "mlp" else group.size))
    with pytest.raises(CheckpointError, match="layout stock: .* refuses these sizes .*mlp_ratio.* expected int"):
        stock_model(apply_plan(model, plan))


def test_a_model_that_was_not_cut_is_its_own_stock_form():
    tiny = tiny_model("llava")
    stock = stock_model(tiny.model)
    assert type(stock) is type(tiny.model)
    assert stock.config.to_dict() == tiny.model.config.to_dict()
    assert stock.lm_head.weight is tiny.model.lm_head.weight
