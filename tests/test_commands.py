"""The commands on the packaged model: what each prints, writes, and hands to the next."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_models import tiny_model

import slimvlm
from slimvlm.cli import main
from slimvlm.compress.allocate.budget import Budget, plan_units
from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.plan import Plan
from slimvlm.console import show
from slimvlm.demo import MODEL, SAMPLES

# No calibration and few questions: seconds.
CHEAP = ("--data", SAMPLES / "train.jsonl", "--criterion", "magnitude", "--rounds", 1, "--samples", 8)
ONLY_CUT = ("--no-refit", "--recover", "none", "--export", "none", "--no-profile")
pytestmark = pytest.mark.usefixtures("undrawn")


def run(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("cli") / "out"
    return out, run("compress", MODEL, out, *CHEAP, *ONLY_CUT, "--ratio", 0.6, "--eval-samples", 12, "--json")


def test_json_of_compress_is_one_document_and_progress_goes_to_stderr(finished: tuple[Path, Result]) -> None:
    out, result = finished
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["out"] == str(out)
    assert document["removed_of_all"] == pytest.approx(0.6, abs=0.01)
    assert document["removed_of_prunable"] > document["removed_of_all"]
    assert document["quality"]["questions"] == 12
    assert "evaluate" in result.stderr


def test_a_crossed_quality_limit_is_exit_code_4_and_keeps_the_files(tmp_path: Path) -> None:
    options = ("--ratio", 0.7, "--eval-samples", 12, "--max-quality-drop", 1, "--quiet")
    result = run("compress", MODEL, tmp_path / "out", *CHEAP, *ONLY_CUT, *options)
    assert result.exit_code == 4, result.output
    assert "--max-quality-drop 1" in result.stderr
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    assert (tmp_path / "out" / "quality.json").is_file()


def test_evaluate_says_of_a_task_the_model_cannot_do_that_it_tells_nothing(tmp_path: Path) -> None:
    records = [json.loads(line) for line in (SAMPLES / "val.jsonl").read_text().splitlines()]
    described = [record for record in records if record["task"] == "colour"][:16]
    (tmp_path / "images").mkdir()
    for record in described:
        shutil.copy(SAMPLES / record["image"], tmp_path / record["image"])
    lost = [{**record, "task": "impossible", "answer": "nonsense"} for record in described]
    data = tmp_path / "set.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in (*described, *lost)))
    result = run("evaluate", MODEL, "--data", data, "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "right with the images shuffled" in result.stdout
    assert "impossible: tells nothing" in result.stdout
    document = json.loads(run("evaluate", MODEL, "--data", data, "--quiet", "--json").stdout)
    assert document["tasks_that_tell_nothing"] == ["impossible"]
    assert document["blind"]["blind"]
    data.write_text("".join(json.dumps({**one, "image": described[0]["image"]}) + "\n" for one in described))
    assert "shuffled" not in run("evaluate", MODEL, "--data", data, "--quiet").stdout  # there is no other image


def test_apply_replays_the_plan_of_compress(finished: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = finished
    result = run("apply", MODEL, out / "plan.json", tmp_path / "again")
    assert result.exit_code == 0, result.stderr
    weights = [folder / "model.safetensors" for folder in (out / "model", tmp_path / "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_apply_of_a_streamed_model_writes_what_compress_does(finished: tuple[Path, Result], tmp_path: Path) -> None:
    out, streamed = finished[0], tmp_path / "streamed"
    assert run("apply", MODEL, out / "plan.json", streamed, "--stream", "on").exit_code == 0
    for name in ("model.safetensors", "config.json", "plan.json"):
        assert (streamed / name).read_bytes() == (out / "model" / name).read_bytes(), name


def test_the_record_of_a_run_is_a_recipe_that_makes_the_same_plan(
    finished: tuple[Path, Result], tmp_path: Path
) -> None:
    out, _ = finished
    again = run("compress", tmp_path / "again", "--config", out / "run.json", "--quiet")
    assert again.exit_code == 0, again.stderr
    for name in ("plan.json", "order.safetensors", "model/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    first, second = (json.loads((folder / "run.json").read_text()) for folder in (out, tmp_path / "again"))
    assert first["options"] == second["options"] and list(first["stages"]) == list(second["stages"])


def test_apply_with_the_samples_of_the_plan_gives_what_compress_gives(tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    cut = run("compress", MODEL, out, *CHEAP, *ONLY_CUT[1:], "--ratio", 0.4, "--eval-samples", 12)
    assert cut.exit_code == 0, cut.stderr
    plan = Plan.from_json((out / "plan.json").read_text(encoding="utf-8"))
    assert plan.compensation.name == "refit" and plan.compensation.samples == 8
    result = run("apply", MODEL, out / "plan.json", again, "--data", SAMPLES / "train.jsonl")
    assert result.exit_code == 0, result.stderr
    assert "Warning" not in result.stderr
    weights = [folder / "model.safetensors" for folder in (out / "model", again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    unfitted = run("apply", MODEL, out / "plan.json", tmp_path / "unfitted")
    assert "Warning: the plan wants a refit, and nothing was: give the samples of `slimvlm plan`" in unfitted.stderr
    begun = run(
        "apply",
        MODEL,
        out / "plan.json",
        tmp_path / "less",
        "--ratio",
        0.2,
        "--data",
        SAMPLES / "train.jsonl",
        "--json",
    )
    assert begun.exit_code == 0, begun.stderr
    assert json.loads(begun.stdout)["removed_of_all"] == pytest.approx(0.2, abs=0.005)
    less = Plan.from_json((tmp_path / "less" / "plan.json").read_text(encoding="utf-8"))
    assert (less.ratio, less.prefix_of, less.compensation) == (0.2, 0.4, plan.compensation)
    assert all(set(plan.keep[key]) <= set(kept) for key, kept in less.keep.items())
    assert less.parameters_after == sum(weight.numel() for weight in slimvlm.load(tmp_path / "less")[0].parameters())
    other = run("apply", MODEL, out / "plan.json", tmp_path / "never", "--data", SAMPLES / "val.jsonl")
    assert other.exit_code == 3 and "calibrated on other samples than" in other.stderr
    unknown = tmp_path / "unknown.json"
    unknown.write_text((out / "plan.json").read_text().replace('"name": "refit"', '"name": "unheard-of"'))
    refused = run("apply", MODEL, unknown, tmp_path / "never", "--data", SAMPLES / "train.jsonl")
    assert refused.exit_code == 3 and "compensation 'unheard-of', and this version knows only none" in refused.stderr
    assert not (tmp_path / "never").exists()


def test_apply_refuses_a_ratio_that_the_plan_has_no_order_for(finished: tuple[Path, Result], tmp_path: Path) -> None:
    for file in ("plan.json", "order.safetensors"):
        shutil.copy(finished[0] / file, tmp_path / file)
    asked = ("apply", MODEL, tmp_path / "plan.json", tmp_path / "never", "--ratio")
    more = run(*asked, 0.7)
    assert more.exit_code == 3 and "not within the 0.6 this plan was made for; ask for at most that, or" in more.stderr
    edited = (tmp_path / "plan.json").read_text(encoding="utf-8").replace('"seed": 0', '"seed": 1')
    (tmp_path / "plan.json").write_text(edited, encoding="utf-8")
    foreign = run(*asked, 0.3)
    assert foreign.exit_code == 3 and "is of another plan than" in foreign.stderr
    (tmp_path / "order.safetensors").unlink()
    alone = run(*asked, 0.3)
    assert alone.exit_code == 3 and "order.safetensors cannot be read (No such file" in alone.stderr
    assert "leave --ratio out, or put the order.safetensors of the plan beside it" in alone.stderr
    assert not (tmp_path / "never").exists()


def test_plan_writes_the_plan_that_compress_goes_on_from(finished: tuple[Path, Result], tmp_path: Path) -> None:
    options = (*CHEAP, "--no-refit", "--ratio", 0.6, "--eval-samples", 12, "--json", "--quiet")
    planned = run("plan", MODEL, tmp_path / "out", *options)
    assert planned.exit_code == 0, planned.stderr
    assert not (tmp_path / "out" / "model").exists()
    written = (tmp_path / "out" / "plan.json").read_text(encoding="utf-8")
    assert written == (finished[0] / "plan.json").read_text(encoding="utf-8")
    assert json.loads(planned.stdout)["parameters"]["after"] == Plan.from_json(written).parameters_after
    resumed = run("compress", MODEL, tmp_path / "out", *options, *ONLY_CUT[1:], "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert json.loads(resumed.stdout)["quality"] == json.loads(finished[1].stdout)["quality"]


def test_evaluate_prints_every_task_and_the_difference(finished: tuple[Path, Result]) -> None:
    data = ("--data", SAMPLES / "val.jsonl", "--eval-samples", 12)
    words = ("evaluate", finished[0] / "model", *data, "--against", MODEL)
    document = json.loads(run(*words, "--json", "--quiet").stdout)
    assert document["comparison"]["difference"] < 0
    printed = run(*words, "--quiet")
    assert printed.stderr == ""
    for task in document["quality"]["tasks"]:
        assert any(line.startswith(task) for line in printed.stdout.splitlines()), task
    assert "points (" in printed.stdout


def test_inspect_counts_what_can_be_removed() -> None:
    document = json.loads(run("inspect", MODEL, "--json").stdout)
    assert document["family"] == "llava"
    assert document["prunable_parameters"] == sum(part["prunable_parameters"] for part in document["parts"])
    assert {part["kind"] for part in document["parts"]} == {"attention", "mlp"}
    printed = run("inspect", MODEL).stdout
    assert "llava" in printed
    assert "kv-group" in printed


def test_a_plan_of_the_paper_s_loop_warns_of_what_a_small_model_makes_of_it(capsys):
    model = tiny_model("llava").model
    groups = find_groups(model, find_family(model.config))
    scores, facts = score_groups(groups, CRITERIA["random"]), facts_of(model, groups)
    literal = plan_units(groups, scores, Budget(0.3, allocator="paper"), facts)
    assert literal.removed_fraction > 0.4 and "vision.0.mlp" in literal.rescued
    show.show_plan(literal, Path("plan.json"), as_json=True)
    printed = capsys.readouterr()
    assert "% of all parameters go where 30.0 % was asked for: the paper's loop takes whole steps" in printed.err
    assert (
        f"empties {len(literal.rescued)} groups, which keep one unit each: {', '.join(literal.rescued)}" in printed.err
    )
    assert json.loads(printed.out)["rescued"] == list(literal.rescued)
    show.show_plan(plan_units(groups, scores, Budget(0.3), facts), Path("plan.json"), as_json=False)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "7.50 k of them for free: blocks that nobody reads, the last 1 in vision" in printed.out
