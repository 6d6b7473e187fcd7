"""Rows of a study: which cell one is of, what they say together, and how long what is left takes."""

from dataclasses import replace
from pathlib import Path

import pytest

from slimvlm.compress.errors import OutputError
from slimvlm.compress.options import CutOptions
from slimvlm.serve.study.choosing import best, summaries
from slimvlm.serve.study.schedule import expected_seconds, in_order, seconds_left
from slimvlm.serve.study.study import MISSED, RESULTS, Bed, Cell, Row, failed, kept_share, missing, read_rows, said_of
from slimvlm.serve.study.tables import grids, lost_words, markdown

BED = Bed("demo", "model", Path("train"), Path("val"), seconds={"evaluate": 2.0, "cut": 3.0, "round": 4.0, "step": 0.5})


def cell(method: str = "gate", ratio: float = 0.5, seed: int = 0, largest: float | None = None, **changes) -> Cell:
    options = {"rounds": 1, "recover": "none", **changes}
    options = CutOptions(model="model", data=Path("train"), out=Path(), ratio=ratio, seed=seed, **options)
    return Cell(BED, method, options, largest or ratio, said_of(options, largest or ratio, Path()))


def row(of: Cell, score: float = 0.5, split: str = "val", **facts) -> Row:
    facts = {"status": "measured", "score": score, "kept": score, "removed": of.options.ratio, "reason": "", **facts}
    return replace(failed(of, split, ""), **facts)


def base(method: str, score: float) -> Row:
    return replace(row(cell(), score), method=method, ratio=0.0, options={}, questions=7)


def test_a_row_is_of_the_cell_with_its_options_whatever_it_is_called():
    asked = cell(criterion="taylor")
    assert missing([asked], "val", [row(replace(asked, method="another name"))]) == []
    assert missing([asked], "val", [row(asked, split="test")]) == [asked]
    for other in (cell(), cell(criterion="taylor", seed=1), cell(criterion="taylor", largest=0.7)):
        assert missing([asked], "val", [row(other)]) == [asked]


def test_an_option_that_an_older_version_did_not_know_was_what_it_is_unsaid():
    asked, said = cell(), dict(cell().said)
    del said["compensate_rounds"]
    assert missing([asked], "val", [replace(row(asked), options=said)]) == []
    assert missing([cell(compensate_rounds=False)], "val", [replace(row(asked), options=said)]) != []


def test_rows_are_read_as_they_were_written_and_a_damaged_line_is_named(tmp_path):
    rows = [base("dense", 0.9), row(cell(), 0.4, seconds={"plan": 1.0}, tasks={"count": 0.5})]
    (tmp_path / RESULTS).write_text("".join(f"{one.to_line()}\n" for one in rows))
    assert read_rows(tmp_path) == rows
    (tmp_path / RESULTS).write_text(rows[0].to_line() + "\n{}\n")
    with pytest.raises(OutputError, match=r"results.jsonl does not fit: line 2: key 'bed' is missing"):
        read_rows(tmp_path)


def test_the_kept_share_is_none_for_the_blind_model_and_all_for_the_dense_one():
    rows = [base("dense", 0.9), base("blind", 0.1)]
    assert [kept_share(score, rows, "demo", "val") for score in (0.1, 0.5, 0.9)] == pytest.approx([0, 0.5, 1])
    assert kept_share(0.5, rows[:1], "demo", "val") is None
    assert kept_share(0.5, [rows[0], base("blind", 0.9)], "demo", "val") is None


def test_the_best_is_the_highest_of_those_with_all_sets_on_validation_questions():
    lucky, good, bad = (
        cell("lucky"),
        [cell("good", seed=seed) for seed in (0, 1)],
        [cell("bad", seed=s) for s in (0, 1)],
    )
    rows = [row(lucky, 0.9), row(good[0], 0.7, token_loss=2.0), row(good[1], 0.5, token_loss=2.0)]
    rows += [row(one, 0.5, token_loss=1.0) for one in bad] + [row(one, 0.99, split="test") for one in bad]
    assert [one.method for one in best(rows)] == ["good"]
    assert [one.method for one in best(rows, "val-loss")] == ["bad"]
    found = next(one for one in summaries(rows) if one.method == "good").score
    assert (found.mean, found.low, found.high) == pytest.approx((0.6, 0.5, 0.7))


def test_a_table_says_the_range_over_sets_what_missed_its_ratio_and_what_failed():
    rows = [
        base("dense", 0.9),
        base("blind", 0.1),
        row(cell(seed=0), 0.6, seconds={"plan": 3.0}),
        row(cell(seed=1), 0.4),
    ]
    rows.append(replace(row(cell("literal"), status=MISSED, removed=0.62), score=None))
    rows.append(failed(cell("broken"), "val", "no such thing"))
    text = markdown(grids(rows)[0])
    assert "demo: dense 90.0, blind 10.0 (mean of tasks, 7 questions of val)" in text
    assert "| gate | 50.0 (40.0-60.0), 50 % | 50.0 % | 3 |" in text
    assert "| literal | missed, 62.0 % removed | 62.0 % | - |" in text
    assert "| broken | failed | - | - |" in text
    assert lost_words(rows) == ["demo, broken, 50 %, set 0 (val): no such thing"]


def test_cells_go_set_by_set_and_in_a_row_the_most_telling_ratios_first():
    cells = [cell(method, ratio, seed) for method in "ab" for seed in (0, 1) for ratio in (0.2, 0.35, 0.5)]
    order = [(one.options.seed, one.method, one.options.ratio) for one in in_order(cells)]
    assert order[:6] == [(0, "a", 0.35), (0, "a", 0.2), (0, "a", 0.5), (0, "b", 0.35), (0, "b", 0.2), (0, "b", 0.5)]
    assert {seed for seed, _, _ in order[6:]} == {1}


def test_what_is_left_takes_as_long_as_what_is_alike_took_or_as_the_file_expects():
    assert expected_seconds(cell(rounds=8)) == 2 + 3 + 8 * 4
    assert expected_seconds(cell(rounds=8), sharing=4) == 2 + 3 + 2 * 4
    assert expected_seconds(cell(recover="sft", steps=100)) == 2 + 3 + 4 + 50
    rows = [row(cell(), seconds={"spent": 10.0}), row(cell(criterion="taylor"), seconds={"spent": 20.0})]
    assert seconds_left([cell(seed=1), cell(criterion="taylor", seed=1)], rows) == 30
    assert seconds_left([cell(criterion="fisher")], rows) == 15
    assert seconds_left([cell(recover="sft", steps=100)], rows) == 59
    unknown = replace(cell(recover="sft", steps=100), bed=replace(BED, seconds={}))
    assert seconds_left([unknown], rows) is None and seconds_left([], rows) == 0
    one_plan = [cell(ratio=ratio, rounds=8, largest=0.7) for ratio in (0.35, 0.5, 0.6, 0.7)]
    assert seconds_left(one_plan, []) == pytest.approx(4 * (2 + 3) + 8 * 4)
