"""The one-shot job on the packaged demo model: results, refusals, and the same plan from any number of processes."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub import running_hub, use
from huggingface_hub import ModelCard
from pairs import assert_done, run_pair
from run_records import edit_record

import slimvlm
from slimvlm.compress.errors import (
    CheckFailedError,
    CheckpointError,
    HubError,
    InfeasibleBudgetError,
    UnsuitableOptionError,
)
from slimvlm.compress.files.decoding import read
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.stages.plan import planning_of
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.export.running.manifest import check_files
from slimvlm.pipeline import _check, apply_saved_plan, compress, evaluate_named, make_plan
from slimvlm.serve.profile import Profile


def few(tmp_path: Path, **changes) -> CompressOptions:
    """A job of seconds: 32 calibration samples in two rounds, 24 questions."""
    options = CompressOptions(
        model=str(MODEL),
        out=tmp_path / "out",
        data=SAMPLES / "train.jsonl",
        eval_data=SAMPLES / "val.jsonl",
        samples=32,
        eval_samples=24,
        rounds=2,
        batch_size=8,
        compensation="none",
        recover="none",
        export=(),
        profile=False,
    )
    return replace(options, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    options = few(tmp_path_factory.mktemp("run"))
    return options, compress(options)


def test_one_shot_compression_gives_a_smaller_checkpoint_that_loads(finished):
    options, result = finished
    model, processor = slimvlm.load(options.out / "model")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == result.plan.parameters_after
    dense, _ = slimvlm.load(MODEL)
    finest_unit = min(group.parameters_per_unit for group in find_groups(dense, find_family(dense.config)))
    assert abs(result.plan.parameters_before / 2 - parameters) <= finest_unit
    assert processor is not None


def test_the_run_folder_holds_plan_scores_quality_and_the_checks_that_were_made(finished):
    options, result = finished
    record = json.loads((options.out / "run.json").read_text())
    assert record["stages"]["slice"]["masked_difference"] <= 1e-5
    assert record["stages"]["slice"]["reload_difference"] == 0
    assert record["stages"]["plan"]["data_digest"] == result.plan.calibration_digest
    quality = json.loads((options.out / "quality.json").read_text())
    assert len(quality["dense"]["rows"]) == len(quality["slim"]["rows"]) == len(quality["blind"]["rows"]) == 24
    assert (quality["blind"]["blind"], quality["dense"]["blind"]) == (True, False)
    assert quality["blind"]["scores"]["exact"] == result.blind.score < result.dense.score
    assert (options.out / "scores.safetensors").is_file()
    assert "<svg" in (options.out / "report.html").read_text()


def test_the_card_of_the_checkpoint_tells_the_quality_that_was_measured(finished):
    options, result = finished
    card = ModelCard.load(options.out / "model" / "README.md")
    told = card.data.to_dict()["slimvlm"]
    assert (told["base"], told["recovered"], told["measured"]["data"]) == ("slimvlm demo", None, "val.jsonl")
    whole, compared = told["measured"]["whole"], result.comparison
    assert [whole[name] for name in ("dense", "slim", "questions")] == [compared.dense, compared.slim, 24]
    assert (whole["low"], whole["high"]) == (compared.low, compared.high)
    assert {one["task"] for one in told["measured"]["tasks"]} == set(compared.tasks)
    assert f"| {100 * compared.dense:.1f} % | {100 * compared.slim:.1f} % |" in card.text
    assert (
        check_files(options.out / "model", json.loads((options.out / "model/manifest.json").read_text())["files"]) == []
    )


def test_a_run_is_pushed_at_its_end_and_again_where_that_failed(finished, monkeypatch):
    options, _ = finished
    asked = replace(options, resume=True, push_to_hub="me/slim", private=True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        compress(asked)
    with running_hub() as hub:
        use(hub, monkeypatch)
        hub.large, hub.refused = ("nothing",), {"/commit/": "closed today"}
        with pytest.raises(HubError, match=r"did not get to me/slim .*closed today"):
            compress(asked)
        hub.refused = {}
        result = compress(asked)
        assert (result.pushed.repo, hub.private) == ("me/slim", {"me/slim"})
        model = options.out / "model"
        assert hub.repos["me/slim"] == {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(UnsuitableOptionError, match="--private is about"):
        compress(replace(asked, push_to_hub=None))


def test_a_finished_run_resumes_to_the_same_result_without_work(finished):
    options, result = finished
    before = {path: path.stat().st_mtime_ns for path in (options.out / "model").iterdir()}
    again = compress(replace(options, resume=True))
    assert again.plan == result.plan
    assert again.comparison == result.comparison
    assert before == {path: path.stat().st_mtime_ns for path in (options.out / "model").iterdir()}


def test_a_saved_plan_replays_to_the_same_weights_and_refuses_other_weights(finished, tmp_path):
    options, _ = finished
    apply_saved_plan(options.model, options.out / "plan.json", tmp_path / "replayed")
    replayed, _ = slimvlm.load(tmp_path / "replayed")
    model, _ = slimvlm.load(options.out / "model")
    for (name, one), (_, other) in zip(replayed.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(CheckpointError, match="other weights"):
        apply_saved_plan(str(options.out / "model"), options.out / "plan.json", tmp_path / "never")


def test_a_slim_checkpoint_can_be_compressed_again(finished, tmp_path):
    options, result = finished
    again = few(tmp_path, model=str(options.out / "model"), ratio=0.2, criterion="magnitude", rounds=1)
    second = compress(again)
    assert second.plan.parameters_before == result.plan.parameters_after
    assert second.plan.parameters_after < 0.81 * second.plan.parameters_before


def test_a_crossed_quality_limit_fails_the_check_and_keeps_the_files(finished):
    options, _ = finished
    with pytest.raises(CheckFailedError, match="--max-quality-drop"):
        compress(replace(options, resume=True, max_quality_drop=-1000.0))
    assert (options.out / "model" / "config.json").is_file()


def test_a_drop_that_is_no_number_fails_the_quality_limit(finished):
    options, result = finished
    unknown = replace(result, comparison=replace(result.comparison, difference=math.nan))
    assert math.isnan(unknown.comparison.drop)
    with pytest.raises(CheckFailedError, match="--max-quality-drop 50"):
        _check(replace(options, max_quality_drop=50.0), unknown)


def test_a_ratio_no_plan_can_reach_is_refused_before_any_calibration(tmp_path):
    options = few(tmp_path, ratio=0.97)
    with pytest.raises(InfeasibleBudgetError):
        compress(options, lambda stage, done, total: pytest.fail(f"{stage} was started"))
    assert not (options.out / "plan.json").exists()
    assert not (options.out / "model").exists()


def test_the_stock_layout_loads_with_the_unmodified_class(tmp_path):
    from transformers import LlavaForConditionalGeneration

    options = few(tmp_path, ratio=0.2, layout="stock", rounds=1)
    result = compress(options)
    model, info = LlavaForConditionalGeneration.from_pretrained(options.out / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(parameter.numel() for parameter in model.parameters()) == result.plan.parameters_after


def test_evaluating_against_the_dense_model_pairs_the_questions(finished):
    options, result = finished
    job = replace(options, model=str(options.out / "model"), data=options.eval_data)
    evaluation = evaluate_named(job, against=str(MODEL))
    assert len(evaluation.quality.rows) == 24
    assert evaluation.comparison.difference == pytest.approx(result.comparison.difference)
    assert (evaluation.against.score, evaluation.blind.score) == (result.dense.score, result.blind.score)


def test_the_export_stage_writes_a_checked_export_once_and_drops_it_where_none_is_asked_for(finished, tmp_path):
    shutil.copytree(finished[0].out, tmp_path / "out")
    asked = replace(finished[0], out=tmp_path / "out", resume=True, export=("torchscript",))
    (check,) = compress(asked).export["checks"]
    assert check["equal"] == check["samples"]
    manifest = tmp_path / "out" / "export" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    assert json.loads(manifest.read_text())["ok"]
    compress(asked)
    assert manifest.stat().st_mtime_ns == written
    of_graphs = replace(asked, model=f"{asked.out}:torchscript", data=asked.eval_data)
    quality, against, comparison, blind = evaluate_named(of_graphs, against=f"{asked.out}:torch")
    assert [row.prediction for row in quality.rows] == [row.prediction for row in against.rows]
    assert comparison.difference == 0 and blind.blind
    assert evaluate_named(of_graphs).blind.score == blind.score
    assert compress(replace(asked, export=())).export["formats"] == []
    assert not manifest.exists()


def test_the_profile_stage_measures_both_models_once_and_a_run_without_export_on_torch_alone(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr("slimvlm.serve.stage.CELL_SECONDS", 0.5)
    shutil.copytree(finished[0].out, tmp_path / "out")
    asked = replace(finished[0], out=tmp_path / "out", resume=True, profile=True)
    measured = compress(asked).profile
    path = tmp_path / "out" / "profile.json"
    profile = read(path, Profile)
    assert profile == measured
    assert {cell.backend for cell in profile.cells} == {"torch"}
    assert all(set(cell.runs) == {"dense", "slim"} for cell in profile.cells)
    written = path.stat().st_mtime_ns
    compress(asked)
    assert path.stat().st_mtime_ns == written
    assert "were not measured" not in (tmp_path / "out" / "report.md").read_text()
    assert compress(replace(asked, profile=False)).profile is None
    assert not path.exists()


@pytest.mark.parametrize(("formats", "says"), [(("tflite",), "tflite is unknown"), (("onnx", ""), "choose from")])
def test_an_unknown_format_is_refused_before_anything_is_computed(formats, says, tmp_path):
    with pytest.raises(UnsuitableOptionError, match=says):
        compress(few(tmp_path, export=formats))
    assert not (tmp_path / "out").exists()


def test_a_failed_check_of_the_export_fails_a_run_whose_files_are_all_there(finished, tmp_path):
    result = finished[1]
    options = replace(finished[0], out=shutil.copytree(finished[0].out, tmp_path / "out"))
    facts = {"status": "finished", "formats": [], "seconds": 1.0, "failed": "the graph decoder differs from torch"}
    edit_record(options.out, lambda record: record["stages"].update(export=facts))
    with pytest.raises(CheckFailedError, match="decoder differs") as failed:
        compress(replace(options, resume=True))
    assert failed.value.result.comparison == result.comparison


JOB = """
import sys
from pathlib import Path
from slimvlm.compress.options import CompressOptions
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.pipeline import make_plan

files = {"data": SAMPLES / "train.jsonl", "eval_data": SAMPLES / "val.jsonl"}
sizes = {"samples": 32, "eval_samples": 24, "rounds": 2, "batch_size": 8}
make_plan(CompressOptions(model=str(MODEL), out=Path(sys.argv[1]), criterion="ukmi", **files, **sizes))
"""


def test_two_processes_give_the_plan_of_one(tmp_path):
    one = make_plan(few(tmp_path, criterion="ukmi", rounds=2, compensation="refit")).plan
    assert one.options["between"] == "refit"
    (tmp_path / "job.py").write_text(JOB)
    assert_done(run_pair(tmp_path, [tmp_path / "job.py", tmp_path / "two"]))
    two = Plan.from_json((tmp_path / "two" / "plan.json").read_text())
    # Shares are added in another order, and a cosine on the edge of a bin may fall on either side: of the units at the
    # threshold another one may go, no others.
    other = sum(len(set(one.keep[key]) ^ set(two.keep[key])) for key in one.keep)
    assert other <= 0.01 * sum(one.sizes.values())
    assert abs(two.parameters_after - one.parameters_after) <= 0.002 * one.parameters_before


@pytest.mark.parametrize("criterion", ["gate", "fisher", "magnitude", "random"])
def test_a_taylor_variant_of_a_criterion_that_is_no_taylor_is_refused(tmp_path, criterion):
    with pytest.raises(UnsuitableOptionError, match=f"--taylor .*ukmi or taylor.*{criterion}"):
        planning_of(few(tmp_path, criterion=criterion, taylor="mix"))


@pytest.mark.parametrize("criterion", ["ukmi", "taylor"])
def test_a_taylor_variant_changes_the_saliency_of_a_taylor_criterion(tmp_path, criterion):
    assert planning_of(few(tmp_path, criterion=criterion, taylor="mix")).criterion.statistics == ("mix",)


def test_the_refit_is_on_by_default_keeps_the_size_and_is_recorded(tmp_path, finished):
    default = CompressOptions(model="", out=tmp_path, data=tmp_path).compensation
    options = few(tmp_path, compensation=default, compensate_rounds=False)
    result = compress(options)
    assert replace(result.plan, compensation=None) == finished[1].plan and result.plan.compensation.name == "refit"
    facts = json.loads((options.out / "run.json").read_text())["stages"]["slice"]
    assert 0 < facts["output_lost"] < facts["output_lost_by_cut"] < 1
    assert facts["reload_difference"] == 0
    assert result.slim.scores["token_loss"] < finished[1].slim.scores["token_loss"]
    assert replace(options, faithful=True).resolved().compensation == "none"
