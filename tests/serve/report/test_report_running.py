"""What the report says of latency and memory: bad news first, figures from profile.json, nothing claimed unmeasured."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from profiles import example_cell, example_profile
from report_runs import Story, write_run
from report_texts import bad_news, good_news, table, text_of

from slimvlm.compress.errors import OutputError
from slimvlm.serve.profile import Cell, Limit, Memory, Profile, Ratio
from slimvlm.serve.report import write_report


def said(tmp_path: Path, profile: Profile) -> str:
    return text_of(write_run(tmp_path / "story", Story(profile=profile)))


def with_verdicts(cell: Cell, verdict: str) -> Cell:
    ratios = {phase: replace(ratio, verdict=verdict) for phase, ratio in cell.ratios.items()}
    return replace(cell, ratios=ratios)


def test_times_and_speedups_are_the_profiles(tmp_path: Path) -> None:
    text = said(tmp_path, example_profile())
    rows = table(text, "Times on a processor")
    assert rows[0] == ["1", "torch", "vision", "10", "12", "0.83", "0.79 to 0.88", "slower", "none", "none"]
    assert rows[3] == ["1", "torch", "per token", "4", "2", "2.00", "1.90 to 2.10", "faster", "250", "500"]
    assert table(text, "Memory, load time and energy on a processor")[1] == [
        "1",
        "torch",
        "slim",
        "32",
        "16",
        "64",
        "0.5",
        "none",
    ]
    assert table(text, "Workloads")[0][-2:] == ["3", "3"]  # starts, and rounds of each
    assert table(text, "Sizes of the measured models")[0] == ["parameters", "2,000,000", "1,000,000", "-50.0 %"]
    tests = table(text, "The language model alone, as llama-bench names its tests, on a processor")
    assert tests[1][:3] == ["slim", "torch fp32", "tg128"]
    assert tests[1][6:] == ["500.00 ± 0.00", "2.00 (1.90 to 2.10, faster)"]
    held = table(text, "What holds the slim model back on a processor")[0]
    assert held[3:] == ["memory-bound", "Not cut: output head (31 %).", "2.50", "2.00", "66.7 %"]
    assert table(text, "Limits") == [["max\\_ttft\\_ms", "holds", held[2], "50", "22"]]


def test_what_got_slower_or_could_not_be_measured_is_bad_news(tmp_path: Path) -> None:
    text = said(tmp_path, example_profile())
    bad = bad_news(text)
    assert "1 of 5 measured phases got slower: vision, torch fp32, batch 1, image 32 x 32" in bad
    assert "0.83 times (0.79 to 0.88)" in bad
    assert "1 workload did not fit into memory: torch fp32, batch 64" in bad
    assert "(the process was killed)" in bad
    assert "Not measured: onnx: onnxruntime is not installed" in bad
    good = good_news(text)
    assert "on a processor: first token 1.36 times (1.30 to 1.43), per token 2.00 times (1.90 to 2.10)" in good
    assert "Peak host memory went from 128 to 64 MiB (-50.0 %)" in good
    assert "The limit max\\_ttft\\_ms of 50 holds: the worst is 22" in good


def test_when_nothing_got_faster_it_is_said_first_of_all_speeds(tmp_path: Path) -> None:
    cell = with_verdicts(example_cell(), "same")
    bad = bad_news(said(tmp_path, replace(example_profile(), cells=(cell,))))
    assert "Nothing got measurably faster: of 5 phases 5 same." in bad
    assert "1 of 1 judged phases are memory-bound" in bad


def test_noise_a_missing_dense_model_crossed_limits_and_grown_memory_are_bad_news(tmp_path: Path) -> None:
    noisy = with_verdicts(example_cell(), "too noisy")
    runs = {**noisy.runs, "slim": replace(noisy.runs["slim"], memory=Memory(2**20, 0, 2**28))}
    limit = Limit("max_memory", 2.0**26, None, "", True)
    profile = example_profile()
    slim = {"slim": profile.models["slim"]}
    changed = replace(profile, cells=(replace(noisy, runs=runs),), limits=(limit,), models=slim)
    bad = bad_news(said(tmp_path, changed))
    assert "5 of 5 speed-ups are too noisy to decide" in bad
    assert "Peak host memory rose from 128 to 256 MiB (+100.0 %)" in bad
    assert "The limit max\\_memory of 67,108,864 is crossed: nothing could be measured" in bad
    assert "The dense model was not measured beside the slim one" in bad


def test_a_model_alone_has_times_and_no_speedups(tmp_path: Path) -> None:
    profile, cell = example_profile(), example_cell()
    alone = replace(cell, runs={"slim": cell.runs["slim"]}, ratios={})
    lonely = replace(profile, models={"slim": profile.models["slim"]}, cells=(alone,), decoder_tests=(), verdicts=())
    text = said(tmp_path, lonely)
    assert table(text, "Times on a processor")[0][3:8] == ["none", "12", "", "", ""]
    assert table(text, "Sizes of the measured models")[0] == ["parameters", "1,000,000"]
    assert "Nothing got" not in text


def test_figures_that_are_not_known_are_none(tmp_path: Path) -> None:
    profile = example_profile()
    models = {name: replace(one, parameters=None, kv_bytes_per_token=None) for name, one in profile.models.items()}
    cell = example_cell()
    runs = {name: replace(run, flops={}, bytes={}, mfu=None, mbu=None) for name, run in cell.runs.items()}
    text = said(tmp_path, replace(profile, models=models, cells=(replace(cell, runs=runs),)))
    assert table(text, "Sizes of the measured models")[0] == ["parameters", "none", "none", "none"]
    assert "### Work, and shares" not in text


def test_every_backend_gets_its_charts_and_names_its_device(tmp_path: Path) -> None:
    cells = (example_cell(), example_cell("onnx"), example_cell("onnx:int8"), replace(example_cell(), batch_size=4))
    run = write_run(tmp_path, Story(profile=replace(example_profile(), cells=cells)))
    page = write_report(run).read_text()
    charts = [re.sub(r"<.*?>", " ", one) for one in re.findall(r"<figure>(.*?)</figure>", page, re.DOTALL)]
    mine = [chart for chart in charts if "on a processor" in chart]
    assert len(mine) == 3 * 2 + 1  # times and speed-ups of each, and memory
    assert "no figure here is a GPU&#39;s" in page
    memory = mine[-1]
    assert all(name in memory for name in ("torch fp32", "onnx fp32", "onnx:int8 fp32", "MiB", "peak"))


def test_a_ratio_that_is_the_same_is_never_told_as_a_gain(tmp_path: Path) -> None:
    cell = example_cell()
    ratio = Ratio(1.0, 1.04, 1.04, 0.99, 1.05, "same")
    mixed = replace(cell, ratios={**cell.ratios, "ttft": ratio})
    good = good_news(said(tmp_path, replace(example_profile(), cells=(mixed,))))
    assert "first token" not in good
    assert "per token 2.00 times" in good


def test_a_damaged_profile_is_refused_by_name_and_key(tmp_path: Path) -> None:
    run = write_run(tmp_path, Story(profile=example_profile()))
    document = json.loads((run / "profile.json").read_text())
    del document["cells"][0]["backend"]
    (run / "profile.json").write_text(json.dumps(document))
    with pytest.raises(OutputError, match=r"profile\.json cannot be read .*cells\[0\]: key 'backend' is missing"):
        write_report(run)
