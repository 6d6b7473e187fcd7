"""The recover stage: what it leaves behind, that it never makes a model worse, what it refuses, for every family."""

import json
import math
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from plans import random_plan
from report_texts import text_of
from run_records import edit_record
from safetensors.torch import load_file, save_file
from short_recoveries import SHORT, SMALL, options_in
from tiny_models import FACTORIES, tiny_model
from tiny_processors import tiny_image, tiny_processor

import slimvlm
from slimvlm.cli import main
from slimvlm.compress.card import Recovered, read_card
from slimvlm.compress.data.records import Turn
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.data.splits import Trained, hold_out, read_measured, read_trained
from slimvlm.compress.errors import SampleError
from slimvlm.compress.models.checkpoint import Loaded, load_model
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.progress import silent
from slimvlm.compress.recovery.adapters.rounding import round_blocks
from slimvlm.compress.recovery.recover import recover
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.demo import MODEL
from slimvlm.pipeline import compress, recover_run

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory):
    options = options_in(tmp_path_factory.mktemp("recovered"))
    return options, compress(options)


@pytest.fixture
def run(recovered, tmp_path: Path) -> Path:
    """A copy of the recovered run."""
    shutil.copytree(recovered[0].out, tmp_path / "run")
    return tmp_path / "run"


def test_the_recovered_checkpoint_is_dense_and_as_small_as_the_plan_says(recovered) -> None:
    options, result = recovered
    model, _ = slimvlm.load(options.out / "model")
    assert sum(parameter.numel() for parameter in model.parameters()) == result.plan.parameters_after
    cut, weights = (load_file(options.out / name / "model.safetensors") for name in ("cut", "model"))
    assert {name: value.shape for name, value in cut.items()} == {name: value.shape for name, value in weights.items()}
    assert {value.dtype for value in weights.values()} == {value.dtype for value in cut.values()}
    changed = {name for name in cut if not cut[name].equal(weights[name])}
    assert changed
    assert all(".layers." in name for name in changed)  # blocks only: the projector, norms and embeddings stay


def test_the_run_says_what_the_recovery_did(recovered) -> None:
    options, result = recovered
    facts = json.loads((options.out / "run.json").read_text())["stages"]["recover"]
    assert facts["steps"] == 8
    assert facts["merged_difference"] <= 1e-5
    assert facts["validations"] == 3
    assert facts["validation_samples"] == pytest.approx(24, abs=4)  # whole images
    assert 0 < facts["validation_seconds"] < facts["seconds"]
    assert facts["reload_difference"] == 0
    lines = [json.loads(line) for line in (options.out / "recovery.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert not (options.out / "recovery").exists()
    quality = json.loads((options.out / "quality.json").read_text())
    assert result.cut.score == quality["cut"]["scores"]["exact"]
    told = read_card(options.out / "model").told
    assert told.recovered == (Recovered("lpd", "lora", 8, facts["samples"]) if facts["best_step"] else None)
    assert told.measured.whole.slim == result.comparison.slim


def test_another_recovery_starts_from_the_same_cut_and_replaces_the_model(run: Path) -> None:
    cut, model = ((run / name / "model.safetensors").read_bytes() for name in ("cut", "model"))
    told: list[str] = []
    asked = {**SHORT, "recover": "sft", "recall": False, "learning_rate": 0.003}
    result = recover_run(run, asked, lambda stage, done, total, note="": told.append(f"{stage} {done}/{total} {note}"))
    assert re.fullmatch(r"recover 8/8 task: loss [\d.]+, \d+ tokens/s", told[7])
    assert (run / "cut" / "model.safetensors").read_bytes() == cut
    assert (run / "model" / "model.safetensors").read_bytes() != model
    assert result.recovery["options"]["recover"] == "sft"
    assert json.loads((run / "quality.json").read_text())["slim"]["scores"]["exact"] == result.slim.score


def test_the_hidden_states_asked_for_are_the_ones_compared(run: Path) -> None:
    losses = []
    for states in ((), ("--hidden-states", 1), ("--hidden-states", 1, "--hidden-states", -1)):
        words = ["recover", run, "--quiet", "--recover", "hidden", "--steps", 1, *SMALL, *states]
        assert CliRunner().invoke(main, [str(word) for word in words]).exit_code == 0
        lines = map(json.loads, (run / "recovery.jsonl").read_text().splitlines())
        losses += [line["loss"] for line in lines if "loss" in line]
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2)
    assert losses[0] != pytest.approx(losses[1])


def test_the_same_recovery_again_does_nothing(run: Path) -> None:
    before = (run / "model" / "model.safetensors").stat().st_mtime_ns
    recover_run(run, SHORT)
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_crossed_quality_limit_exits_with_4_after_printing_the_result(run: Path) -> None:
    short = [word for name, value in SHORT.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    result = CliRunner().invoke(main, ["recover", str(run), *short, "--max-quality-drop", "1", "--quiet"])
    assert result.exit_code == 4, result.output
    assert "recovery" in result.stdout


def test_a_recipe_that_is_none_is_refused_before_any_work(tmp_path: Path) -> None:
    options = options_in(tmp_path, recover="magic")
    result = CliRunner().invoke(main, words_of(options))
    assert result.exit_code == 3
    assert "hidden" in result.stderr
    assert not options.out.exists()


def test_a_training_that_broke_off_in_a_recovered_run_is_continued(run: Path) -> None:
    words = ("--recover", "sft", "--steps", 40, "--learning-rate", 1e30, "--warmup", 0, *SMALL)
    assert "not finite" in refused(run, *words).stderr
    saved = {path.name: path.stat().st_ino for path in (run / "recovery").glob("best-*")}
    assert saved
    assert "not finite" in refused(run, *words).stderr
    assert saved == {path.name: path.stat().st_ino for path in (run / "recovery").glob("best-*")}
    assert recover_run(run, SHORT).recovery["options"]["recover"] == "lpd"  # the finished one is still known as such


@pytest.mark.parametrize(
    ("train", "changed"), [("projector", (1, 0)), ("lora+projector", (1, 1)), ("full", (1, 1)), ("lora", (0, 1))]
)
def test_what_is_trained_is_what_was_asked(run: Path, train: str, changed: tuple[int, int]) -> None:
    learning = {"learning_rate": 0.01, "steps": 24, "validate_every": 12}  # a gain that no rounding undoes
    recover_run(run, {**SHORT, "recover": "sft", "train": train, **learning})
    cut, weights = (load_file(run / name / "model.safetensors") for name in ("cut", "model"))
    moved = {name for name in cut if not cut[name].equal(weights[name])}
    projector = {name for name in moved if "projector" in name}
    layers = {name for name in moved if ".layers." in name}
    assert (bool(projector), bool(layers)) == changed
    assert bool(moved - projector - layers) == (train == "full")  # norms, embeddings, head


def test_a_recovery_for_a_variant_judges_by_its_weights_and_saves_its_own(recovered, run: Path) -> None:
    result = recover_run(run, {**SHORT, "recover_as": "q2"})
    facts = result.recovery
    assert facts["options"]["recover_as"] == "q2"
    plain = recovered[1].recovery
    assert abs(facts["first"][1] - plain["first"][1]) > 0.1  # of the same cut model
    assert facts["merged_difference"] <= 1e-5
    cut, weights = (load_file(run / name / "model.safetensors") for name in ("cut", "model"))
    assert {name for name in cut if not cut[name].equal(weights[name])}
    assert not any(
        torch.allclose(round_blocks(value, 2), value.float()) for name, value in weights.items() if "_proj.w" in name
    )
    scores = {name: json.loads((run / "quality.json").read_text())[name]["scores"] for name in ("slim", "rounded")}
    assert abs(scores["rounded"]["token_loss"] - scores["slim"]["token_loss"]) > 0.01
    assert scores["rounded"]["exact"] == result.rounded.score
    assert f"with the weights of q2 slim gets {100 * result.rounded.score:.1f} % right" in text_of(run)


def test_a_data_fraction_is_a_subset_drawn_by_the_seed(tmp_path: Path) -> None:
    def drawn(fraction: float, seed: int) -> list[Sample]:
        options = options_in(tmp_path, data_fraction=fraction, seed=seed, steps=None)
        return list(read_trained(options, measured).training)

    measured = read_measured(options_in(tmp_path))
    whole, some = drawn(1.0, 0), drawn(0.05, 0)
    assert len(some) == round(0.05 * len(whole))
    assert all(sample in whole for sample in some)
    assert drawn(0.05, 0) == some != drawn(0.05, 1)


def test_a_teacher_cache_changes_nothing_but_the_work(recovered, run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(recovered[0].out, tmp_path / "other"))
    for out, cache in ((other, None), (run, 50_000_000)):
        recover_run(out, {**SHORT, "recover": "kl", "teacher_cache": cache, "learning_rate": 0.002})
    with_cache, without = ((out / "model" / "model.safetensors").read_bytes() for out in (run, other))
    assert with_cache == without
    assert list((run / "teacher").rglob("*.safetensors")) and not (other / "teacher").exists()


def test_no_recovery_brings_the_cut_model_back(run: Path) -> None:
    cut = (run / "cut" / "model.safetensors").read_bytes()
    result = recover_run(run, {"recover": "none"})
    assert (run / "model" / "model.safetensors").read_bytes() == cut
    assert not (run / "cut").exists()
    assert result.cut is None


def test_a_recovery_that_only_hurts_returns_the_cut_model_and_says_so(tmp_path: Path) -> None:
    hurting = {"recover": "sft", "recall": False, "learning_rate": 30.0, "warmup": 0, "steps": 4}
    options = options_in(tmp_path, ratio=0.05, **hurting)  # a small cut leaves something to lose
    result = CliRunner().invoke(main, words_of(options))
    assert result.exit_code == 0, result.output
    assert "did not help" in result.stdout
    cut, model = (load_file(options.out / name / "model.safetensors") for name in ("cut", "model"))
    for name, value in cut.items():
        assert value.equal(model[name]), name


def test_a_gain_that_rounding_to_the_stored_precision_undoes_is_no_gain(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def coarse(loaded: Loaded) -> None:
        loaded.model.get_output_embeddings().weight.data.neg_()

    monkeypatch.setattr("slimvlm.compress.recovery.recover._round", coarse)
    result = recover_run(run, {**SHORT, "recover": "sft", "learning_rate": 0.003})
    assert not result.recovery["helped"]
    cut, weights = (load_file(run / name / "model.safetensors") for name in ("cut", "model"))
    assert all(cut[name].equal(weights[name]) for name in cut)


def words_of(options: CompressOptions) -> list[str]:
    """The command line that gives these options, as far as they are not the defaults."""
    default = CompressOptions(model="", out=Path(), data=Path())
    words = ["compress", options.model, str(options.out), "--quiet"]
    for name in (field.name for field in fields(options)):
        value = getattr(options, name)
        if name not in ("model", "out") and value != getattr(default, name):
            flag = f"--{name.replace('_', '-')}"
            value = "none" if value == () else value  # of no formats
            words += [flag, str(value)] if not isinstance(value, bool) else [flag if value else f"--no-{flag[2:]}"]
    return words


def refused(run: Path, *more: object) -> Result:
    """The command is refused in one sentence, and the run still has its model."""
    weights = (run / "model" / "model.safetensors").read_bytes()
    result = CliRunner().invoke(main, [str(word) for word in ["recover", run, "--quiet", *more]])
    assert result.exit_code == 3, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    return result


def replace_dense(run: Path, other: Path) -> None:
    """The dense model of the run is now another one of its shape."""
    shutil.copytree(MODEL, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    edit_record(run, lambda record: record["options"].update(model=str(other)))


def test_data_without_answers_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.jsonl").write_text('{"image": "a.png", "question": "what?"}\n')
    assert "answer" in refused(run, "--recover-data", tmp_path / "bare.jsonl").stderr


def test_a_fraction_that_leaves_no_batch_is_refused(run: Path) -> None:
    assert "less than one batch" in refused(run, "--data-fraction", 0.0001).stderr


def test_a_rank_larger_than_a_matrix_is_refused(run: Path) -> None:
    assert "rank" in refused(run, "--rank", 5000).stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--recover-as", "int8"), "--recover-as int8 is no variant that a recovery can be trained for"),
        (("--hidden-states", 0, "--recover", "sft"), "--hidden-states is for the loss hidden"),
        (("--temperature", 2, "--recover", "sft"), "--temperature is for the losses kl and rkl"),
        (("--feature-share", 0.3, "--recover", "sft+kl"), "--feature-share is for the stages of lpd"),
        (("--feature-share", 0.3, "--not-staged"), "--feature-share is for the stages of lpd"),
        (("--teacher", MODEL, "--recover", "sft"), "--teacher is for recipes that learn from a teacher"),
        (("--teacher-cache", "1MB", "--recover", "sft"), "--teacher-cache is for recipes that learn from a teacher"),
        (("--rank", 4, "--train", "full"), "--rank is for low-rank layers"),
        (("--recall-rank", 4, "--no-recall"), "--recall-rank is for weight recalling"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(run: Path, words: tuple, says: str) -> None:
    assert says in refused(run, *words).stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--rank", 5000), "rank 5000 is larger than"),
        (("--targets", "nowhere"), "matches no prunable linear"),
        (("--hidden-states", 99), "hidden state 99 does not exist"),
        (("--teacher", "qwen2_vl"), "the teacher is a qwen2_vl model"),
        (("--validation-samples", 4, "--steps", 1, "--recover-data", "one.jsonl"), "fewer than two images"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_the_plan(tmp_path: Path, words: tuple, says: str) -> None:
    if "qwen2_vl" in words:
        save_checkpoint(tmp_path / "qwen2_vl", tiny_model("qwen2_vl").model, None, None)
    tiny_image().save(tmp_path / "one.png")
    (tmp_path / "one.jsonl").write_text('{"image": "one.png", "question": "what ?", "answer": "a cat"}\n' * 40)
    files = {"qwen2_vl": tmp_path / "qwen2_vl", "one.jsonl": tmp_path / "one.jsonl"}
    command = [*words_of(options_in(tmp_path)), *(str(files.get(word, word)) for word in words)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 3, result.output
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "plan.json").exists()


def test_a_teacher_put_in_the_place_of_the_dense_model_is_refused_by_every_recipe_that_asks_it(
    run: Path, tmp_path: Path
) -> None:
    replace_dense(run, tmp_path / "other")
    for more in (("--no-recall",), ("--train", "projector", "--recover", "hidden"), ("--train", "full")):
        assert "not the model that was cut" in refused(run, *more).stderr


def test_a_hidden_state_that_does_not_exist_is_refused_with_those_that_do(run: Path) -> None:
    assert "hidden state 99 does not exist; choose from -" in refused(run, "--hidden-states", 99).stderr


def test_a_recipe_that_is_none_is_refused_with_the_known_ones(run: Path) -> None:
    assert "hidden" in refused(run, "--recover", "magic").stderr


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_teacher_of_another_shape_or_family_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path / "teacher", tiny_model(name).model, None, None)
    assert "teacher" in refused(run, "--teacher", tmp_path / "teacher").stderr


def test_pruned_weights_of_another_checkpoint_are_not_recalled(run: Path, tmp_path: Path) -> None:
    replace_dense(run, tmp_path / "other")
    assert "not the model that was cut" in refused(run).stderr


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["recover", str(tmp_path)])
    assert result.exit_code == 3
    assert "holds no run" in result.stderr


def test_images_are_held_out_whole() -> None:
    samples = [Sample(Path(f"{index // 3}.png"), (Turn("q", ("a",)),), str(index)) for index in range(60)]
    rest, held = hold_out(samples, 15)
    assert {sample.image for sample in rest}.isdisjoint({sample.image for sample in held})
    assert len(held) == 15
    assert len(rest) + len(held) == 60


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_every_family_is_recovered_into_a_dense_checkpoint(name: str, tmp_path: Path) -> None:
    if getattr(tiny_processor(name), "video_processor", 0) is None:
        pytest.skip("without torchvision this family's processor lacks its video part and cannot be saved")
    save_checkpoint(tmp_path / "dense", tiny_model(name).model, tiny_processor(name), None)
    loaded = load_model(tmp_path / "dense")
    plan = replace(random_plan(loaded.model), model_digest=loaded.digest)
    apply_plan(loaded.model, plan)
    save_checkpoint(tmp_path / "cut", loaded.model, loaded.processor, plan)
    options = replace(options_in(tmp_path), model=str(tmp_path / "dense"), rank=2, recall_rank=2, steps=7)
    data = Trained(samples_in(tmp_path), samples_in(tmp_path)[:4], "", ())
    result = recover(options, plan, tmp_path / "cut", data, tmp_path / "training", silent)
    assert sum(parameter.numel() for parameter in result.loaded.model.parameters()) == plan.parameters_after
    assert not [key for key, _ in result.loaded.model.named_parameters() if "lora" in key]
    assert len(result.history.stages) == (7 if name == "blip2_t5" else 5)
    assert all(math.isfinite(stage["last_loss"]) for stage in result.history.stages)


def samples_in(folder: Path) -> list[Sample]:
    """Eight images with a caption each."""
    samples = []
    for index in range(8):
        path = folder / f"{index}.png"
        tiny_image(seed=index).save(path)
        samples.append(Sample(path, (Turn("what is it", ("a red dog" if index % 2 else "a cat",)),), str(index)))
    return samples


def test_recovery_data_without_answers_is_refused_before_the_plan(tmp_path: Path) -> None:
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"image": "a.png", "question": "what?"}\n')
    with pytest.raises(SampleError, match="answer"):
        compress(options_in(tmp_path, recover_data=bare))
    assert not (tmp_path / "out" / "plan.json").exists()
