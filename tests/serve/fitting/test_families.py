"""Targets hold for every family: the whole model first, then the beginning of an order. Nothing is run, so no clock and
no processor is needed: bytes and parameters are counted."""

from dataclasses import replace

import pytest
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.allocate.budget import Budget, order_units
from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.allocate.order import Order
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.data.splits import Measured
from slimvlm.compress.errors import InfeasibleBudgetError
from slimvlm.compress.files.decoding import read
from slimvlm.compress.models.checkpoint import locate
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.progress import silent
from slimvlm.compress.runs import ORDER, PLAN, RunFolder
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.serve.fitting.stage import fit_stage, fit_whole

DATA = Measured((), (), False, "d" * 64, ())


def options_of(folder, *targets):
    model = folder / "model"
    return CompressOptions(
        model=str(model), out=folder / "out", data=folder, target=targets, backend="torch", device="cpu"
    )


def begin(options):
    return RunFolder(options.out, options.identity(), resume=True)


def order_of(folder, name) -> Order:
    model = tiny_model(name).model
    groups = find_groups(model, find_family(model.config))
    order = order_units(groups, score_groups(groups, CRITERIA["random"]), Budget(ratio=0.25), facts_of(model, groups))
    plan = replace(order.plan, model_digest=locate(folder / "model")[1], calibration_digest=DATA.digest)
    return replace(order, plan=plan)


@pytest.mark.parametrize("name", FACTORIES)
def test_the_whole_model_is_tried_before_any_calibration_and_a_cut_only_where_it_does_not_do(name, tmp_path):
    save_checkpoint(tmp_path / "model", tiny_model(name).model, None, None)
    options = options_of(tmp_path, "size=100MB", "params=100M")
    run = begin(options)
    with run.begun():
        fit = fit_whole(run, options, DATA, silent)
        plan = read(options.out / PLAN, Plan)
        assert fit.chosen.is_whole and "No pruning needed" in fit.sentences[0] and not run.facts("plan")
        assert plan.parameters_after + plan.dropped_parameters == plan.parameters_before
        assert fit.chosen.figures["params"] == plan.parameters_after

        tighter = replace(options, target=(f"params={0.85 * plan.parameters_before:.0f}",))
        order = order_of(tmp_path, name)
        order.save(options.out / ORDER)
        assert (fit_whole(run, tighter, DATA, silent) is None) == (plan.parameters_after > tighter_amount(tighter))
        cut = fit_stage(run, tighter, DATA, silent)
        found = read(options.out / PLAN, Plan)
        assert found == (plan if cut.chosen.is_whole else order.plan_at(cut.chosen.ratio))
        assert found.parameters_after <= tighter_amount(tighter)

        with run.stage("plan"), run.stage("slice"):
            pass
        assert fit_whole(run, replace(options, target=()), DATA, silent) is None  # no targets any more
        assert read(options.out / PLAN, Plan) == order.plan and not run.finished("slice")

        with pytest.raises(InfeasibleBudgetError, match="params 9 parameters cannot be met: the best"):
            fit_stage(run, replace(options, target=("params=9",)), DATA, silent)
    slim = apply_plan(tiny_model(name).model, found)
    assert sum(parameter.numel() for parameter in slim.parameters()) == found.parameters_after


def tighter_amount(options):
    return float(options.target[0].partition("=")[2])
