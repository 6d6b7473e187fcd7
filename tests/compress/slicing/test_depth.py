"""Whole blocks leave: equal to the dense model with them switched off, for every family, and loadable in every way."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import onnx
import pytest
import torch
import transformers
from exports import export_tiny
from outputs import greedy_tokens, logits
from plans import keep_blocks, make_plan, random_plan
from recalled import SMALL, randomise
from tiny_models import EVERY, FACTORIES, IMAGE_TOKEN, TEXT, reading, tiny_model
from tiny_processors import tiny_processor

from slimvlm.compress.allocate.budget import Budget, plan_units
from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.data.collate import Collator
from slimvlm.compress.errors import CheckpointError, InfeasibleBudgetError
from slimvlm.compress.models.checkpoint import load_model
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import count_parameters, find_blocks, find_groups
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.plan import Plan
from slimvlm.compress.recovery.adapters.recall import attach, merge
from slimvlm.compress.recovery.adapters.slices import Slices
from slimvlm.compress.rounds import Planning, plan_in_rounds
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.mask import mask_plan

DUAL = ("clip", "siglip")


def first_block(group):
    return [group.blocks[0].index]


def last_block(group):
    return [group.blocks[-1].index]


@pytest.fixture(scope="module", params=EVERY)
def case(request):
    """A family's tiny model without the first block of every tower that can leave."""
    tiny = tiny_model(request.param, "sdpa")
    plan = keep_blocks(tiny.model, first_block)
    cut = apply_plan(copy.deepcopy(tiny.model), plan)
    return SimpleNamespace(name=request.param, tiny=tiny, plan=plan, cut=cut, batch=tiny.inputs(2))


def tokens(model, batch, **options):
    return greedy_tokens(model, batch, 3, suppress_tokens=[IMAGE_TOKEN, IMAGE_TOKEN + 1], **options)


def test_a_model_without_a_block_is_the_dense_one_with_it_switched_off(case):
    masked = mask_plan(copy.deepcopy(case.tiny.model), case.plan)
    expected = logits(masked, case.batch)
    assert count_parameters(case.cut) == case.plan.parameters_after < case.plan.parameters_before
    assert (logits(case.cut, case.batch) - expected).abs().max() <= 1e-5
    assert (logits(case.tiny.model, case.batch) - expected).abs().max() > 1e-2
    if case.name not in DUAL:
        found = tokens(case.cut, case.batch)
        assert found == tokens(masked, case.batch) == tokens(case.cut, case.batch, use_cache=False)


@pytest.mark.parametrize("layout", ["per-layer", "stock"])
def test_every_way_of_loading_builds_the_shorter_model(case, layout, tmp_path):
    save_checkpoint(tmp_path / "slim", case.cut, None, case.plan, layout)
    auto = transformers.AutoModel if case.name in DUAL else transformers.AutoModelForImageTextToText
    remote = {"trust_remote_code": True, "code_revision": None} if layout == "per-layer" else {}
    foreign, info = auto.from_pretrained(tmp_path / "slim", output_loading_info=True, **remote)
    assert not any(info.values())
    assert type(foreign).__module__.startswith("transformers.models.") == (layout == "stock")
    for loaded in (load_model(tmp_path / "slim").model, foreign.eval()):
        assert torch.equal(logits(loaded, case.batch), logits(case.cut, case.batch))
        if case.name not in DUAL:
            assert tokens(loaded, case.batch) == tokens(case.cut, case.batch)


@pytest.mark.parametrize("order", ["blocks first", "units first"])
@pytest.mark.parametrize("name", FACTORIES)
def test_blocks_and_units_cut_one_after_the_other_are_the_composed_plan_and_count_once(name, order):
    tiny = tiny_model(name, "sdpa")
    makers = (lambda model: keep_blocks(model, first_block), random_plan)
    plans, twice = [], copy.deepcopy(tiny.model)
    for maker in makers if order == "blocks first" else makers[::-1]:
        plans.append(maker(twice))
        apply_plan(twice, plans[-1])
    both = plans[0].compose(plans[1])
    assert plans[0].compose(both.since(plans[0])) == both
    once = apply_plan(copy.deepcopy(tiny.model), Plan.from_json(both.to_json()))
    assert count_parameters(once) == count_parameters(twice) == both.parameters_after
    assert once.config.slimvlm == twice.config.slimvlm
    batch = tiny.inputs(2)
    masked = logits(mask_plan(copy.deepcopy(tiny.model), both), batch)
    assert (logits(once, batch) - masked).abs().max() <= 1e-5
    for found, expected in zip(once.state_dict().values(), twice.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    base = getattr(type(once), "stock_class")  # noqa: B009
    assert once.state_dict().keys() < base(tiny.model.config).state_dict().keys()


@pytest.mark.parametrize("tower", ["encoder", "decoder"])
def test_t5_generates_where_one_of_its_towers_is_the_longer(tower, tmp_path):
    tiny = tiny_model("blip2_t5", "sdpa")
    plan = keep_blocks(tiny.model, lambda group: [0] if group.tower == tower else [])
    masked = mask_plan(copy.deepcopy(tiny.model), plan)
    save_checkpoint(tmp_path / "slim", apply_plan(tiny.model, plan), None, plan, "stock")
    batch, static = tiny.inputs(2), {"cache_implementation": "static", "disable_compile": True}
    foreign = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "slim").eval()
    for model in (tiny.model, foreign):
        assert tokens(model, batch) == tokens(model, batch, **static) == tokens(masked, batch)
        assert (logits(model, batch) - logits(masked, batch)).abs().max() <= 1e-5


def test_a_block_whose_output_is_read_by_its_number_cannot_leave():
    model = tiny_model("qwen3_vl").model
    assert {group.key: group.fixed for group in find_blocks(model, find_family(model.config))} == {
        "vision.block": [0], "language.block": [0]
    }  # fmt: skip
    plan = keep_blocks(model, lambda group: [0] if group.tower == "language" else [])
    with pytest.raises(CheckpointError, match="block 0 of language cannot leave"):
        apply_plan(model, plan)
    assert not hasattr(model.config, "slimvlm")


def test_what_is_listed_or_numbered_per_block_follows():
    text = {**TEXT, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    config = tiny_model("llava_onevision").model.config
    config.text_config = transformers.Qwen2Config(**text)
    torch.manual_seed(0)
    model = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    assert [kind.split("_")[0] for kind in config.text_config.layer_types] == ["full", "full", "sliding", "sliding"]
    batch = tiny_model("llava_onevision").inputs(2)
    plan = keep_blocks(model, lambda group: [0, 2] if group.tower == "language" else [])
    expected = logits(mask_plan(copy.deepcopy(model), plan), batch)
    apply_plan(model, plan)
    assert [kind.split("_")[0] for kind in config.text_config.layer_types] == ["full", "sliding"]
    assert (logits(model, batch) - expected).abs().max() <= 1e-5
    assert tokens(model, batch) == tokens(model, batch, use_cache=False)
    qwen = apply_plan(tiny_model("qwen2_5_vl").model, keep_blocks(tiny_model("qwen2_5_vl").model, first_block))
    assert qwen.config.vision_config.fullatt_block_indexes == qwen.model.visual.fullatt_block_indexes == [0]


def test_where_every_second_block_has_experts_those_that_stay_keep_theirs():
    config = tiny_model("qwen3_vl_moe").model.config
    config.text_config.num_hidden_layers, config.text_config.decoder_sparse_step = 6, 2
    config.text_config.mlp_only_layers = [1]
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    plan = keep_blocks(model, lambda group: [1, 4] if group.tower == "language" else [])
    apply_plan(model, plan)
    assert (config.text_config.decoder_sparse_step, config.text_config.mlp_only_layers) == (1, [0, 1])
    assert find_groups(transformers.Qwen3VLMoeForConditionalGeneration(config), find_family(config)) == find_groups(
        model, find_family(config)
    )


@pytest.mark.parametrize(("states", "left"), [(-2, 1), ((-2, 1), [1, 0]), (-1, 2)])
def test_the_states_that_are_read_are_counted_without_the_block(states, left):
    tiny = reading("llava", states)
    plan = keep_blocks(tiny.model, lambda group: [0] if group.tower == "vision" else [])
    expected = logits(mask_plan(copy.deepcopy(tiny.model), plan), tiny.inputs(2))
    apply_plan(tiny.model, plan)
    assert tiny.model.config.vision_feature_layer == left
    assert (logits(tiny.model, tiny.inputs(2)) - expected).abs().max() <= 1e-5


def test_what_recovery_recalls_of_a_shorter_model_is_what_it_lost_and_merging_keeps_its_outputs(tmp_path):
    tiny = tiny_model("llava")
    tiny.model.save_pretrained(tmp_path / "dense")
    first = keep_blocks(tiny.model, first_block)
    model = apply_plan(copy.deepcopy(tiny.model), first)
    second = make_plan(model, lambda group: range(group.size // 2 if group.kind == "mlp" else group.size))
    plan = first.compose(second)
    apply_plan(model, second).requires_grad_(False)
    slices = Slices(tmp_path / "dense", model, plan)
    dense = tiny.model.model.language_model.layers[1].mlp.down_proj.weight
    recalled = slices.of("model.language_model.layers.0.mlp.down_proj").columns
    assert torch.equal(recalled, dense[:, dense.shape[1] // 2 :])
    adapted = randomise(attach(model, plan, slices, SMALL))
    expected = logits(adapted, tiny.inputs(2))
    save_checkpoint(tmp_path / "merged", merge(adapted), None, plan)
    reloaded = load_model(tmp_path / "merged").model
    torch.testing.assert_close(logits(reloaded, tiny.inputs(2)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "blip2_t5"])
def test_an_export_of_a_shorter_model_answers_like_it_and_its_cache_has_its_layers(name, tmp_path):
    def shorter(name):
        model = tiny_model(name, "sdpa").model
        apply_plan(model, keep_blocks(model, first_block))
        return model, Collator(tiny_processor(name), find_family(model.config), model.config)

    result = export_tiny(name, tmp_path / "export", shorter, samples=2, max_new_tokens=3)
    graphs = [onnx.load(path, load_external_data=False).graph for path in result.out.rglob("*.onnx")]
    caches = {port.name for graph in graphs for port in graph.input if port.name.startswith("past")}
    assert caches and {name.split(".")[1] for name in caches} == {"0"}


def test_a_ratio_of_what_is_inside_blocks_is_refused_where_blocks_are_planned_and_so_is_both_at_once():
    model = tiny_model("llava").model
    blocks = find_blocks(model, find_family(model.config))
    scores = score_groups(blocks, CRITERIA["random"])
    with pytest.raises(InfeasibleBudgetError, match="mlp ratio: no unit of that kind is planned here; leave it out"):
        plan_units(blocks, scores, Budget(0.3, kind_ratio={"mlp": 0.1}), facts_of(model, blocks))
    both = (*blocks, *find_groups(model, find_family(model.config)))
    with pytest.raises(ValueError, match="planned one after the other"):
        plan_units(both, scores, Budget(0.3), facts_of(model, both))


@pytest.mark.parametrize(
    "name", sorted(set(FACTORIES) - {"qwen3_vl"})
)  # one block per tower may leave, and a floor is one
def test_planned_blocks_are_what_the_cut_model_has_left_and_rounds_are_one_cut(name):
    tiny, planning = tiny_model(name), Planning(Budget(0.25, layout="stock"), CRITERIA["influence"], rounds=2)
    plan = plan_in_rounds(tiny.model, lambda _: [tiny.inputs(2)], planning).plan
    model = apply_plan(tiny_model(name).model, Plan.from_json(plan.to_json()))
    assert count_parameters(model) == plan.parameters_after < plan.parameters_before - plan.dropped_parameters
    assert sum(map(len, plan.gone.values())) >= 1 and set(plan.keep) == {f"{tower}.block" for tower in plan.blocks}
