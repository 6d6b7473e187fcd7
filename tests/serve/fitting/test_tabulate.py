"""Tables that are measured: which copies are made, and that an interrupted one goes on. No time is judged."""

from dataclasses import replace

import pytest
from plans import make_plan
from profiling import save_pair
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import count_parameters, find_groups
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.serve.fitting.goals import read_goals
from slimvlm.serve.fitting.table import CostTable, Point, kind_of
from slimvlm.serve.fitting.tabulate import cached_table, narrowed_copies, setting_of
from slimvlm.serve.fitting.trials import Workbench, doubt
from slimvlm.serve.options import ProfileOptions

QUICK = {"device": "cpu", "threads": 1, "batch_sizes": (1,), "new_tokens": (3,), "warmup": 1, "starts": 1, "rounds": 2}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    dense, _ = save_pair(tmp_path_factory.mktemp("pair"))
    return Workbench(dense, ProfileOptions(slim="", **QUICK))


@pytest.mark.parametrize("name", FACTORIES)
def test_the_copies_narrow_one_kind_each_and_every_model_can_be_cut_so(name, tmp_path):
    model = tiny_model(name).model
    model.config.save_pretrained(tmp_path)
    bench = Workbench(str(tmp_path), ProfileOptions(slim=""))
    copies = list(narrowed_copies(bench))
    assert {copy.kind for copy in copies} == {kind_of(group) for group in _groups(model)}
    later = list(narrowed_copies(replace(bench, goals=read_goals(["tpot=1ms"])), (0.5,)))  # images were seen before
    assert {copy.kind for copy in later} == {kind_of(one) for one in _groups(model) if one.modality == "language"}
    for copy in copies:
        narrower = {key for key, kept in copy.plan.keep.items() if len(kept) < copy.plan.sizes[key]}
        assert narrower == {group.key for group in _groups(model) if kind_of(group) == copy.kind}
        assert count_parameters(apply_plan(tiny_model(name).model, copy.plan)) == copy.plan.parameters_after


def _groups(model):
    return find_groups(model, find_family(model.config))


class KilledError(Exception):
    """What ends a table early here."""


def test_an_interrupted_table_goes_on_and_a_finished_one_is_not_measured_again(bench, tmp_path):
    setting, stages = setting_of(bench, "torch"), []
    path = tmp_path / f"{setting.digest}.json"
    phases = dict.fromkeys(("vision", "prefill", "ttft", "tpot"), 1.0)
    first, second, *rest = narrowed_copies(bench, (0.5,))
    known = {copy.kind: (Point(copy.kept, phases, phases),) for copy in rest}
    CostTable(setting, phases, known).save(path)

    def tell(stage, done, total, note="", /):
        stages.append((done, total))
        if (1, 2) in stages and len(stages) < 4:
            raise KilledError

    def build():  # one start of a process tells nothing of noise, so the table is refused, but written
        return cached_table(bench, "torch", tmp_path, tell, widths=(0.5,))

    with pytest.raises(KilledError):
        build()
    assert set(CostTable.read(path, setting).points) == {first.kind, *known}
    with pytest.raises(UnsuitableOptionError, match="is known to 100% only"):
        build()
    table = CostTable.read(path, setting)
    assert set(table.points) == {first.kind, second.kind, *known} and stages[-1] == (1, 1)
    written = path.stat().st_mtime_ns
    with pytest.raises(UnsuitableOptionError):
        build()
    assert path.stat().st_mtime_ns == written


def test_a_trial_makes_no_more_than_its_targets_need(bench):
    plan = make_plan(tiny_model("llava", "sdpa").model, lambda group: range(group.size // 2))
    counted = bench.try_out(plan, 0.3, "torchscript", ["params"])
    assert counted.figures == {"params": plan.parameters_after}
    stored = bench.try_out(plan, 0.3, "torchscript", ["size"])
    assert stored.figures["params"] * 4 < stored.figures["size"] < stored.figures["params"] * 4 + 5e5
    assert set(stored.figures) == {"params", "size"} and not stored.spread
    measured = bench.try_out(plan, 0.3, "torch", ["memory"])
    assert {"memory", "ttft", "tpot", "vision"} <= set(measured.figures) and "tpot" in measured.spread


def test_a_spread_matters_only_where_it_decides_whether_a_target_is_met():
    goals = read_goals(["tpot=10ms", "ttft=100ms", "size=1MB"])
    figures = {"tpot": 14.0, "ttft": 97.0, "vision": 3.0}
    assert doubt(goals, figures, {"tpot": 0.08, "ttft": 0.01, "vision": 0.5}) == 0.01
    assert doubt(goals, figures, {"tpot": 0.25, "ttft": 0.0, "vision": 0.5}) == 0.25
    assert doubt([], figures, {"tpot": 0.5}) == 0
