"""The pruned slices: what the dense checkpoint holds at the plan's indices, whatever its tensors are called."""

from __future__ import annotations

import copy
import gc
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from plans import make_plan, random_plan
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import EVERY, tiny_model

from slimvlm.compress.errors import CheckpointError
from slimvlm.compress.models.checkpoint import load
from slimvlm.compress.models.experts import together
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.recovery.adapters import slices
from slimvlm.compress.recovery.adapters.slices import Slices
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.cuts import Cut, member_indices

LLAVA = (
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.(multi_modal_projector|image_newline)", r"\1"),
)
QWEN = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
INTERNVL = (*LLAVA[:2], (r"^model\.vision_tower\.", "vision_tower."), LLAVA[3])
OLDER_NAMES = {
    **dict.fromkeys(("llava", "llava_next", "llava_onevision", "paligemma"), LLAVA),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), QWEN),
    "internvl": INTERNVL,
}


def expected_slices(dense, plan):
    """Path -> (dim that was cut, W0 at the pruned indices), index by index from the members of the groups."""
    pruned: dict[tuple[str, int], list[int]] = {}
    for group in find_groups(dense, find_family(dense.config), plan.attention_unit):
        kept = torch.tensor(plan.keep[group.key])
        for member in (member for member in group.members if not member.norm):
            all_indices = member_indices(group, member, torch.arange(group.size)).tolist()
            stays = set(member_indices(group, member, kept).tolist())
            gone = pruned.setdefault((member.path, member.dim), [])
            gone.extend(index for index in all_indices if index not in stays)
    return {
        path: (dim, dense.get_submodule(path).weight.detach().index_select(dim, torch.tensor(sorted(gone))))
        for (path, dim), gone in pruned.items()
        if gone
    }


def assert_slices(slices, dense, plan):
    expected = expected_slices(dense, plan)
    assert expected
    for group in find_groups(dense, find_family(dense.config), plan.attention_unit):
        for member in group.members:
            found = slices.of(member.path)
            dim, piece = expected.get(member.path, (None, None))
            assert (found.rows is None) == (dim != 0)
            assert (found.columns is None) == (dim != 1)
            if dim is not None:
                assert torch.equal((found.rows, found.columns)[dim], piece)


def rewrite(folder: Path, rules) -> None:
    """Gives every tensor the name it has in checkpoints written before transformers 5."""
    with safe_open(folder / "model.safetensors", "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    renamed = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in rules:
            if re.match(pattern, name):
                new = re.sub(pattern, replacement, name)
                break
        renamed[new] = tensor
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("original", [True, False], ids=["original names", "module names"])
@pytest.mark.parametrize("name", EVERY)
def test_slices_are_the_dense_rows_and_columns_the_plan_removed(tmp_path, name, original):
    dense = tiny_model(name).model
    with together(dense):
        dense.save_pretrained(tmp_path, save_original_format=original)
    plan = random_plan(dense, seed=3)
    cut = apply_plan(copy.deepcopy(dense), plan)
    assert_slices(Slices(tmp_path, cut, plan), dense, plan)


@pytest.mark.parametrize("name", OLDER_NAMES)
def test_tensors_with_older_names_are_found_where_loading_finds_them(tmp_path, name):
    model = tiny_model(name).model
    model.save_pretrained(tmp_path, save_original_format=False)
    rewrite(tmp_path, OLDER_NAMES[name])
    dense = load(tmp_path)[0]
    plan = random_plan(dense, seed=4)
    cut = apply_plan(copy.deepcopy(dense), plan)
    assert_slices(Slices(tmp_path, cut, plan), dense, plan)
    assert all(torch.equal(dense.state_dict()[key], value) for key, value in model.state_dict().items())


def test_slices_come_from_every_shard(tmp_path):
    dense = tiny_model("llava").model
    dense.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    plan = random_plan(dense, seed=5)
    assert_slices(Slices(tmp_path, apply_plan(copy.deepcopy(dense), plan), plan), dense, plan)


def test_slices_keep_the_dtype_of_the_file(tmp_path):
    dense = tiny_model("smolvlm").model.bfloat16()
    dense.save_pretrained(tmp_path)
    plan = random_plan(dense, seed=5)
    cut = apply_plan(copy.deepcopy(dense).float(), plan)
    assert_slices(Slices(tmp_path, cut, plan), dense, plan)


def test_a_model_cut_in_rounds_recalls_from_the_dense_one(tmp_path):
    dense = tiny_model("llava").model
    dense.save_pretrained(tmp_path)
    first = make_plan(dense, lambda group: range(group.size // 2, group.size))
    cut = apply_plan(copy.deepcopy(dense), first)
    second = make_plan(cut, lambda group: range(group.size - group.size // 4 or 1))
    plan = first.compose(second)
    assert_slices(Slices(tmp_path, apply_plan(cut, second), plan), dense, plan)


def test_a_checkpoint_that_was_cut_before_is_a_dense_one_for_the_next_plan(tmp_path):
    dense = tiny_model("blip2_t5").model
    apply_plan(dense, make_plan(dense, lambda group: range(max(1, group.size // 2))))
    save_checkpoint(tmp_path / "once", dense, None, None)
    plan = make_plan(dense, lambda group: range(max(1, group.size // 2)))
    cut = apply_plan(copy.deepcopy(dense), plan)
    assert_slices(Slices(tmp_path / "once", cut, plan), dense, plan)


def test_a_plan_for_another_checkpoint_is_refused(tmp_path):
    dense = tiny_model("llava").model
    dense.save_pretrained(tmp_path)
    plan = random_plan(dense, seed=6)
    cut = apply_plan(copy.deepcopy(dense), plan)
    with pytest.raises(CheckpointError, match="the plan is for family 'clip'"):
        Slices(tmp_path, cut, replace(plan, family="clip"))
    key = next(iter(plan.sizes))
    with pytest.raises(CheckpointError, match=f"group {re.escape(key)} has"):
        Slices(tmp_path, cut, replace(plan, sizes={**plan.sizes, key: plan.sizes[key] + 1}))


def test_a_model_that_this_plan_did_not_make_is_refused(tmp_path):
    dense = tiny_model("llava").model
    dense.save_pretrained(tmp_path)
    plan = make_plan(dense, lambda group: range(max(1, group.size // 2)))
    with pytest.raises(CheckpointError, match=r"q_proj is \(32, 32\) in this model, the plan leaves \(16, 32\)"):
        Slices(tmp_path, dense, plan)


def test_a_missing_tensor_is_named(tmp_path):
    dense = tiny_model("llava").model
    dense.save_pretrained(tmp_path, save_original_format=False)
    rewrite(tmp_path, [(r"^model\.vision_tower\.encoder\.layers\.0\.mlp\.fc1\.weight", "elsewhere")])
    plan = make_plan(dense, lambda group: range(max(1, group.size // 2)))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.fc1\.weight is not stored as one tensor"):
        Slices(tmp_path, apply_plan(dense, plan), plan)


def test_a_file_that_changed_since_is_refused(tmp_path):
    dense = tiny_model("llava").model
    dense.save_pretrained(tmp_path, save_original_format=False)
    plan = make_plan(dense, lambda group: range(max(1, group.size // 2)))
    slices = Slices(tmp_path, apply_plan(dense, plan), plan)
    path = "model.vision_tower.encoder.layers.0.mlp.fc1"
    save_file({f"{path}.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is \[3, 3\], not \[48, 32\]"):
        slices.of(path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="cannot be read"):
        slices.of(path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
def test_reading_all_slices_never_holds_a_second_model(tmp_path):
    text = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, num_attention_heads=2),
        text_config=transformers.LlamaConfig(**text, **heads),
        image_token_index=63,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    plan = make_plan(model, lambda group: range(group.size // 2))
    cut = apply_plan(model, plan)
    stored = (tmp_path / "model.safetensors").stat().st_size
    gc.collect()
    before, most, read = anonymous_memory(), 0, 0
    slices = Slices(tmp_path, cut, plan)
    for path, module in cut.named_modules():
        if isinstance(module, torch.nn.Linear):
            found = slices.of(path)
            read += sum(piece.nbytes for piece in (found.rows, found.columns) if piece is not None)
            most = max(most, anonymous_memory() - before)
    assert read > stored / 3  # half of nearly everything was read
    assert most < stored / 5  # but only one matrix at a time was held


def anonymous_memory() -> int:
    """Bytes this process holds; the pages of mapped files, which the system can drop, are not counted."""
    line = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line.group(1)) * 1024


def test_a_matrix_cut_on_both_sides_gives_both_slices(tmp_path):
    weight = torch.arange(24.0).reshape(4, 6)
    save_file({"w": weight}, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        found = slices._read(file.get_slice("w"), Cut("w", torch.tensor([0, 3]), torch.tensor([1, 2, 5])), (4, 6))
    assert found.rows.equal(weight[[1, 2]][:, [1, 2, 5]])
    assert found.columns.equal(weight[[0, 3]][:, [0, 3, 4]])
