"""`compress --target` on the packaged model: what is found is delivered, a broken search goes on, and what nothing can
meet is refused before the model is cut. Bytes and parameters are counted, so no clock decides."""

import json
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from forked import Forked

import slimvlm
from slimvlm.compress.errors import InfeasibleBudgetError, UnsuitableOptionError
from slimvlm.compress.models.checkpoint import build_meta
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.options import CompressOptions
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.pipeline import compress, make_plan, recover_run
from slimvlm.serve.fitting.stage import workload_of
from slimvlm.serve.fitting.table import CostTable, Point
from slimvlm.serve.fitting.tabulate import narrowed_copies, setting_of, user_cache
from slimvlm.serve.fitting.trials import Workbench


def few(out, *targets, **changes):
    """A job of seconds: one round of 16 samples, 8 questions."""
    options = CompressOptions(
        model=str(MODEL),
        out=out,
        data=SAMPLES / "train.jsonl",
        eval_data=SAMPLES / "val.jsonl",
        samples=16,
        eval_samples=8,
        rounds=1,
        batch_size=8,
        compensation="none",
        recover="none",
        export=(),
        profile=False,
        target=targets,
        backend="torch",
        device="cpu",
    )
    return replace(options, **changes)


def parameters(folder):
    return sum(parameter.numel() for parameter in slimvlm.load(folder)[0].parameters())


def document(out):
    return json.loads((out / "fit.json").read_text())


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    options = few(tmp_path_factory.mktemp("fit") / "out", "params=2M", "size=4.5MB")
    return options, compress(options)


def test_the_delivered_model_meets_every_target_and_no_more_was_cut_than_the_tightest_needs(fitted):
    options, result = fitted
    size = (options.out / "model" / "model.safetensors").stat().st_size
    assert 0.97 * 2e6 <= parameters(options.out / "model") == result.plan.parameters_after <= 2e6 and size <= 4.5e6
    assert result.plan.ratio == result.fit.chosen.ratio == document(options.out)["chosen"]["ratio"] < options.ratio
    stage = json.loads((options.out / "run.json").read_text())["stages"]["fit"]
    assert (stage["targets"], stage["backend"]) == (list(options.target), "torch")
    report = (options.out / "report.md").read_text()
    assert "Candidates for params 2M parameters and size 4.5 MB" in report and result.fit.sentences[0] in report
    assert "params 2M" in result.fit.sentences[0] and "removed" in result.fit.sentences[0]


def test_a_finished_fit_is_not_searched_again_and_other_targets_need_no_new_calibration(fitted, tmp_path):
    options, result = fitted
    stages = []
    again = compress(replace(options, resume=True), lambda stage, *_: stages.append(stage))
    assert again.fit == result.fit and not {"fit", "calibrate"} & set(stages)
    with pytest.raises(InfeasibleBudgetError, match="params 0.5M|params 500k"):
        compress(replace(options, resume=True, target=("params=500k",)), lambda stage, *_: stages.append(stage))
    assert "fit" in stages and "calibrate" not in stages
    back = compress(replace(options, resume=True), lambda stage, *_: stages.append(stage))
    assert (back.plan, back.fit.chosen) == (result.plan, result.fit.chosen) and "calibrate" not in stages


def test_a_fitted_run_that_is_recovered_again_keeps_its_targets_and_its_plan(fitted, tmp_path):
    options, result = fitted
    out = shutil.copytree(options.out, tmp_path / "out")
    stages = []
    again = recover_run(out, {"recover": "none", "device": "cpu"}, lambda stage, *_: stages.append(stage))
    assert (again.fit, again.plan) == (result.fit, result.plan) and not {"fit", "calibrate"} & set(stages)


def test_where_the_whole_model_meets_the_targets_nothing_is_calibrated_cut_or_trained_and_its_loss_is_said(tmp_path):
    options = few(tmp_path / "out", "size=6MB", recover="lpd", compensation="refit", backend="torchscript")
    stages = []
    result = compress(replace(options, variants=("fp32", "fp16"), export=None), lambda stage, *_: stages.append(stage))
    assert [trial.backend for trial in result.fit.trials] == ["torchscript:fp32", "torchscript:fp16"]
    assert result.fit.chosen == result.fit.trials[1] and not {"calibrate", "training"} & set(stages)
    assert result.export["formats"] == ["torchscript"] and result.export["variants"] == ["fp16"]
    assert parameters(tmp_path / "out" / "model") == parameters(MODEL) and result.recovery is None
    assert abs(result.fit.chosen.figures["drop"]) <= 100 and "drop" not in result.fit.trials[0].figures
    assert "No pruning needed: the whole model in torchscript:fp16 meets size 6 MB" in result.fit.sentences[0]
    assert "lost" in result.fit.sentences[0] or "gained" in result.fit.sentences[0]
    assert result.dense.score == result.slim.score
    assert not (options.out / "order.safetensors").exists() and result.plan.removed_fraction == 0
    assert "Candidates for size 6 MB" in (options.out / "report.md").read_text()


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    """Any loss is accepted, so the largest cut is the answer."""
    options = few(tmp_path_factory.mktemp("bound") / "out", "drop=100", ratio=0.04, compensation="refit")
    return options, compress(options)


def test_a_bound_on_the_loss_alone_asks_for_the_smallest_artefact(bounded):
    options, result = bounded
    trials = result.fit.trials
    assert [trial.ratio for trial in trials] == [0, 0.02, 0.04] and result.fit.chosen == trials[2]
    assert all({"size", "drop"} <= set(trial.figures) for trial in trials)
    assert trials[0].figures["drop"] == 0  # of the model itself
    assert result.plan.ratio == 0.04 and "is the smallest that was found to lose at most" in result.fit.sentences[0]
    size = (options.out / "model" / "model.safetensors").stat().st_size
    assert abs(size - trials[2].figures["size"]) < 1e4 < trials[0].figures["size"] - size  # the plan in it differs


def test_a_search_that_is_killed_goes_on_with_what_it_tried(bounded, tmp_path):
    options, result = bounded
    out, threads = tmp_path / "out", str(torch.get_num_threads())
    words = ["slimvlm", "compress", options.model, out, "--data", options.data, "--eval-data", options.eval_data]
    words += ["--samples", 16, "--eval-samples", 8, "--rounds", 1, "--batch-size", 8, "--target", "drop=100"]
    words += ["--ratio", 0.04, "--recover", "none", "--export", "none", "--no-profile", "--backend", "torch"]
    with Forked(tmp_path, *words, "--device", "cpu", OMP_NUM_THREADS=threads) as process:
        while not (out / "fit.json").exists() or (out / "fit.json").read_text().count('"ratio"') < 2:
            assert process.runs(), process.stderr.read_text()
        assert process.kill() == -signal.SIGKILL
    known, tried = document(out)["trials"], []
    assert len(known) >= 2 and known == document(options.out)["trials"][: len(known)]

    def tell(stage, done, *_):
        tried.extend([done] if stage in ("fit", "calibrate") else [])

    again = compress(replace(options, out=out, resume=True), tell)
    assert tried[:-1] == list(range(len(known), 3)) and document(out) == document(options.out)
    assert again.plan == result.plan


def test_what_another_device_was_found_to_cost_says_nothing_here(tmp_path):
    class BrokenError(Exception):
        pass

    def breaks(stage, *_):
        if stage == "calibrate":
            raise BrokenError

    options = few(tmp_path / "out", "size=4.5MB")
    with pytest.raises(BrokenError):
        compress(options, breaks)
    known = document(options.out)["trials"]
    assert len(known) == 1 and document(options.out)["chosen"] is None and not (options.out / "model").exists()
    moved = {**document(options.out), "device": "another machine"}
    (options.out / "fit.json").write_text(json.dumps(moved))
    stages = []
    with pytest.raises(BrokenError):
        compress(replace(options, resume=True), lambda *said: (stages.append(said[0]), breaks(*said)))
    assert document(options.out)["trials"] == known and document(options.out)["device"] != "another machine"
    assert "fit" in stages


def test_a_plan_by_milliseconds_goes_by_the_table_of_this_device_and_wins_more_time_at_equal_size(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = few(tmp_path / "timed", "tpot=1ms", cost="milliseconds")
    bench = Workbench(options.model, workload_of(options))
    points = {}
    for copy in narrowed_copies(bench):  # as if attention were nearly all that takes time
        won = 0.8 * (1 - copy.kept) if copy.kind == "language.attention" else 0.01
        points.setdefault(copy.kind, []).append(Point(copy.kept, {"tpot": 1 - won}, {"tpot": 0.0}))
    setting = setting_of(bench, "torch")
    table = CostTable(setting, {"tpot": 10.0}, {kind: tuple(one) for kind, one in points.items()})
    table.save(user_cache() / f"{setting.digest}.json")
    timed = make_plan(options).plan
    plain = make_plan(replace(options, out=tmp_path / "plain", cost="parameters")).plan
    model, family = build_meta(options.model)
    times = [table.predict(plan, find_groups(model, family))["tpot"] for plan in (timed, plain)]
    assert times[0] < times[1] and timed.options["cost"] == "milliseconds"
    assert timed.removed_fraction == pytest.approx(plain.removed_fraction, abs=0.01)
    again = make_plan(replace(options, resume=True))
    assert again.plan == timed


@pytest.mark.parametrize(
    "changes",
    [
        {"target": ("speed=3",)},
        {"target": ("size=1MB", "size=2MB")},
        {"cost": "milliseconds"},
        {"target": ("tpot=1ms",), "cost": "milliseconds", "criterion": "influence"},
        {"backend": "torch", "variants": ("fp16",)},
        {"backend": "onnx", "variants": ("int3",)},
        {"backend": "tflite"},
        {"target": (), "variants": ("int3",)},
    ],
)
def test_targets_that_cannot_be_are_refused_before_anything_is_done(tmp_path, changes):
    with pytest.raises(UnsuitableOptionError):
        compress(few(tmp_path / "out", "size=3MB", **changes))
    assert not (tmp_path / "out").exists()
