"""What a compression takes: of every family, block by block, on known machines; and `inspect --cost`."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from click.testing import CliRunner
from tiny_models import FACTORIES, tiny_model

from slimvlm.cli import main
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import count_parameters
from slimvlm.serve.costing.anatomy import model_anatomy
from slimvlm.serve.costing.asked import Asked
from slimvlm.serve.costing.cost import CostModel, cost_of
from slimvlm.serve.costing.machines import MACHINES

GPU = MACHINES["cuda:rtx-4090"]


def anatomy(name, side=16):
    model = tiny_model(name).model
    return model_anatomy(model, find_family(model.config), side)


@pytest.fixture(scope="module")
def llava():
    return anatomy("llava")


@pytest.mark.parametrize("name", FACTORIES)
def test_every_family_has_a_cost_whole_and_streamed(name):
    model = tiny_model(name).model
    found = anatomy(name)
    assert found.parameters == count_parameters(model) and 0 < found.in_blocks <= found.parameters
    cost = cost_of(found, Asked(samples=8), GPU)
    whole = {stage.name: stage.seconds for stage in cost.stages}
    streamed = {stage.name: stage.streamed_seconds for stage in cost.stages}
    assert all(0 < seconds < math.inf for seconds in whole.values())
    assert {name for name, seconds in streamed.items() if seconds is None} == {"recover", "evaluate"}
    assert all(part.forward_flops > 2 * part.parameters * 0.5 for part in cost.parts)


def test_streamed_memory_does_not_grow_with_depth_and_whole_memory_does(llava):
    deep = replace(llava, blocks=tuple(replace(kind, blocks=100 * kind.blocks) for kind in llava.blocks))
    deep = replace(deep, shapes=replace(llava.shapes, parameters=llava.parameters + 99 * llava.in_blocks))
    few, many = (CostModel(one, Asked(samples=1, refit=False), GPU) for one in (llava, deep))
    assert many.resident == few.resident
    grown = {streamed: many.peak("export", streamed) - few.peak("export", streamed) for streamed in (False, True)}
    assert grown[True] == 0 and grown[False] == pytest.approx(4 * 99 * llava.in_blocks)


def test_what_a_calibration_computes_is_a_forward_and_a_backward_pass_and_streamed_one_forward_more(llava):
    model = CostModel(llava, Asked(), GPU)
    forward, backward = model.passes(8, 1, 0), model.passes(8, 0, 1)
    assert model.calibration(8, streamed=False).compute == pytest.approx(forward.compute + backward.compute)
    assert model.calibration(8, streamed=True).compute == pytest.approx(2 * forward.compute + backward.compute)
    assert forward.compute < backward.compute < 2 * forward.compute  # attention takes two products more
    assert model.calibration(8, streamed=False).stream == 0 < model.calibration(8, streamed=True).stream


def test_rounds_samples_and_the_refit_cost_what_they_add(llava):
    one = CostModel(llava, Asked(rounds=1, refit=False), GPU)
    two = CostModel(llava, Asked(rounds=1, refit=False, samples=1024), GPU)
    fitted = CostModel(llava, Asked(rounds=1), GPU)
    several = CostModel(llava, Asked(refit=False), GPU)
    more = two.ideal("plan", False).compute - one.ideal("plan", False).compute
    assert more == pytest.approx(one.calibration(512, streamed=False).compute)
    assert (
        one.ideal("plan", False).compute < several.ideal("plan", False).compute < 4 * one.ideal("plan", False).compute
    )
    assert fitted.ideal("slice", False).compute > one.ideal("slice", False).compute


def test_a_recovery_block_by_block_computes_what_one_of_the_whole_does_and_holds_a_block_of_it(llava):
    stages = {stage.name: stage for stage in cost_of(llava, Asked(), GPU).stages}
    model, block = CostModel(llava, Asked(), GPU), stages["blockwise"]
    assert model.ideal("blockwise", False).compute == pytest.approx(model.ideal("recover", False).compute)
    assert model.ideal("blockwise", True).compute > model.ideal("blockwise", False).compute
    assert block.peak_bytes < stages["recover"].peak_bytes and block.written_bytes == stages["recover"].written_bytes
    assert block.streamed_read_bytes == pytest.approx(model.read("blockwise", True), abs=1)
    once = sum(stage.written_bytes for stage in stages.values()) - block.written_bytes
    assert cost_of(llava, Asked(), GPU).disk_bytes == once  # of two recoveries one is saved
    long = CostModel(llava, Asked(text_tokens=10**8), GPU)
    assert next(one for one in long.stages() if one.name == "blockwise").scratch_bytes == 2 * 2**30


def test_inputs_that_memory_does_not_hold_need_room_on_the_disk(llava):
    many = cost_of(llava, Asked(samples=10**8), GPU)
    few = cost_of(llava, Asked(samples=1), GPU)
    assert few.stages[0].scratch_bytes == 0 < many.stages[0].scratch_bytes
    assert many.disk_bytes > many.stages[0].scratch_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("costs")
    tiny_model("llava").model.save_pretrained(where / "my-vlm")
    return where / "my-vlm"


def inspect(*words):
    return CliRunner().invoke(main, ["inspect", *map(str, words)])


def test_inspect_tells_the_cost_in_words_and_as_json(folder):
    told = inspect(folder, "--cost", "--device", "cuda:rtx-4090", "--samples", 8)
    assert told.exit_code == 0, told.output
    assert "one RTX 4090, 24 GB; by data sheets and an assumed efficiency: not measured" in told.output
    for stage in ("plan", "slice", "recover", "blockwise", "evaluate", "export"):
        assert f"\n{stage} " in told.output
    document = json.loads(inspect(folder, "--cost", "--device", "cuda:rtx-4090,cuda:8xh100", "--json").stdout)
    assert [len(machine["stages"]) for machine in document["machines"]] == [6, 6]
    assert document["asked"]["samples"] == 512


def test_the_machine_at_hand_is_measured(folder):
    (here,) = json.loads(inspect(folder, "--cost", "--device", "cpu", "--json").stdout)["machines"]
    assert here["measured"] and all(stage["seconds"] > 0 for stage in here["stages"])


def test_an_unknown_machine_is_refused_with_those_that_are_known(folder):
    refused = inspect(folder, "--cost", "--device", "cuda:abacus")
    assert refused.exit_code == 3
    assert "the machine 'cuda:abacus' is unknown; choose one of auto, cpu, cpu:2-cores" in refused.output
