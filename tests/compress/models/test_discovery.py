import dataclasses
import re

import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from plans import random_plan
from tiny_folders import write_tiny
from tiny_models import FACTORIES, IMAGE_TOKEN, TEXT, VISION, add_noise, tiny_model

from slimvlm.cli import main
from slimvlm.compress.errors import UnsupportedModelError
from slimvlm.compress.evaluation.equality import relative_difference
from slimvlm.compress.models.checkpoint import load
from slimvlm.compress.models.discovery.blocks import specimen_of
from slimvlm.compress.models.discovery.discover import discover, parts_of
from slimvlm.compress.models.discovery.rows import as_rows, source
from slimvlm.compress.models.families import CARRIED, JOINS, TEXTS, TOWERS, find_family, rows
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.mask import mask_plan

SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
# Not those of BLIP-2 and T5, whose cut attentions have a forward of their own (see FORWARDS).
WHOLE = (
    *("llava", "llava_dinov2", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm"),
    *("idefics3", "paligemma", "internvl", "clip", "siglip"),
)


def aya_vision():
    return tf.AyaVisionConfig(vision_config=SIGLIP, text_config=tf.Cohere2Config(**TEXT), image_token_index=IMAGE_TOKEN)


def mistral3():
    tower = tf.PixtralVisionConfig(**VISION, head_dim=8)
    return tf.Mistral3Config(
        vision_config=tower, text_config=tf.MistralConfig(**TEXT), image_token_index=IMAGE_TOKEN, spatial_merge_size=2
    )


def ovis2():
    vision = {**VISION, "num_visual_indicator_tokens": 2, "vocab_size": 64}
    return tf.Ovis2Config(vision_config=vision, text_config={**TEXT, "model_type": "qwen2"}, hidden_size=32)


def vipllava():
    tower, text = tf.CLIPVisionConfig(**VISION), tf.LlamaConfig(**TEXT)
    return tf.VipLlavaConfig(vision_config=tower, text_config=text, vision_feature_layers=[-2, -1])


UNKNOWN = {"aya_vision": aya_vision, "mistral3": mistral3, "ovis2": ovis2, "vipllava": vipllava}


def built(config):
    torch.manual_seed(0)
    model = tf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config).eval()
    add_noise(model)  # large enough for a wrong cut to show
    return model


def cuts(model, family):
    """What a cut of each group depends on, by its key."""
    return {one.key: dataclasses.replace(one, home=None, part=None) for one in find_groups(model, family, dead=True)}, {
        one.key: one.members[0].path for one in find_groups(model, family, dead=True)
    }


def stock_fields(model, family):
    """The config fields that size a group in the unmodified class, by its key."""
    return {one.key: one.part.fields for one in find_groups(model, family, dead=True)}


@pytest.mark.parametrize("name", FACTORIES)
def test_experiments_find_the_groups_and_stock_fields_of_the_table_and_say_which_they_do_not_understand(name):
    model = tiny_model(name).model
    found = discover(model, afresh=True)
    (expected, paths), (groups, _) = cuts(model, find_family(model.config)), cuts(model, found.family)
    assert groups.items() <= expected.items()
    missing = expected.keys() - groups.keys()
    if name in WHOLE:
        assert stock_fields(model, found.family) == stock_fields(model, find_family(model.config))
    for key in missing:
        blocks, path = re.split(rf"\.{key.split('.')[1]}\.", paths[key], maxsplit=1)
        assert any(sentence.startswith(f"{blocks}: ") and path in sentence for sentence in found.unknown), key
    assert missing or not found.unknown
    assert not missing or name not in WHOLE


@pytest.mark.parametrize("name", UNKNOWN)
def test_types_without_a_row_are_cut_like_masked_and_their_checkpoints_carry_the_family(name, tmp_path):
    config = UNKNOWN[name]()
    found = discover(built(config), afresh=True)
    setattr(config, CARRIED, dataclasses.asdict(found.trusted()))
    cut, masked = built(config), built(config)
    assert find_family(config) == found.family
    plan = random_plan(cut)
    mask_plan(masked, plan)
    apply_plan(cut, plan)
    ids = torch.randint(3, IMAGE_TOKEN - 1, (1, 6), generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sizes = {"image_sizes": torch.tensor([[16, 16]])} if name == "mistral3" else {}
    with torch.no_grad():
        for one in (lambda m: m(input_ids=ids).logits, lambda m: features(m, pixels, sizes)):
            assert relative_difference(one(masked), one(cut)) < 1e-5
    save_checkpoint(tmp_path / "cut", cut, None, plan)
    reloaded, _ = load(tmp_path / "cut")
    assert torch.equal(reloaded(input_ids=ids).logits, cut(input_ids=ids).logits)


def features(model, pixels, sizes):
    states = model.model.vision_tower(pixels, **sizes)
    return torch.cat([one.flatten() for one in states.to_tuple() if isinstance(one, torch.Tensor)])


@pytest.mark.parametrize("name", UNKNOWN)
def test_the_printed_rows_are_python_that_makes_the_discovered_ones(name, monkeypatch):
    for table in (JOINS, TOWERS, TEXTS):
        monkeypatch.setattr(f"slimvlm.compress.models.discovery.rows.{_name(table)}", {})
    found = discover(built(UNKNOWN[name]()), afresh=True)
    pasted = eval("{" + as_rows(found) + "}", dict(vars(rows)))
    assert list(pasted.values()) == [found.join, found.tower, found.text]
    assert all(len(line) <= 120 for line in as_rows(found).splitlines())
    assert source(found.tower).startswith("Tower(")


def _name(table):
    return next(name for name, one in {"JOINS": JOINS, "TOWERS": TOWERS, "TEXTS": TEXTS}.items() if one is table)


def llava(text):
    return tf.LlavaConfig(vision_config=SIGLIP, text_config=text, image_token_index=IMAGE_TOKEN)


def shared():
    model = built(llava(tf.LlamaConfig(**TEXT)))
    model.model.language_model.layers[1].mlp = model.model.language_model.layers[0].mlp
    return model


def test_what_is_fused_is_found_as_the_table_has_it():
    model = built(
        llava(tf.Phi3Config(**TEXT))
    )  # queries, keys and values of other heads in one, gate and up in another
    found = discover(model, afresh=True)
    assert cuts(model, found.trusted()) == cuts(model, find_family(model.config))


class Wide(torch.nn.Module):
    """An MLP of other names, without a gate."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = torch.nn.Linear(32, 40), torch.nn.Linear(40, 32)

    def forward(self, x):
        return self.narrow(torch.nn.functional.silu(self.wide(x)))


def test_blocks_of_several_kinds_make_one_row_of_all_their_parts():
    model = built(llava(tf.LlamaConfig(**TEXT)))
    model.model.language_model.layers[1].mlp = Wide()
    found = discover(model, afresh=True)
    parts = found.trusted().towers[1].parts
    assert [(part.key, part.output, part.optional) for part in parts] == [
        ("attn", "o_proj", False),
        ("mlp", "mlp.down_proj", True),
        ("mlp", "mlp.narrow", True),
    ]
    assert len(find_groups(model, found.family, dead=True)) == 10


class Interleaved(torch.nn.Module):
    """The query, key and value of a head lie together."""

    def __init__(self):
        super().__init__()
        self.attn = torch.nn.ModuleDict({"qkv": torch.nn.Linear(8, 24), "o": torch.nn.Linear(8, 8)})
        self.attn.head_dim = 4

    def forward(self, hidden_states):
        heads = self.attn["qkv"](hidden_states).unflatten(-1, (2, 3, 4)).permute(3, 0, 2, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(*heads)
        return hidden_states + self.attn["o"](mixed.transpose(1, 2).flatten(2))


def test_projections_that_are_fused_in_another_order_are_not_understood():
    parts, strange = parts_of(Interleaved().to("meta"), None)
    assert parts == ()
    assert len(strange) == 1 and strange[0].startswith("attn.qkv, attn.o: ")


def test_what_is_not_understood_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"layers.0.mlp.gate_proj.weight and .*layers.1.* are one weight"):
        discover(shared(), afresh=True).trusted()
    with pytest.raises(
        UnsupportedModelError, match=r"llama has no list of blocks .* its vision_config: there is nothing"
    ):
        discover(tf.LlamaModel(tf.LlamaConfig(**TEXT)))


class Sizeless(torch.nn.Module):
    """An attention whose forward knows that a head has four rows, and nobody else."""

    def __init__(self):
        super().__init__()
        self.attn = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in ("q", "k", "v", "o")})

    def forward(self, hidden_states):
        heads = [self.attn[name](hidden_states).unflatten(-1, (-1, 4)).transpose(1, 2) for name in ("q", "k", "v")]
        mixed = torch.nn.functional.scaled_dot_product_attention(*heads)
        return hidden_states + self.attn["o"](mixed.transpose(1, 2).flatten(2))


def test_an_attention_that_names_no_head_size_is_not_understood():
    parts, strange = parts_of(Sizeless().to("meta"), None)
    assert parts == ()
    assert strange == ["attn.q, attn.k, attn.v, attn.o: no attribute of attn says that its heads have 4 rows"]


class Strange(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)

    def forward(self, hidden_states, tides):
        return hidden_states + self.down(self.up(hidden_states) * tides)


def test_a_block_that_asks_for_something_unheard_of_is_refused_by_its_name():
    with pytest.raises(ValueError, match="it asks for 'tides', which no block known so far does"):
        specimen_of(Strange().to("meta"), None)


@pytest.fixture
def without_a_row(tmp_path):
    saved = dict(JOINS)
    yield write_tiny(tmp_path, "llava", samples=8)
    JOINS.clear()
    JOINS.update(saved)  # in the order it was in


def test_inspect_prints_the_row_to_add_and_trusting_it_cuts_a_checkpoint_that_needs_no_trust(without_a_row, tmp_path):
    model, data = map(str, without_a_row)
    del JOINS["llava"]
    run = CliRunner().invoke
    refused = run(main, ["inspect", model])
    assert refused.exit_code == 3 and "`slimvlm inspect --discover` looks for" in refused.stderr
    shown = run(main, ["inspect", model, "--discover"])
    assert shown.exit_code == 0 and '    "llava": Join(' in shown.stdout and "towers.py" not in shown.stdout
    assert run(main, ["inspect", model, "--trust-discovered"]).exit_code == 0
    assert run(main, ["inspect", model]).exit_code == 3  # trust ends with the command
    plan = ["plan", model, str(tmp_path / "planned"), "--data", data, "--ratio", "0.2", "--samples", "4"]
    made = run(main, [*plan, "--criterion", "magnitude", "--rounds", "1", "--trust-discovered"])
    assert made.exit_code == 0, made.stderr
    cut = ["apply", model, str(tmp_path / "planned" / "plan.json"), str(tmp_path / "cut")]
    done = run(main, [*cut, "--data", data, "--trust-discovered"])
    assert done.exit_code == 0, done.stderr
    found = run(main, ["inspect", str(tmp_path / "cut")])
    assert found.exit_code == 0 and "llava (clip, llama)" in found.stdout
