"""Student and teacher as one module: every stage of every family, where the forward ends, and what is left behind."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plans import keep_blocks, random_plan
from tiny_models import FACTORIES, Tiny, tiny_model
from torch import Tensor, nn

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.families import Family, find_family
from slimvlm.compress.models.groups import depths_of
from slimvlm.compress.options import LowRank
from slimvlm.compress.recovery.adapters.recall import attach
from slimvlm.compress.recovery.distillation.distiller import Distiller
from slimvlm.compress.recovery.distillation.recipe import Stage, make_stages, match_blocks, parse_recipe
from slimvlm.compress.slicing.apply import apply_plan

NAMES = list(FACTORIES)
GENERATIVE = [name for name in NAMES if name not in ("clip", "siglip")]
EVERYTHING = "sft+kl+0.5*rkl+hidden"
ROUNDING = 1e-6  # of a loss; what a copy computes is the same to where its tensors happen to lie in memory


@lru_cache(maxsize=len(NAMES))
def dense(name: str) -> Tiny:
    tiny = tiny_model(name)
    tiny.model(**tiny.inputs(1))  # transformers installs hooks of its own with the first forward
    return tiny


@lru_cache(maxsize=len(NAMES))
def cut(name: str) -> nn.Module:
    model = copy.deepcopy(dense(name).model)
    model = apply_plan(model, random_plan(model, seed=1)).eval()
    model(**dense(name).inputs(1))
    return model.requires_grad_()  # a dense model that has taught asks for no gradient


def family_of(name: str) -> Family:
    return find_family(dense(name).model.config)


def distiller_of(name: str, recipe: str = "lpd", student: nn.Module | None = None, **options) -> Distiller:
    student = student or copy.deepcopy(cut(name))
    return Distiller(student, dense(name).model, family_of(name), replace(parse_recipe(recipe), **options)).train()


def stages_of(distiller: Distiller) -> tuple[Stage, ...]:
    return make_stages(distiller.family, distiller.depths, distiller.recipe)


def only_stage(distiller: Distiller) -> Stage:
    (stage,) = stages_of(distiller)
    return stage


def loss_of(name: str, recipe: str, batch: dict[str, Tensor], **options) -> Tensor:
    distiller = distiller_of(name, recipe, staged=False, **options)
    return distiller(batch, only_stage(distiller))[0].detach()


def count_calls(model: nn.Module, family: Family, calls: Counter) -> None:
    for tower in family.towers:
        for layer, block in enumerate(model.get_submodule(tower.blocks)):
            block.register_forward_pre_hook(lambda *_, key=(tower.name, layer): calls.update([key]))


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def block_parameters(model: nn.Module, family: Family) -> dict[tuple[str, int], list[nn.Parameter]]:
    return {
        (tower.name, layer): list(block.parameters())
        for tower in family.towers
        for layer, block in enumerate(model.get_submodule(tower.blocks))
    }


def widened(batch: dict[str, Tensor], columns: int = 3) -> dict[str, Tensor]:
    """The same samples in a batch that is padded by some more tokens."""
    fill = {"labels": -100}
    per_token = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids")
    return {
        name: nn.functional.pad(value, (0, columns), value=fill.get(name, 0)) if name in per_token else value
        for name, value in batch.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_runs_ends_at_its_deepest_block_and_gives_gradients_up_to_there(name):
    family = family_of(name)
    student, teacher = copy.deepcopy(cut(name)), copy.deepcopy(dense(name).model)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    attach(student, random_plan(teacher, seed=1), None, LowRank(rank=1, recall=False))
    distiller = Distiller(student, teacher, family, parse_recipe("lpd")).train()
    calls, taught = Counter(), Counter()
    count_calls(student, family, calls)
    count_calls(teacher, family, taught)
    hooked = hooks(distiller)
    order = [tower.name for tower in family.towers]
    for stage in stages_of(distiller):
        student.zero_grad(set_to_none=True)
        calls.clear(), taught.clear()
        loss, parts = distiller(dense(name).inputs(2), stage)
        loss.backward()
        assert torch.isfinite(loss)
        assert loss.item() == pytest.approx(sum(part.item() for part in parts.values()), rel=1e-5)
        assert all(not part.requires_grad for part in parts.values())
        reached = [(tower, layer) for tower in order for layer in range(distiller.depths[tower])]
        if stage.blocks:
            deepest = max((order.index(block.tower), block.layer) for block in stage.blocks)
            reached = [(tower, layer) for tower, layer in reached if (order.index(tower), layer) <= deepest]
        read = {key: times for key, times in taught.items() if key[1] < distiller.depths[key[0]]}  # not dead blocks
        assert calls == read == Counter(reached)
        for key, parameters in block_parameters(student, family).items():
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            assert trained
            assert all(parameter.grad is None for parameter in parameters if not parameter.requires_grad)
            if key not in reached:
                assert all(parameter.grad is None for parameter in trained)
            elif stage.blocks:
                assert all(parameter.grad is not None for parameter in trained)
                assert sum(bool(parameter.grad.any()) for parameter in trained) == len(trained) / 2  # B starts at 0
    assert hooks(distiller) == hooked
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_stays_in_evaluation_mode_and_asks_for_no_gradient(name):
    distiller = distiller_of(name)
    assert distiller.training
    assert not any(module.training for module in distiller.teacher.modules())
    assert not any(parameter.requires_grad for parameter in distiller.teacher.parameters())
    distiller.eval()
    assert not any(module.training for module in distiller.modules())


@pytest.mark.parametrize("name", NAMES)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(name):
    distiller = distiller_of(name, student=copy.deepcopy(dense(name).model), staged=False)
    _, parts = distiller(dense(name).inputs(3), only_stage(distiller))
    assert {part for part, value in parts.items() if abs(value) > ROUNDING} == {"sft"}, parts
    hidden = distiller_of(name, "kl+rkl+hidden", student=copy.deepcopy(dense(name).model))
    assert hidden(dense(name).inputs(3), only_stage(hidden))[0].item() == pytest.approx(0, abs=ROUNDING)


@pytest.mark.parametrize("name", NAMES)
def test_sft_is_the_model_s_own_loss_and_needs_no_teacher(name):
    batch = dense(name).inputs(2)
    distiller = Distiller(cut(name), None, family_of(name), parse_recipe("sft"))
    own = {"return_loss": True} if name not in GENERATIVE else {}
    loss, _ = distiller(batch, only_stage(distiller))
    torch.testing.assert_close(loss, cut(name)(**batch, **own).loss, rtol=1e-5, atol=1e-6)
    assert distiller.targets(batch, only_stage(distiller)) == {}


@pytest.mark.parametrize("name", GENERATIVE)
def test_padding_changes_no_loss(name):
    batch = dense(name).inputs(2)
    batch["labels"][0, -2:] = -100  # answers of two lengths
    for recipe in ("lpd", EVERYTHING):
        torch.testing.assert_close(loss_of(name, recipe, widened(batch)), loss_of(name, recipe, batch))


@pytest.mark.parametrize("name", GENERATIVE)
def test_only_positions_with_a_label_get_logits(name):
    distiller, shapes = distiller_of(name, "kl"), []
    for model in (distiller.student, distiller.teacher):
        handle = model.get_output_embeddings().register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape)))
        batch = dense(name).inputs(2)
        batch["labels"][0, -1] = -100
        distiller(batch, only_stage(distiller))
        handle.remove()
    assert shapes == [(1, 7, 96)] * 2


@pytest.mark.parametrize("name", GENERATIVE)
def test_hidden_states_are_those_of_transformers(name):
    batch = dense(name).inputs(2)
    distiller = distiller_of(name, "hidden", hidden_states=(-1, 0, 1, -2))
    targets = distiller.targets(batch, only_stage(distiller))
    output = dense(name).model(**batch, output_hidden_states=True)
    output = getattr(output, "language_model_outputs", output)
    states = output.decoder_hidden_states if name == "blip2_t5" else output.hidden_states
    assert tuple(targets) == distiller.target_names(only_stage(distiller))
    for index in (-1, 0, 1, -2):
        torch.testing.assert_close(targets[f"hidden.{index}"], states[index])


@pytest.mark.parametrize("name", NAMES)
def test_targets_given_make_the_loss_of_targets_asked_for(name):
    batch = dense(name).inputs(2)
    for recipe in ("lpd", EVERYTHING):
        distiller = distiller_of(name, recipe)
        for stage in stages_of(distiller):
            targets = distiller.targets(batch, stage)
            assert set(targets) == set(distiller.target_names(stage))
            assert not any(value.requires_grad for value in targets.values())
            distiller.eval()
            assert distiller(batch, stage, targets)[0].item() == distiller(batch, stage)[0].item()


def test_a_student_that_is_taught_from_disk_needs_no_teacher_in_that_stage():
    distiller = distiller_of("llava")
    stage, batch = stages_of(distiller)[0], dense("llava").inputs(2)
    targets = distiller.targets(batch, stage)
    loss = distiller(batch, stage)[0].item()
    distiller.teacher = None
    assert distiller(batch, stage, targets)[0].item() == loss
    with pytest.raises(ValueError, match="'vision shallow' needs a teacher or its targets"):
        distiller(batch, stage)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_are_gone_after_an_error_and_the_next_batch_runs(name):
    distiller = distiller_of(name, staged=False)
    stage, before = only_stage(distiller), hooks(distiller)
    expected = distiller(dense(name).inputs(2), stage)[0].item()
    broken = dense(name).inputs(2)
    broken["input_ids"] = torch.full_like(broken["input_ids"], 10_000)  # outside the vocabulary
    with pytest.raises((IndexError, ValueError)):
        distiller(broken, stage)
    assert hooks(distiller) == before
    assert distiller(dense(name).inputs(2), stage)[0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["llava", "blip2_opt", "blip2_t5", "qwen3_vl"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(name):
    plain = distiller_of(name, student=cut(name))
    saving = distiller_of(name)
    saving.student.activation_checkpointing_enable()
    saving.train()
    for stage in stages_of(plain):
        found = []
        for distiller in (plain, saving):
            distiller.zero_grad()
            loss, _ = distiller(dense(name).inputs(2), stage)
            loss.backward()
            found.append((loss.item(), [p.grad for p in distiller.student.parameters() if p.grad is not None]))
        assert found[0][0] == found[1][0]
        assert len(found[0][1]) == len(found[1][1])
        for left, right in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(left, right)
    plain.zero_grad()


@pytest.mark.parametrize("name", ["blip2_opt", "blip2_t5", "llava"])  # the first two have dropout in their configs
def test_dropout_of_the_backbone_is_off_and_that_of_adapters_on(name):
    batch = dense(name).inputs(2)
    bare = distiller_of(name, staged=False)
    assert len({bare(batch, only_stage(bare))[0].item() for _ in range(4)}) == 1
    adapted = get_peft_model(copy.deepcopy(cut(name)), LoraConfig(r=2, target_modules=".*fc1", lora_dropout=0.5))
    for module_name, parameter in adapted.named_parameters():
        if "lora_B" in module_name:
            nn.init.normal_(parameter)
    distiller = distiller_of(name, student=adapted.get_base_model(), staged=False)
    values = {distiller(batch, only_stage(distiller))[0].item() for _ in range(4)}
    assert len(values) == 4
    distiller.eval()
    assert len({distiller(batch, only_stage(distiller))[0].item() for _ in range(3)}) == 1


@pytest.mark.parametrize("name", ["llava", "blip2_t5", "clip"])
def test_autocast_to_bf16_gives_nearly_the_same_loss(name):
    distiller = distiller_of(name, EVERYTHING)
    stage, batch = only_stage(distiller), dense(name).inputs(2)
    exact = distiller(batch, stage)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = distiller(batch, stage)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)


@pytest.mark.parametrize("name", ["llava", "blip2_t5", "clip"])
@pytest.mark.parametrize("recipe", ["lpd", "kl+hidden"])
def test_a_student_that_follows_comes_nearer_to_its_teacher_in_every_stage(name, recipe):
    distiller, batch = distiller_of(name, recipe), dense(name).inputs(4)
    optimiser = torch.optim.AdamW(distiller.student.parameters(), lr=3e-3)
    for stage in stages_of(distiller):
        losses = []
        for _ in range(12):
            loss, _ = distiller(batch, stage)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]


def test_a_batch_in_which_no_token_is_labelled_costs_nothing_and_has_gradients():
    batch = dense("llava").inputs(2)
    batch["labels"].fill_(-100)
    distiller = distiller_of("llava", "sft+kl")
    loss, _ = distiller(batch, only_stage(distiller))
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in distiller.student.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_padding_images_and_padded_pixels_are_no_features(name):
    batch = dense(name).inputs(2)
    mask = torch.ones(2, 1, 16, 16, dtype=torch.long)
    mask[1, :, :, 8:] = 0  # the right half of the second image is padding
    batch["pixel_values"][1, :, :, :, 8:] = 0
    padded = {**batch, "pixel_attention_mask": nn.functional.pad(mask, (0, 0, 0, 0, 0, 1))}
    padded["pixel_values"] = nn.functional.pad(batch["pixel_values"], (0, 0, 0, 0, 0, 0, 0, 1))
    batch["pixel_attention_mask"] = mask
    distiller = distiller_of(name)
    stage = stages_of(distiller)[1]
    seen = [distiller(inputs, stage)[0].item() for inputs in (batch, padded)]
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[1, :, 2:] = False
    expected = 0.0
    theirs = distiller.targets(batch, stage)
    for key, mine in student_blocks(distiller, batch, stage).items():
        pair = [value[valid.flatten(1)].flatten() for value in (mine, theirs[key])]
        expected += (1 - torch.cosine_similarity(*pair, dim=0).item()) / len(stage.blocks)
    assert seen[0] == pytest.approx(expected, rel=1e-3)


def student_blocks(distiller: Distiller, batch: dict[str, Tensor], stage: Stage) -> dict[str, Tensor]:
    """Outputs of the student's supervised blocks, by the teacher's way of asking."""
    itself = Distiller(distiller.student, copy.deepcopy(distiller.student), distiller.family, distiller.recipe)
    return itself.targets(batch, stage)


def test_the_paper_s_losses_count_padding_as_the_paper_does():
    batch = dense("blip2_t5").inputs(2)
    wide = widened(batch)
    distiller = distiller_of("blip2_t5", "lpd-paper")
    stage, *_, last = stages_of(distiller)
    bare, padded = (distiller(inputs, last)[1]["kl"] for inputs in (batch, wide))
    assert abs(bare - padded) > 1e-4
    (block,) = stage.blocks
    mine = student_blocks(distiller, batch, stage)[block.key]
    theirs = distiller.targets(batch, stage)[block.key]
    expected = 1e6 * nn.functional.mse_loss(mine / mine.norm(), theirs / theirs.norm())
    assert distiller(batch, stage)[0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_layers_of_a_tower_that_lost_whole_layers_follow_the_output_the_next_one_read():
    teacher = copy.deepcopy(dense("llava").model)
    teacher.config.vision_feature_layer = -1  # every block is read
    student = copy.deepcopy(teacher)
    del student.model.vision_tower.encoder.layers[1]
    student.config.vision_config.num_hidden_layers = 2
    family = family_of("llava")
    blocks = {"vision": match_blocks((0, 2), 3)}
    distiller = Distiller(student, teacher, family, replace(parse_recipe("lpd"), staged=False), blocks)
    stage = make_stages(family, depths_of(student, family), distiller.recipe)[0]
    seen = {}
    for layer, block in enumerate(teacher.model.vision_tower.encoder.layers):
        block.register_forward_hook(lambda *args, layer=layer: seen.update({layer: args[2]}))
    batch = dense("llava").inputs(2)
    targets = distiller.targets(batch, stage)
    torch.testing.assert_close(targets["vision.1"], seen[2])
    assert torch.isfinite(distiller(batch, stage)[0])
    with pytest.raises(UnsuitableOptionError, match=r"depths {'vision': 3, .* the student {'vision': 2"):
        Distiller(student, teacher, family, distiller.recipe)
    with pytest.raises(UnsuitableOptionError, match="has depths"):
        Distiller(student, teacher, family, distiller.recipe, {"vision": (1, 3)})


@pytest.mark.parametrize("gone", [0, 1])
def test_hidden_states_are_counted_in_the_dense_model_also_where_the_student_lacks_blocks(gone):
    batch, family = dense("llava").inputs(2), family_of("llava")
    student = copy.deepcopy(dense("llava").model)
    plan = keep_blocks(student, lambda group: [gone] if group.tower == "language" else [])
    apply_plan(student, plan)
    recipe, followed = replace(parse_recipe("hidden"), hidden_states=(0, 1, 2, -1, -2)), match_blocks((1 - gone,), 2)
    distiller = Distiller(student, dense("llava").model, family, recipe, {"language": followed}).eval()
    given: dict[str, Tensor] = {}
    text = student.model.language_model
    text.layers[0].register_forward_pre_hook(lambda *args: given.update(first=args[1][0]))
    text.layers[0].register_forward_hook(lambda *args: given.update(block=args[2]))
    text.register_forward_hook(lambda *args: given.update(last=args[2][0]))
    loss, _ = distiller(batch, only_stage(distiller))
    taught = distiller.targets(batch, only_stage(distiller))
    pairs = {0: "first", 1: "block", 2: "last", -1: "last", -2: "block"}
    mask = batch["attention_mask"].bool()
    expected = [(taught[f"hidden.{index}"] - given[name])[mask].square().mean() for index, name in pairs.items()]
    assert loss.item() == pytest.approx(sum(expected).item() / 5, rel=1e-5)
