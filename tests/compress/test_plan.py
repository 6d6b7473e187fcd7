"""The plan file: round trip, refusals that name the key, and composition of rounds."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimvlm.compress.plan import Compensating, Plan, TowerCount

KEYS = st.text("abcdefghijklmnopqrstuvwxyz.0123456789", min_size=1, max_size=12)


def plan_of(sizes, keep, **changes):
    count = TowerCount(parameters_before=100, parameters_after=60, macs_before=90, macs_after=50)
    values = {
        "family": "llava", "model_digest": "d1", "criterion": "ukmi", "allocator": "balanced", "layout": "per-layer",
        "attention_unit": "auto", "rounds": 1, "seed": 0, "ratio": 0.4, "calibration_digest": "c1",
        "parameters_before": 120, "parameters_after": 80, "towers": {"language": count}, "options": {"floor": 0.1},
    }  # fmt: skip
    return Plan(**{**values, "sizes": sizes, "keep": keep, **changes})


@st.composite
def groups(draw):
    size = draw(st.dictionaries(KEYS, st.integers(1, 30), max_size=6))
    keep = {key: draw(kept_of(count)) for key, count in size.items()}
    return size, keep


def kept_of(size):
    return st.sets(st.integers(0, size - 1), min_size=1).map(lambda kept: tuple(sorted(kept)))


INTEGERS, FLOATS = st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.builds(TowerCount, *[st.integers(0, 2**60)] * 4)
OPTIONS = st.dictionaries(KEYS, st.one_of(st.none(), st.booleans(), INTEGERS, KEYS, FLOATS))


@given(groups(), st.dictionaries(KEYS, COUNTS, max_size=3), OPTIONS, st.floats(0, 1))
def test_json_round_trip_gives_the_same_plan_and_the_same_bytes(sizes_and_keep, towers, options, ratio):
    plan = plan_of(*sizes_and_keep, towers=towers, options=options, ratio=ratio)
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text


def test_json_is_sorted_with_one_line_per_group():
    text = plan_of({"b": 3, "a": 3}, {"b": (0, 2), "a": (1,)}).to_json()
    assert text.endswith('  "keep": {\n    "a": [1],\n    "b": [0, 2]\n  }\n}\n')
    assert text == plan_of({"a": 3, "b": 3}, {"a": (1,), "b": (0, 2)}).to_json()


@pytest.mark.parametrize("key", [field.name for field in fields(Plan)])
def test_a_missing_key_is_refused_by_name(key):
    document = json.loads(plan_of({"a": 3}, {"a": (1,)}).to_json())
    del document[key]
    with pytest.raises(ValueError, match=f"plan: key '{key}' is missing"):
        Plan.from_json(json.dumps(document))


def test_an_unknown_key_is_refused_by_name():
    document = json.loads(plan_of({"a": 3}, {"a": (1,)}).to_json())
    with pytest.raises(ValueError, match="plan: unknown key 'weights'; known are allocator, "):
        Plan.from_json(json.dumps({**document, "weights": 1}))
    document["towers"]["language"]["flops"] = 1
    with pytest.raises(ValueError, match="plan.towers.language: unknown key 'flops'"):
        Plan.from_json(json.dumps(document))


def test_a_later_schema_is_refused():
    document = json.loads(plan_of({"a": 3}, {"a": (1,)}).to_json())
    with pytest.raises(ValueError, match="schema 3 is not the 2 this version reads"):
        Plan.from_json(json.dumps({**document, "schema": 3}))


def test_a_plan_of_schema_1_is_read_and_its_refit_has_a_name():
    how = Compensating("refit", samples=8, eval_samples=None, prefix_split=False, batch_size=4)
    for plan in (plan_of({"a": 3}, {"a": (1,)}), plan_of({"a": 3}, {"a": (1,)}, compensation=how)):
        document = json.loads(plan.to_json())
        found = document.pop("compensation")
        refit = found and {name: value for name, value in found.items() if name != "name"}
        assert Plan.from_json(json.dumps({**document, "schema": 1, "refit": refit})) == plan


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"plan"'])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match=r"it is not JSON|plan: .* is not an object"):
        Plan.from_json(text)


@pytest.mark.parametrize("kept", [(), (1, 0), (0, 0), (3,), (-1, 1)])
def test_kept_indices_must_be_sorted_unique_and_inside_their_group(kept):
    with pytest.raises(ValueError, match="plan: group a "):
        plan_of({"a": 3}, {"a": kept})


def test_sizes_and_keep_must_name_the_same_groups():
    with pytest.raises(ValueError, match=r"different groups: \['b'\]"):
        plan_of({"a": 3, "b": 3}, {"a": (0,)})


def test_removed_fraction_is_of_all_parameters():
    assert plan_of({}, {}, parameters_before=200, parameters_after=150).removed_fraction == 0.25


@given(st.data(), groups())
def test_composition_keeps_what_both_plans_keep_in_dense_numbering(data, sizes_and_keep):
    sizes, keep = sizes_and_keep
    left = {key: len(kept) for key, kept in keep.items()}
    later = {key: data.draw(kept_of(count)) for key, count in left.items()}
    composed = plan_of(sizes, keep).compose(plan_of(left, later, parameters_after=7, rounds=8))
    assert composed.sizes == sizes
    assert composed.keep == {key: tuple(keep[key][index] for index in later[key]) for key in sizes}
    assert (composed.parameters_before, composed.parameters_after, composed.rounds) == (120, 7, 8)


@given(groups())
def test_composition_with_keep_all_changes_nothing(sizes_and_keep):
    sizes, keep = sizes_and_keep
    plan = plan_of(sizes, keep)
    left = {key: len(kept) for key, kept in keep.items()}
    everything = plan_of(left, {key: tuple(range(count)) for key, count in left.items()})
    assert plan.compose(everything).keep == keep
    whole = plan_of(sizes, {key: tuple(range(size)) for key, size in sizes.items()})
    assert whole.compose(plan).keep == keep


def test_composed_towers_span_both_plans():
    first = plan_of({"a": 3}, {"a": (0, 2)})
    count = TowerCount(parameters_before=60, parameters_after=30, macs_before=50, macs_after=20)
    composed = first.compose(plan_of({"a": 2}, {"a": (1,)}, towers={"language": count}, model_digest="d2"))
    assert composed.towers["language"] == TowerCount(100, 30, 90, 20)
    assert composed.model_digest == "d1"
    assert composed.keep == {"a": (2,)}


def test_a_later_plan_for_other_sizes_is_refused():
    first = plan_of({"a": 3}, {"a": (0, 2)})
    with pytest.raises(ValueError, match="group a has 2 indices left, the later plan expects 3"):
        first.compose(plan_of({"a": 3}, {"a": (1,)}))
    with pytest.raises(ValueError, match="group a has 2 indices left, the later plan expects None"):
        first.compose(replace(first, sizes={}, keep={}))
