"""The report of a run: what it says of good and bad runs, that its figures are the files', that it can be repeated."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from report_runs import Story, change_record, write_run
from report_texts import bad_news, good_news, table, text_of
from run_records import edit_record

from slimvlm.compress.errors import OutputError
from slimvlm.compress.evaluation.quality import Row, compare, summarize, wilson
from slimvlm.export.running.manifest import Artifact, Manifest
from slimvlm.export.variants import VARIANTS
from slimvlm.serve.report import write_report
from slimvlm.serve.report.charts import Curve, training_curve
from slimvlm.serve.report.sections.quality import worth


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("made"), Story())


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, with its samples where they were."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture(scope="module")
def written(made: Path) -> Path:
    """The finished run with its report, for who only reads."""
    return write_report(made).parent


def story_text(tmp_path: Path, **changes: object) -> str:
    return text_of(write_run(tmp_path / "other", replace(Story(), **changes)))


# ------------------------------------------------------------------ what it says


def test_removals_are_the_plans(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert table(text, "Sizes")[0] == ["parameters, whole model", "2,000,000", "1,000,000", "-50.0 %"]
    assert table(text, "vision: attention heads kept per layer") == [
        ["0", "4", "3", "75.0 %"],
        ["1", "4", "2", "50.0 %"],
        ["all", "8", "5", "62.5 %"],
    ]
    assert table(text, "language: MLP channels kept per layer")[-1] == ["all", "32", "10", "31.2 %"]


def test_quality_is_given_per_task_with_intervals_and_the_change_of_each(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert table(text, "Per task, with intervals, in percent") == [
        ["count", "8", "100.0 (67.6 to 100.0)", "0.0 (0.0 to 32.4)", "12.5 (2.2 to 47.1)"],
        ["colour", "8", "100.0 (67.6 to 100.0)", "25.0 (7.1 to 59.1)", "87.5 (52.9 to 97.8)"],
    ]
    comparison = json.loads((written / "quality.json").read_text())["comparison"]
    first, count, _ = table(text, "Slim minus dense, in points")
    interval = f"{100 * comparison['low']:.1f} to {100 * comparison['high']:.1f}"
    assert first == ["mean of tasks", "-50.0", interval, "worse"]
    assert count[:2] == ["count", "-87.5"]
    assert table(text, "Who was right") == [
        ["both right", "8", "50.0 %"],
        ["only dense right", "8", "50.0 %"],
        ["only slim right", "0", "0.0 %"],
        ["both wrong", "0", "0.0 %"],
    ]


def test_what_got_worse_comes_first(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert "Quality fell by 50.0 points" in bad_news(text)
    assert "1 task of 2 got worse, in points: count (-87.5); 1 more fell within what chance explains" in bad_news(text)
    assert "Latency and memory were not measured" in bad_news(text)
    assert "50.0 % of all parameters are gone" in good_news(text)
    assert "The recovery took the cut model from 12.5 % to 50.0 %" in good_news(text)


def test_a_profile_that_was_refused_is_missing_with_its_reason(run: Path) -> None:
    facts = {"status": "finished", "backends": ["torch"], "seconds": 1.0, "refused": "no such device"}
    edit_record(run, lambda record: record["stages"].update(profile=facts))
    assert "faster is not known. no such device (run.json: stages.profile.refused)" in bad_news(text_of(run))


def test_a_loss_that_is_not_certain_is_not_called_one(tmp_path: Path) -> None:
    text = story_text(tmp_path, tasks={"colour": (8, 7, 8), "count": (8, 8, 8)})
    assert "Quality did not change measurably: 100.0 % before, 100.0 % after" in good_news(text)
    assert "Quality fell" not in text
    assert "The recovery did not help measurably" in bad_news(text)


def test_a_recovery_that_made_the_model_worse_is_called_that(tmp_path: Path) -> None:
    text = story_text(tmp_path, tasks={"colour": (8, 8, 1)})
    assert "The recovery made the cut model worse: from 100.0 % to 12.5 %" in bad_news(text)


def test_a_task_the_dense_model_cannot_do_tells_nothing(tmp_path: Path) -> None:
    tasks = {"colour": (8, 2, 7), "where": (3, 3, 3)}
    text = story_text(tmp_path, tasks=tasks, blind={"colour": 1, "where": 3})
    assert "where: tells nothing of the cut" in bad_news(text)
    assert "With the images shuffled the dense model gets 25.0 % right" in text
    verdicts = {row[0]: row[-1] for row in table(text, "Slim minus dense, in points")}
    assert verdicts["where"] == "tells nothing"
    assert "tells nothing" not in verdicts["colour"]
    assert [row[-1] for row in table(text, "Per task, with intervals, in percent")] == ["12.5", "37.5"]


def test_a_recovery_that_did_not_help_the_validation_says_so(tmp_path: Path) -> None:
    text = story_text(tmp_path, validations={0: (0.5, -1.0), 4: (0.25, -2.0)})
    assert "The recovery did not help: what 8 steps gave was measurably worse" in bad_news(text)


def test_skipped_steps_bad_samples_and_samples_not_held_out_are_said(tmp_path: Path) -> None:
    bad = bad_news(story_text(tmp_path, bad_samples=("a.jsonl:3: no image",), held_out=False))
    assert "1 steps were skipped" in bad
    assert "1 samples could not be read and were left out" in bad
    assert "those the model was calibrated on: its figures may flatter" in bad


def test_stages_and_validations_are_the_journals(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert table(text, "Stages")[0] == ["plan", "finished", table(text, "Stages")[0][2]]
    assert table(text, "Stages of the training") == [
        ["1", "vision shallow", "4", "400", "2.0", "1", "0.25"],
        ["2", "task", "4", "400", "2.0", "0.2", "0.125"],
    ]
    assert [row[:3] for row in table(text, "Validations")] == [
        ["0", "25.0 %", "2"], ["4", "50.0 %", "1"], ["8", "75.0 %", "0.5"]
    ]  # fmt: skip


def test_everything_to_repeat_it_is_there(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert "slimvlm compress models/small run --data" in text
    assert ["slimvlm", "1.0"] in table(text, "Versions")
    assert any(row[1] == "ab" * 32 for row in table(text, "Digests (sha256)"))
    digest = subprocess.run(["sha256sum", written / "plan.json"], capture_output=True, text=True, check=True).stdout[
        :64
    ]
    assert ["plan.json", digest, f"{(written / 'plan.json').stat().st_size:,}"] in table(text, "Digests (sha256)")
    assert [row[1] for row in table(text, "Seeds")] == ["0", "0", "0"]


# ------------------------------------------------------------------ what is missing


def test_what_is_not_there_is_named_and_the_rest_is_reported(run: Path) -> None:
    for stage in ("recover", "evaluate"):
        edit_record(run, lambda record, stage=stage: record["stages"].pop(stage))
    text = text_of(run)  # the files of an undone recovery and an outdated evaluation are still in the folder
    assert "there was no recovery" in good_news(text)
    assert "The quality was not measured" in bad_news(text)
    assert "Validations" not in text
    assert "### Sizes" in text


def test_an_interrupted_recovery_is_shown_as_far_as_its_journal_goes(run: Path) -> None:
    change_record(run, "recover", status="running")
    (run / "recovery").mkdir()
    lines = (run / "recovery.jsonl").read_text().splitlines(keepends=True)
    (run / "recovery" / "recovery.jsonl").write_text("".join(lines[:4]) + '{"step": 4, "sta')
    text = text_of(run)
    assert "The recovery is not finished: this is what its journal holds so far" in text
    assert [row[0] for row in table(text, "Validations")] == ["0"]


def test_a_damaged_file_is_refused_by_name_and_no_run_at_all_too(run: Path, tmp_path: Path) -> None:
    (run / "quality.json").write_text('{"dense": {}}')
    with pytest.raises(OutputError, match=r"quality\.json cannot be read"):
        write_report(run)
    (run / "scores.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(OutputError, match=r"scores\.safetensors cannot be read"):
        write_report(run)
    with pytest.raises(OutputError, match="holds no run of slimvlm"):
        write_report(tmp_path)


# ------------------------------------------------------------------ exports, other kinds of models


def test_parity_of_an_export_is_shown_and_a_failed_check_is_bad_news(run: Path) -> None:
    case = {"case": "a", "shapes": {}, "max_absolute": 1e-3, "max_relative": 2e-6, "cosine": 0.9999999}
    artifact = Artifact("decoder", "onnx", "fp32", "onnx/decoder.onnx", "torch.onnx", 1.0)
    artifact.parity = [case, {**case, "max_relative": 3e-6, "cosine": 0.99995}]
    tolerances = {"fp32": asdict(VARIANTS["fp32"].tolerance)}
    manifest = Manifest({"family": "llava", "type": "llava"}, {"max_new_tokens": 8}, tolerances=tolerances)
    manifest.artifacts = [artifact]
    manifest.checks = [{"format": "onnx", "variant": "fp32", "ok": False, "samples": 4, "equal": 3}]
    manifest.checks[0] |= {"token_share": 0.75, "accuracy": None, "torch_accuracy": 0.5}
    known = {
        "loss": 0.75,
        "torch_loss": 0.5,
        "divergence": 0.25,
        "max_relative": 3e-2,
        "cosine": 0.9,
        "long_prompt": 1024,
    }
    nan = float("nan")
    unknown = {"loss": nan, "torch_loss": 0.5, "divergence": nan, "max_relative": nan, "cosine": 0.0, "long_prompt": 9}
    manifest.checks += [{**manifest.checks[0], **known}, {**manifest.checks[0], **unknown}]
    manifest.failures = ["onnx fp32: 75.0 % of the tokens equal torch's"]
    (run / "export").mkdir()
    manifest.write(run / "export")
    text = text_of(run)
    assert table(text, "Exported graphs against torch, worst case each") == [
        [*("onnx/decoder.onnx", "torch.onnx", "yes", "2"), *("0.001", "3e-06", "0.0001", "0.999950", "1")]
    ]
    assert table(text, "Greedy answers against torch")[0][2:] == ["NO", "4", "3", "75.0 %", "none", "50.0 %"]
    title = "Torch's answers: nats a token, and the largest relative difference of a logit"
    assert [row[2:] for row in table(text, title)] == [  # of an export made before 0.1.0 there are none
        ["0.75", "0.5", "0.25", "0.001", "0.03", "0.0001", "1,024"],
        ["none", "0.5", "none", "0.001", "none", "0.0001", "9"],
    ]
    assert "75.0 % of the tokens equal torch's" in bad_news(text)


def test_dual_encoders_are_reported_by_their_ranks(run: Path) -> None:
    sides = {
        name: summarize(
            "retrieval",
            [
                Row(f"samples.jsonl:{number}", "all", None, image_to_text=rank, text_to_image=1)
                for number in range(1, 9)
            ],
            blind=False,
            seconds=1.0,
        )
        for name, rank in (("dense", 1), ("slim", 3))
    }
    document = {name: side.to_dict() for name, side in sides.items()}
    document["comparison"] = compare(sides["dense"], sides["slim"]).to_dict()
    (run / "quality.json").write_text(json.dumps(document))
    text = text_of(run)
    assert "Quality fell by 50.0 points" in bad_news(text)
    assert "right text at rank 3, right image at rank 1 (wrong)" in text


# ------------------------------------------------------------------ images


def test_examples_show_the_image_the_question_and_every_answer(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert page.count('<img src="data:image/webp;base64,') == 5  # 3 only dense right, 2 both right; no other case
    rows = table((written / "report.md").read_text(), "Answers side by side")
    assert rows[0][2:5] == ["what colour ?", "red", "red (right)"]
    assert rows[0][6] == "blue (wrong)"


def test_samples_that_changed_since_the_evaluation_are_not_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path, Story())
    samples = tmp_path / "samples.jsonl"
    samples.write_text(samples.read_text().replace('"red"', '"green"'))
    page = write_report(run).read_text()
    assert "<img" not in page
    assert "cannot be read again (samples.jsonl:1 has another answer now)" in page
    samples.unlink()
    assert "No images are shown" in write_report(run).read_text()


# ------------------------------------------------------------------ charts, files


def test_the_same_run_gives_the_same_bytes(run: Path) -> None:
    first = [path.read_bytes() for path in (write_report(run), run / "report.md")]
    assert [path.read_bytes() for path in (write_report(run), run / "report.md")] == first


def test_charts_are_vectors_with_text_and_colours_of_the_page(written: Path) -> None:
    page = (written / "report.html").read_text()
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 1 + 4 + 1 + 1 + 1  # sizes, towers x kinds, scores, training, tasks
    assert all("<text" in chart and "<image" not in chart for chart in charts)
    assert set(re.findall(r"#[0-9a-f]{6}\b", "".join(charts))) <= set()
    assert {"var(--ink)", "var(--slim)"} <= set(re.findall(r"var\(--\w+\)", "".join(charts)))


def test_no_two_elements_of_the_page_have_one_identifier(written: Path) -> None:
    found = re.findall(r'\bid="([^"]*)"', (written / "report.html").read_text())
    assert len(found) == len(set(found))


def test_the_curve_of_a_long_training_stays_small_and_keeps_its_peaks() -> None:
    losses = [1.0] * 30_000
    losses[12_345] = 50.0
    curve = Curve(range(1, 30_001), losses, (), [(1, 30_000)], [(0, 0.5)], 0)
    svg = training_curve("long", "a long training", curve).svg
    assert len(svg) < 150_000
    flat = training_curve("long", "a long training", replace(curve, losses=[1.0] * 30_000)).svg
    assert svg != flat


def test_wilson_interval_is_newcombes() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    known = ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718))
    for right, count, low, high in known:
        assert wilson(right / count, count) == pytest.approx((low, high), abs=5e-5)


def test_values_that_share_an_image_are_worth_less() -> None:
    one, images = np.random.default_rng(0).integers(0, 2, 400).astype(float), np.arange(400)
    assert worth(list(one), images) == pytest.approx(400)
    thrice = (list(np.repeat(one, 3)), np.repeat(images, 3))
    assert worth(*thrice) == pytest.approx(400, rel=0.01)
    assert worth([1.0] * 1200, thrice[1]) == 400  # no value differs, so nothing tells how alike an image's are
    assert wilson(one.mean(), worth(*thrice)) == pytest.approx(wilson(one.mean(), 400), abs=1e-3)


def test_a_report_is_written_without_torch(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from slimvlm.serve.report import write_report; "
        "write_report(Path(sys.argv[1])); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code, str(run)], check=False).returncode == 0
