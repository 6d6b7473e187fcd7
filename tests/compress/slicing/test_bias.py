"""Biases that the cut model has and the stock class has not: what they make up for, and that they last."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from outputs import logits
from plans import give_biases, keep_blocks, make_plan, random_plan
from tiny_folders import write_tiny
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.errors import CheckpointError, UnsuitableOptionError
from slimvlm.compress.models.checkpoint import load
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.compensation import COMPENSATIONS
from slimvlm.compress.stages.plan import check_plan, planning_of
from slimvlm.pipeline import compress

PATH = "model.language_model.layers.0.mlp.down_proj"


def first_biases(model) -> dict[str, torch.Tensor]:
    return {path: model.get_parameter(f"{path}.bias") for path in model.config.slimvlm.get("biases", {})}


def close(left, right, batch) -> None:
    torch.testing.assert_close(logits(left, batch), logits(right, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_a_model_with_biases_that_its_class_has_not_is_saved_loaded_and_cut_again(name, tmp_path):
    tiny = tiny_model(name, "sdpa")
    missing = {
        group.members[-1].path
        for group in find_groups(tiny.model, find_family(tiny.model.config))
        if tiny.model.get_submodule(group.members[-1].path).bias is None
    }
    plain = logits(apply_plan(tiny.model, random_plan(tiny.model, seed=1)), tiny.inputs(2))
    model = give_biases(tiny.model)
    assert set(first_biases(model)) == missing
    assert not torch.allclose(logits(model, tiny.inputs(2)), plain, atol=1e-3)
    save_checkpoint(tmp_path / "out", model, None, None)
    loaded, _ = load(tmp_path / "out")
    state = model.state_dict()
    assert all(value.equal(state[key]) for key, value in loaded.state_dict().items())
    close(loaded, model, tiny.inputs(2))
    apply_plan(loaded, random_plan(loaded, seed=3))  # counts every parameter
    assert set(first_biases(loaded)) == missing


def test_plain_transformers_builds_the_biases(tmp_path):
    tiny = tiny_model("llava", "sdpa")
    model = give_biases(apply_plan(tiny.model, random_plan(tiny.model)))
    save_checkpoint(tmp_path / "out", model, None, None)
    loaded, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values())
    assert set(first_biases(loaded)) == set(first_biases(model)) != set()
    close(loaded, model, tiny.inputs(2))


def test_biases_move_with_their_blocks(tmp_path):
    tiny = tiny_model("llava", "sdpa")
    model = give_biases(apply_plan(tiny.model, random_plan(tiny.model)))
    second = model.get_parameter(PATH.replace("0", "1") + ".bias").clone()
    apply_plan(model, keep_blocks(model, lambda group: [0] if group.tower == "language" else []))
    assert first_biases(model)[PATH].equal(second)
    save_checkpoint(tmp_path / "out", model, None, None)
    close(load(tmp_path / "out")[0], model, tiny.inputs(2))


def test_the_stock_layout_refuses_a_bias_that_its_class_has_not(tmp_path):
    tiny = tiny_model("llava")
    whole = apply_plan(tiny.model, make_plan(tiny.model, lambda group: range(group.size)))
    with pytest.raises(CheckpointError, match="layout stock: the unmodified class would build .*bias as"):
        save_checkpoint(tmp_path / "out", give_biases(whole), None, None, "stock")
    options = CompressOptions(
        model=str(write_tiny(tmp_path, samples=1)[0]), data=tmp_path, out=tmp_path, layout="stock", ratio=0.1
    )
    for name, row in COMPENSATIONS.items():
        asked = replace(options, compensation=name)
        if row.stand_in is None:
            check_plan(asked)
        else:
            with pytest.raises(
                UnsuitableOptionError, match=f"--compensation {name.replace('+', '.')} gives model.lang"
            ):
                check_plan(asked)


def test_between_rounds_no_projection_gets_its_first_bias(tmp_path):
    options = CompressOptions(model="m", data=tmp_path, out=tmp_path)
    found = {name: planning_of(replace(options, compensation=name)).between for name in COMPENSATIONS}
    assert found == {name: "refit" if name.startswith("refit") else "none" for name in COMPENSATIONS}


def test_the_bias_gives_the_mean_output_back_and_a_refit_with_one_loses_least():
    tiny = tiny_model("llava")
    family, plan = find_family(tiny.model.config), random_plan(tiny.model)
    groups = find_groups(tiny.model, family)
    batches = [lambda index=index: {**tiny.inputs(index)} for index in (2, 3)]
    read, module = [], tiny.model.get_submodule(PATH)
    handle = module.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach().flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            tiny.model(**batch())
    handle.remove()
    x, kept = torch.cat(read).double(), list(plan.keep["language.0.mlp"])
    dense = x @ module.weight.detach().double().T
    found = {name: COMPENSATIONS[name](tiny.model, family, groups, plan.keep, batches) for name in COMPENSATIONS}
    left = {}
    for name in ("bias", "refit", "refit+bias"):
        weight, bias = found[name].weights[PATH]
        out = x[:, kept] @ weight.double().T + (0 if bias is None else bias.double())
        left[name] = ((dense - out).square().sum() / dense.square().sum()).item()
        if name != "refit":
            torch.testing.assert_close(out.mean(0), dense.mean(0), atol=1e-5, rtol=1e-4)
    assert found["bias"].weights[PATH][0].equal(module.weight[:, kept])
    assert left["refit+bias"] < min(left["refit"], left["bias"])
    assert found["refit+bias"].lost < found["refit"].lost < found["bias"].lost < found["bias"].lost_by_cut
    assert found["bias"].lost_by_cut == pytest.approx(found["refit"].lost_by_cut, rel=1e-4)


def test_the_whole_job_with_a_bias_recovers_merges_and_saves_what_it_trained(tmp_path):
    model, data = write_tiny(tmp_path)
    options = CompressOptions(
        model=str(model), data=data, out=tmp_path / "out", compensation="bias", criterion="flap", rounds=1, samples=8,
        ratio=0.2, steps=2, export=(), profile=False, device="cpu", batch_size=4, train_batch_size=4,
    )  # fmt: skip
    plan = compress(options).plan
    assert plan.compensation.name == "bias"
    loaded, _ = load(tmp_path / "out" / "model")
    given = sum(len(bias) for bias in first_biases(loaded).values())
    assert given > 0 and sum(one.numel() for one in loaded.parameters()) == plan.parameters_after + given
