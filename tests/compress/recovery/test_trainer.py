"""The training loop on one process."""

import gc
import json
import math
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import Forked
from tiny_models import tiny_model
from torch import Tensor, nn
from toy_distiller import COUNT, TASK, TAUGHT, ToyDistiller, collate, token_loss, toy_task
from train_options import train_options

from slimvlm.compress.errors import DeviceError, OutputError, RecoveryError, UnsuitableOptionError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.options import TrainOptions
from slimvlm.compress.progress import silent
from slimvlm.compress.recovery.distillation.distiller import Distiller
from slimvlm.compress.recovery.distillation.recipe import Stage, parse_recipe
from slimvlm.compress.recovery.distillation.teacher_cache import TeacherCache
from slimvlm.compress.recovery.training.history import History
from slimvlm.compress.recovery.training.state import StateFolder, load_best
from slimvlm.compress.recovery.training.stepping import Task
from slimvlm.compress.recovery.training.trainer import train

SUPPORT = Path(__file__).parents[2] / "support"
OPTIONS = train_options(steps=12, train_batch_size=5, learning_rate=1e-2, checkpoint_every=4, validate_every=4)

WORKER = """
import os, sys
from pathlib import Path
import torch
from toy_distiller import ToyDistiller, token_loss, toy_task
from train_options import train_options
from slimvlm.compress.recovery.training.trainer import train

folder, when, which = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
distiller = ToyDistiller(dropout=0.2)
options = train_options(steps=12, train_batch_size=5, learning_rate=1e-2, checkpoint_every=4, validate_every=4)

def progress(stage, step, steps, note):
    if step == when:
        os.kill(os.getpid(), which)

task = toy_task(validate=lambda: (0.0, -token_loss(distiller.student)))
train(distiller, task, options, folder, progress)
"""


def run(distiller: ToyDistiller, folder: Path, options: TrainOptions = OPTIONS, progress=silent, **task) -> History:
    task = {"validate": lambda: (0.0, -token_loss(distiller.student)), **task}
    return train(distiller, toy_task(**task), options, folder, progress)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "recovery.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[dict]:
    return [line for line in lines(folder) if "validation" not in line]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert all(torch.equal(left[name], right[name]) for name in left)


def killed(folder: Path, when: int, which: int) -> int:
    """A real process that sends itself a signal after step `when`; its exit status."""
    script = folder.with_name("worker.py")
    script.write_text(WORKER)
    with Forked(folder.parent, script, folder, when, int(which)) as process:
        return process.wait()


def test_the_loss_falls_and_the_history_says_so(tmp_path) -> None:
    distiller, told = ToyDistiller(), []
    history = run(distiller, tmp_path, replace(OPTIONS, steps=60), progress=lambda *facts: told.append(facts))
    assert history.helped and history.best_step == 60 and not history.stopped_early
    assert history.last == history.best == (0.0, -token_loss(distiller.student))
    assert history.first is not None and history.best[1] > history.first[1] + 1
    assert [stage["name"] for stage in history.stages] == ["features", "task"]
    assert [stage["steps"] for stage in history.stages] == [24, 36]
    assert history.stages[1]["last_loss"] < history.stages[1]["first_loss"]
    assert history.tokens == sum(stage["tokens"] for stage in history.stages) > 60 * 5
    assert history.peak_memory_bytes > 2**20
    assert json.loads(json.dumps(history.to_dict()))["steps"] == 60
    assert [facts[:3] for facts in told] == [("recover", step, 60) for step in range(1, 61)]
    assert told[0][3].startswith("features: loss ") and told[-1][3].startswith("task: loss ")


def test_the_journal_has_a_line_per_step_and_validation(tmp_path) -> None:
    run(ToyDistiller(), tmp_path)
    written = lines(tmp_path)
    assert [line["step"] for line in written if "validation" in line] == [0, 4, 8, 12]
    task = steps(tmp_path)[-1]
    assert task["stage"] == "task" and task["lr"] == OPTIONS.learning_rate
    assert task["loss"] == pytest.approx(task["parts"]["sft"] + 0.5 * task["parts"]["kl"])
    assert task["grad_norm"] > 0 and task["tokens_per_second"] > 0 and task["seconds"] > 0


def test_only_what_asks_for_gradients_is_trained(tmp_path) -> None:
    distiller = ToyDistiller()
    distiller.student.embed.requires_grad_(False)
    before, teacher = weights(distiller.student), weights(distiller.teacher)
    run(distiller, tmp_path)
    after = weights(distiller.student)
    assert torch.equal(before["embed.weight"], after["embed.weight"])
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert_same(teacher, weights(distiller.teacher))
    assert all(parameter.grad is None for parameter in distiller.parameters())


def test_random_generators_are_as_before(tmp_path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    run(ToyDistiller(dropout=0.2), tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_accumulated_parts_give_the_step_of_the_whole_batch(tmp_path) -> None:
    for accumulate in (1, 2, 5):
        run(ToyDistiller(), tmp_path / str(accumulate), replace(OPTIONS, accumulate=accumulate))
    for name in ("loss", "grad_norm"):
        whole, two, five = ([line[name] for line in steps(tmp_path / part)] for part in ("1", "2", "5"))
        assert two == pytest.approx(whole, rel=1e-4)
        assert five == pytest.approx(whole, rel=1e-4)


def test_the_gradient_is_bounded(tmp_path) -> None:
    free, bounded, options = ToyDistiller(), ToyDistiller(), replace(OPTIONS, steps=1, weight_decay=0.0)
    run(free, tmp_path / "free", replace(options, clip=0.0))
    run(bounded, tmp_path / "bounded", replace(options, clip=1e-12))  # below the epsilon of AdamW
    start = ToyDistiller().student.head.weight
    assert (free.student.head.weight - start).abs().max() > 1e-3
    assert (bounded.student.head.weight - start).abs().max() < 1e-4


def test_a_fresh_optimiser_per_stage_is_as_two_trainings(tmp_path) -> None:
    options = replace(OPTIONS, steps=10, train_batch_size=COUNT, reset_optimizer=True, warmup=2, validate_every=100)
    one, two = ToyDistiller(), ToyDistiller()
    run(one, tmp_path / "one", options, validate=None)
    run(two, tmp_path / "first", replace(options, steps=4), validate=None, stages=TAUGHT[:1])
    run(two, tmp_path / "second", replace(options, steps=6), validate=None, stages=TAUGHT[1:])
    for name, value in weights(one.student).items():
        torch.testing.assert_close(value, two.student.state_dict()[name], rtol=0, atol=1e-6)


def test_after_sigkill_a_training_reaches_the_same_weights(tmp_path) -> None:
    whole = ToyDistiller(dropout=0.2)
    history = run(whole, tmp_path / "whole")
    assert killed(tmp_path / "killed", 7, signal.SIGKILL) == -signal.SIGKILL
    assert [line["step"] for line in steps(tmp_path / "killed")][-1] == 7
    resumed = ToyDistiller(dropout=0.2)
    again = run(resumed, tmp_path / "killed")
    assert_same(weights(whole.student), weights(resumed.student))
    assert (again.best, again.best_step, again.tokens) == (history.best, history.best_step, history.tokens)
    timed = ("seconds", "tokens_per_second")
    curves = [
        [{name: value for name, value in line.items() if name not in timed} for line in lines(tmp_path / name)]
        for name in ("whole", "killed")
    ]
    assert curves[0] == curves[1]


@pytest.mark.parametrize(("when", "saved_at"), [(5, 6), (11, 12), (12, 12)])  # 12: due to validate
def test_sigterm_saves_and_exits(tmp_path, when, saved_at) -> None:
    assert killed(tmp_path / "stopped", when, signal.SIGTERM) == 128 + signal.SIGTERM
    saved = StateFolder(tmp_path / "stopped", writer=False).load()
    assert saved is not None and saved["facts"].steps == saved_at  # the step under way was finished
    whole, resumed = ToyDistiller(dropout=0.2), ToyDistiller(dropout=0.2)
    history, again = run(whole, tmp_path / "whole"), run(resumed, tmp_path / "stopped")
    assert_same(weights(whole.student), weights(resumed.student))
    assert (again.best, again.best_step, again.last) == (history.best, history.best_step, history.last)


def test_a_finished_training_is_not_repeated(tmp_path) -> None:
    first, again = ToyDistiller(), ToyDistiller()
    history = run(first, tmp_path)
    calls = again.calls
    assert run(again, tmp_path).best == history.best
    assert again.calls == calls
    assert_same(weights(first.student), weights(again.student))


def test_another_training_is_not_continued(tmp_path) -> None:
    run(ToyDistiller(), tmp_path)
    with pytest.raises(RecoveryError, match=r"learning_rate = 0\.01, not 0\.5"):
        run(ToyDistiller(), tmp_path, replace(OPTIONS, learning_rate=0.5))
    with pytest.raises(RecoveryError, match="stages"):
        run(ToyDistiller(), tmp_path, stages=TASK)
    run(ToyDistiller(), tmp_path, replace(OPTIONS, checkpoint_every=1))


def test_one_loss_that_is_not_finite_is_skipped(tmp_path) -> None:
    distiller = ToyDistiller(poison=range(6, 7))
    history = run(distiller, tmp_path)
    assert history.skipped == 1 and history.steps == 12
    assert [line["step"] for line in steps(tmp_path) if line.get("skipped")] == [7]
    assert all(value.isfinite().all() for value in weights(distiller.student).values())


def test_ten_in_a_row_stop_the_training_and_keep_the_last_good_state(tmp_path) -> None:
    distiller = ToyDistiller(poison=range(6, 100))
    with pytest.raises(RecoveryError, match="10 steps in a row, up to step 16"):
        run(distiller, tmp_path, replace(OPTIONS, steps=30), stages=TASK)
    files = StateFolder(tmp_path, writer=False)
    saved = files.load()
    assert saved is not None and saved["facts"].steps == 6
    found = {name: torch.zeros(shape) for name, shape in files.shapes(saved["tensors"]).items()}
    files.fill(saved["tensors"], found)
    assert all(value.isfinite().all() for value in found.values())


def test_a_training_that_only_hurts_returns_the_starting_weights(tmp_path) -> None:
    distiller = ToyDistiller()
    before, scores = weights(distiller.student), iter([(0.9, -1.0), (0.9, -1.5), (0.8, -0.5), (0.9, -1.1)])
    history = run(distiller, tmp_path, validate=lambda: next(scores))
    assert not history.helped and history.best_step == 0
    assert history.first == history.best == (0.9, -1.0)
    assert_same(before, weights(distiller.student))


def test_the_best_weights_are_returned_not_the_last(tmp_path) -> None:
    distiller, seen = ToyDistiller(), []
    scores = iter([(0.5, -1.0), (0.5, -0.9), (0.7, -0.5), (0.6, -0.1)])

    def validate() -> tuple[float, float]:
        seen.append(weights(distiller.student))
        return next(scores)

    history = run(distiller, tmp_path, validate=validate)
    assert history.helped and history.best_step == 8 and history.last == (0.6, -0.1)
    assert_same(seen[2], weights(distiller.student))
    fresh = ToyDistiller().student
    load_best(fresh, tmp_path)
    assert_same(seen[2], weights(fresh))
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-00000008"]


def test_a_score_that_is_no_number_is_never_the_best(tmp_path) -> None:
    scores = iter([(math.nan, math.nan), (0.1, -1.0), (math.nan, 0.0), (0.1, -1.1)])
    history = run(ToyDistiller(), tmp_path, validate=lambda: next(scores))
    assert history.best_step == 4 and history.helped


def test_a_training_stops_early_in_its_last_stage_only(tmp_path) -> None:
    stages = (replace(TAUGHT[0], share=0.5), replace(TAUGHT[1], share=0.5))
    options = replace(OPTIONS, steps=24, validate_every=2, patience=3)
    history = run(ToyDistiller(), tmp_path, options, stages=stages, validate=lambda: (1.0, 0.0))
    assert history.stopped_early and history.steps == 18  # three validations after step 12, and none before counted


def test_without_validation_the_last_weights_stay(tmp_path) -> None:
    distiller = ToyDistiller()
    history = run(distiller, tmp_path, validate=None)
    assert history.best is None and history.helped and history.best_step == 12
    fresh = ToyDistiller().student
    load_best(fresh, tmp_path)
    assert_same(weights(fresh), weights(distiller.student))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 512 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    gc.collect()  # no tensor maps a file of it any more
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_stops_the_training_and_keeps_the_checkpoint(small_disk) -> None:
    def fill_disk(_stage, step, *_) -> None:
        if step == 5:
            with (small_disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
                while True:
                    file.write(b"x" * 4096)

    with pytest.raises(OutputError, match="free space"):
        run(ToyDistiller(), small_disk / "run", progress=fill_disk)
    saved = StateFolder(small_disk / "run", writer=False).load()
    assert saved is not None and saved["facts"].steps == 4
    (small_disk / "filler").unlink()
    whole, resumed = ToyDistiller(), ToyDistiller()
    run(whole, small_disk.parent / "whole")
    run(resumed, small_disk / "run")
    assert_same(weights(whole.student), weights(resumed.student))


def test_bf16_runs_on_a_cpu_and_leaves_the_distiller_as_it_was(tmp_path) -> None:
    distiller = ToyDistiller()
    history = run(distiller, tmp_path / "bf16", replace(OPTIONS, steps=40, precision="bf16"))
    assert history.helped
    assert distiller.student.head.weight.dtype == torch.float32
    batch = collate([0, 1])
    loss, _ = distiller(batch, TASK[0])
    assert loss.item() == pytest.approx(distiller.forward(batch, TASK[0])[0].item(), abs=0)
    run(distiller, tmp_path / "fp32")  # another precision in the same interpreter


def test_fp16_is_refused_on_a_cpu(tmp_path) -> None:
    with pytest.raises(DeviceError, match="bf16"):
        run(ToyDistiller(), tmp_path, replace(OPTIONS, precision="fp16"))


@pytest.mark.parametrize(
    ("options", "count", "says"),
    [({}, 0, "larger part of the data"), ({"accumulate": 6}, 20, "at least 6"), ({"accumulate": 3}, 2, "at least 3")],
)
def test_too_few_samples_are_refused(tmp_path, options, count, says) -> None:
    with pytest.raises(UnsuitableOptionError, match=says):
        train(ToyDistiller(), toy_task(TASK, count), replace(OPTIONS, **options), tmp_path)


def test_a_student_with_nothing_to_train_is_refused(tmp_path) -> None:
    distiller = ToyDistiller()
    distiller.student.requires_grad_(False)
    with pytest.raises(UnsuitableOptionError, match="nothing of the student"):
        run(distiller, tmp_path)


def test_a_student_without_gradient_checkpointing_is_refused(tmp_path) -> None:
    with pytest.raises(UnsuitableOptionError, match="ToyModel does not support"):
        run(ToyDistiller(), tmp_path, replace(OPTIONS, gradient_checkpointing=True))


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path) -> None:
    def trained(checkpointing: bool) -> tuple[list[float], dict[str, Tensor]]:
        tiny = tiny_model("llava")
        recipe = parse_recipe("sft")
        distiller = Distiller(tiny.model, None, find_family(tiny.model.config), recipe)
        stage = Stage("task", (), recipe.losses, 1.0)
        options = replace(OPTIONS, steps=2, train_batch_size=2, gradient_checkpointing=checkpointing)
        folder = tmp_path / str(checkpointing)
        train(distiller, Task((stage,), lambda indices: tiny.inputs(len(indices)), 4, seed=3), options, folder)
        assert not any(getattr(module, "gradient_checkpointing", False) for module in tiny.model.modules())
        return [line["grad_norm"] for line in steps(folder)], weights(tiny.model)

    (plain_norms, plain), (checked_norms, checked) = trained(False), trained(True)
    assert checked_norms == pytest.approx(plain_norms, rel=1e-5)
    for name, value in plain.items():
        torch.testing.assert_close(value, checked[name], rtol=1e-4, atol=1e-5)


def test_cached_targets_are_those_of_the_teacher(tmp_path) -> None:
    plain, cached = ToyDistiller(), ToyDistiller()
    asked: list[int] = []
    cached.teacher.register_forward_hook(lambda *_: asked.append(1))
    run(plain, tmp_path / "plain")
    run(cached, tmp_path / "cached", cache=TeacherCache(tmp_path / "teacher", budget_bytes=2**20))
    assert_same(weights(plain.student), weights(cached.student))
    assert len(asked) == COUNT // OPTIONS.train_batch_size  # the batches of an epoch, seen in three of them
