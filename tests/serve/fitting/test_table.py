"""Cost tables from files: what lies between two points, what is foretold of a plan, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from plans import make_plan, random_plan
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.allocate.budget import Budget, plan_units
from slimvlm.compress.allocate.bundles import lines_of
from slimvlm.compress.allocate.costs import Times
from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.errors import OutputError, UnsuitableOptionError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.serve.fitting.table import CostTable, Point, Setting, kind_of, shape_digest

SETTING = Setting("shape", "a processor", 1, {"onnxruntime": "1"}, "onnx:int8", 1, None, None, 32)


def point(kept, tpot, noise=0.02):
    return Point(kept, {"tpot": tpot, "vision": 1.0}, {"tpot": noise, "vision": noise})


def table(**kinds):
    dense = {"tpot": 10.0, "vision": 4.0}
    return CostTable(SETTING, dense, {name.replace("_", "."): points for name, points in kinds.items()})


MLP = (point(0.75, 0.9), point(0.5, 0.92), point(0.25, 0.6))  # the middle one was measured too slow


def test_between_two_widths_time_is_linear_and_a_smaller_one_never_costs_more():
    made = table(language_mlp=MLP)
    widths = np.array([1.0, 0.875, 0.75, 0.6, 0.5, 0.375, 0.25, 0.1])
    np.testing.assert_allclose(made.saved("language.mlp", "tpot", widths), [0, 0.5, 1, 1, 1, 2.5, 4, 4])
    assert not made.saved("language.mlp", "vision", widths).any()
    assert not made.saved("vision.mlp", "tpot", widths).any()  # never measured


@pytest.mark.parametrize("name", FACTORIES)
def test_a_plan_is_foretold_as_what_all_its_blocks_win_together(name):
    model = tiny_model(name).model
    groups = find_groups(model, find_family(model.config))
    kinds = dict.fromkeys(map(kind_of, groups))
    made = CostTable(SETTING, {"vision": 40.0}, {kind: (_half(kind),) for kind in kinds})
    whole = make_plan(model, lambda group: range(group.size))
    assert made.predict(whole, groups) == {"vision": pytest.approx(40.0)}
    half = make_plan(model, lambda group: range(group.size // 2) if group.kind == "mlp" else range(group.size))
    won = sum(0.01 * 40 for kind in kinds if kind.endswith("mlp"))
    assert made.predict(half, groups) == {"vision": pytest.approx(40.0 - won)}
    some = made.predict(random_plan(model), groups)["vision"]
    assert 40 - 0.01 * 40 * len(kinds) <= some <= 40


def _half(kind):
    return Point(0.5, {"vision": 0.99}, {"vision": 0.0})


def test_a_table_is_read_as_it_was_written_and_by_nobody_elses_device_or_model(tmp_path):
    made = table(language_mlp=MLP)
    made.save(tmp_path / "table.json")
    assert CostTable.read(tmp_path / "table.json", SETTING) == made
    for change, said in (
        ({"device": "another processor"}, "device a processor, not another processor"),
        ({"shape": "other"}, "shape"),
        ({"versions": {"onnxruntime": "2"}}, "versions"),
    ):
        other = replace(SETTING, **change)
        assert other.digest != SETTING.digest
        with pytest.raises(OutputError, match=said):
            CostTable.read(tmp_path / "table.json", other)


@pytest.mark.parametrize(
    "damage",
    [
        {"points": {"language.mlp": [{"kept": 0.5, "share": {}, "noise": {}}]}},
        {"points": {"language.mlp": [{"kept": 1.5, "share": {"tpot": 1.0}, "noise": {"tpot": 0.0}}]}},
        {"dense": {"tpot": -1.0}},
        {"schema": 7},
        {"surprise": 1},
    ],
)
def test_a_damaged_table_is_refused_in_one_sentence(tmp_path, damage):
    path = tmp_path / "table.json"
    table(language_mlp=MLP).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(OutputError, match="does not fit"):
        CostTable.read(path, SETTING)


def test_a_table_that_is_too_noisy_is_refused_and_says_where():
    assert table(language_mlp=MLP).refuse_noise() == table(language_mlp=MLP)
    with pytest.raises(UnsuitableOptionError, match="vision with language.mlp at 25% is known to 30% only"):
        table(language_mlp=(*MLP[:2], point(0.25, 0.6, noise=0.3))).refuse_noise()


def test_the_shape_of_a_model_is_that_of_its_weights_whatever_their_values():
    model = tiny_model("llava").model
    before = shape_digest(model)
    for weight in model.parameters():
        weight.data.zero_()
    assert shape_digest(model) == before != shape_digest(model.model.language_model)


def test_units_are_ranked_by_importance_per_time_and_what_wins_none_stays():
    model = tiny_model("smolvlm").model
    groups = find_groups(model, find_family(model.config))
    kinds = dict.fromkeys(map(kind_of, groups), (Point(0.5, {"tpot": 1.0}, {"tpot": 0.0}),))  # nothing is won ...
    kinds["language.mlp"] = (Point(0.5, {"tpot": 0.5}, {"tpot": 0.0}),)  # ... but there
    made = CostTable(SETTING, {"tpot": 10.0}, kinds)
    budget, random = Budget(ratio=0.05, allocator="global"), score_groups(groups, CRITERIA["random"])
    plain, timed = (
        plan_units(groups, random, replace(budget, times=times), facts_of(model, groups))
        for times in (None, made.times(groups, {"tpot": 5.0}))
    )
    others = [group for group in groups if kind_of(group) != "language.mlp"]
    assert sum(len(timed.keep[group.key]) < group.size for group in others) <= 1  # a last unit that fits what is left
    assert sum(len(plain.keep[group.key]) < group.size for group in others) > 3
    assert timed.options["cost"] == "milliseconds" and "cost" not in plain.options
    assert abs(timed.removed_fraction - 0.05) < 0.01 > abs(plain.removed_fraction - 0.05)
    assert made.predict(timed, groups)["tpot"] < made.predict(plain, groups)["tpot"]


def test_bundles_out_of_order_share_a_quotient_and_no_rank_is_reversed():
    model = tiny_model("llava").model
    groups = [group for group in find_groups(model, find_family(model.config)) if kind_of(group) == "language.mlp"]
    random = score_groups(groups, CRITERIA["random"])
    kept, won = np.array([0.0, 0.5, 0.75, 1.0]), np.array([4.0, 4.0, 0.1, 0.0])  # little until the half is reached
    times = Times({group.key: (kept, won) for group in groups}, 1e-3)
    (line, *_) = lines_of(groups, random, 1)
    rank = times.rank(line, {group.key: group.size for group in groups})
    size = groups[0].size
    assert (np.diff(rank) >= 0).all() and len(np.unique(rank[: size // 2])) < size // 4 and rank[0] < rank[-1]
