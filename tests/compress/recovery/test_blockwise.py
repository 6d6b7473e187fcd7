"""Block-wise recovery: what a block is taught in every family, that it learns, never gets worse, and goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from plans import keep_blocks, random_plan
from tiny_models import EVERY, tiny_model
from torch import nn
from torch.utils._pytree import tree_leaves
from train_options import train_options

from slimvlm.compress.data.questions import stream_through
from slimvlm.compress.models.checkpoint import load_model, stream_model
from slimvlm.compress.models.families import Family, find_family
from slimvlm.compress.models.groups import depths_of
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.models.streaming.lazy import Lazy, read
from slimvlm.compress.options import LowRank, TrainOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.recovery.adapters.recall import attach
from slimvlm.compress.recovery.blockwise.blocks import Course, learn_blocks
from slimvlm.compress.recovery.blockwise.lessons import Lesson, Reading, Taught, WholeTeacher, lessons_of
from slimvlm.compress.recovery.blockwise.pupil import Learnt, Pupil
from slimvlm.compress.recovery.blockwise.streamed import StreamedTeacher
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.streaming import pages

SAMPLES = 4


@lru_cache(maxsize=4)
def dense(name: str) -> nn.Module:
    return tiny_model(name).model.requires_grad_(False)


def family_of(name: str) -> Family:
    return find_family(dense(name).config)


def batches(name: str) -> list[Callable[[], dict[str, torch.Tensor]]]:
    """One batch to learn from and, the same again, to be judged by."""
    found = tiny_model(name).inputs(SAMPLES)
    return [lambda: dict(found), lambda: dict(found)]


def student_of(name: str, plan: Plan, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = apply_plan(copy.deepcopy(dense(name)), plan).eval().requires_grad_(True)
    return model.to(dtype)


def course_of(name: str, student: nn.Module, plan: Plan, steps: int = 4, teacher: nn.Module | None = None) -> Course:
    family = family_of(name)
    lessons = lessons_of(student, dense(name), family, plan.blocks)
    teaching = WholeTeacher(teacher or dense(name), family, batches(name))
    return Course(lessons, teaching, [0] * steps, [1])


def options_of(**given) -> TrainOptions:
    return train_options(
        **{"steps": 4, "validate_every": 2, "learning_rate": 3e-3, "train_batch_size": SAMPLES, **given}
    )


@pytest.mark.parametrize("name", EVERY)
def test_a_dense_block_called_as_it_is_taught_gives_what_it_is_to_give(name: str, tmp_path: Path) -> None:
    """So a lesson has all that a block reads: masks, positions, what another tower put out."""
    model, family = dense(name), family_of(name)
    paths = [
        (f"{tower.blocks}.{layer}", stream_through(family, tower))
        for tower in family.towers
        for layer in range(depths_of(model, family)[tower.name])
    ]
    lessons = [Lesson(path, path, path, path, stream) for path, stream in paths]
    reading = WholeTeacher(model, family, batches(name)).read(0, lessons)
    assert reading.tokens > 0
    for lesson in lessons:
        pupil = Pupil(model, lesson, options_of(), tmp_path, "", 0)
        pupil.look(reading.taught[lesson.path])
        pupil.judge()
        assert pupil.learnt.before == pytest.approx(0, abs=1e-9), lesson.path


@pytest.mark.parametrize("name", EVERY)
def test_a_model_read_block_by_block_teaches_what_the_whole_one_teaches(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the work of blocks that left: of every tower the first, where one can leave. All that waits is put away."""
    monkeypatch.setattr(pages, "KEPT", 0)
    monkeypatch.setattr(pages, "LEAST", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, family = dense(name), family_of(name)
    plan = keep_blocks(model, lambda group: [group.blocks[0].index] if len(group.blocks) > 1 else [])
    student = student_of(name, plan)
    lessons = lessons_of(student, model, family, plan.blocks)
    whole = WholeTeacher(model, family, batches(name)).read(1, lessons)
    teacher, asked, reading = StreamedTeacher(model, family, batches(name)), [], None
    for chosen in teacher.passes(lessons, lambda _: 0):
        assert torch.is_grad_enabled()
        asked += chosen
        for _ in range(2):  # as often as it likes
            reading = teacher.read(1, chosen)
            assert reading.tokens == whole.tokens and [*tmp_path.glob("slimvlm-*/*")]
            for lesson in chosen:
                same(reading.taught[lesson.path], whole.taught[lesson.path])
    del teacher, reading
    assert asked == lessons and not [*tmp_path.glob("slimvlm-*/*")]
    for tower in family.towers:  # nothing stays behind
        assert all("forward" not in block.__dict__ for block in model.get_submodule(tower.blocks))


def same(one: Taught, other: Taught) -> None:
    leaves = [tree_leaves((found.args, dict(found.kwargs), found.output, found.mask)) for found in (one, other)]
    for left, right in zip(*leaves, strict=True):
        if isinstance(left, torch.Tensor):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_blocks_learn_the_same_from_a_checkpoint_read_block_by_block(tmp_path: Path) -> None:
    model, family = dense("qwen2_vl"), family_of("qwen2_vl")
    copy.deepcopy(model).save_pretrained(tmp_path / "dense")
    plan, found = random_plan(model, seed=1), []
    for kind, teacher in (
        (WholeTeacher, load_model(tmp_path / "dense", attention="eager").model),
        (StreamedTeacher, stream_model(tmp_path / "dense", attention="eager").model),
    ):
        student = student_of("qwen2_vl", plan)
        lessons = lessons_of(student, teacher, family, {})
        course = Course(lessons, kind(teacher, family, batches("qwen2_vl")), [0] * 4, [1])
        learnt, tokens = learn_blocks(student, course, options_of(), tmp_path / kind.__name__)
        found.append(([one.block for one in learnt], tokens, torch.tensor([one.after for one in learnt])))
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_every_cut_block_learns_and_nothing_else_changes(name: str, tmp_path: Path) -> None:
    plan = random_plan(dense(name), seed=1)
    student = student_of(name, plan)
    course = course_of(name, student, plan)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    learnt, tokens = learn_blocks(student, course, options_of(), tmp_path)
    assert [one.block for one in learnt] == [lesson.path for lesson in course.lessons]
    assert all(one.after <= one.before for one in learnt)
    assert sum(one.after for one in learnt) < 0.95 * sum(one.before for one in learnt)
    assert tokens > 0
    taught = tuple(f"{lesson.path}." for lesson in course.lessons)
    changed = {key for key, value in student.state_dict().items() if not value.equal(before[key])}
    assert changed
    assert all(key.startswith(taught) for key in changed)


@pytest.mark.parametrize("name", EVERY)
def test_a_student_read_block_by_block_learns_what_the_whole_one_learns(name: str, tmp_path: Path) -> None:
    """Its weights are read from the files of the blocks, also by who finds them finished."""
    plan, found = random_plan(dense(name), seed=1), []
    cut = student_of(name, plan)
    save_checkpoint(tmp_path / "cut", cut, None, None)
    attention = cut.config._attn_implementation
    for kind in ("whole", "streamed", "streamed"):
        student = cut
        if kind == "streamed":
            student = stream_model(tmp_path / "cut", attention=attention).model.requires_grad_(True)
        learnt, _ = learn_blocks(student, course_of(name, student, plan), options_of(), tmp_path / kind)
        values = dict(zip(dict(student.named_parameters()), read(list(student.parameters())), strict=True))
        found.append(([one.after for one in learnt], values))
        assert any(isinstance(value, Lazy) for value in student.parameters()) == (kind == "streamed")
    (whole, weights), *others = found
    for after, values in others:
        assert after == pytest.approx(whole, rel=1e-3, abs=1e-6)
        for key, value in weights.items():
            assert (values[key] - value).norm() <= 1e-2 * value.norm() + 1e-6, key


def test_no_more_of_a_student_than_the_block_that_learns_is_in_memory(tmp_path: Path) -> None:
    plan = random_plan(dense("llava"), seed=1)
    save_checkpoint(tmp_path / "cut", student_of("llava", plan), None, None)
    student = stream_model(tmp_path / "cut").model.requires_grad_(True)
    course = course_of("llava", student, plan)
    lazy = [value for value in student.parameters() if isinstance(value, Lazy)]

    class OneByOne(WholeTeacher):
        def passes(self, lessons, size):
            assert all(size(lesson) > 0 for lesson in lessons)
            yield from ([lesson] for lesson in lessons)

    def there(*_: object) -> None:
        held.append(sum(isinstance(value, Lazy) for value in student.parameters()))

    held: list[int] = []
    one = OneByOne(dense("llava"), family_of("llava"), batches("llava"))
    learn_blocks(student, Course(course.lessons, one, course.steps, [1]), options_of(), tmp_path / "blocks", there)
    blocks = {len(lazy) - len([*student.get_submodule(lesson.path).parameters()]) for lesson in course.lessons}
    assert set(held) == blocks


def test_blocks_that_left_are_learnt_by_the_one_before_them(tmp_path: Path) -> None:
    """Also those in front of the first that stays, which is called as itself but given what the first one was."""
    model = dense("llava")
    tower = family_of("llava").towers[-1].blocks
    plan = keep_blocks(model, lambda group: [0] if group.tower == "language" else [])
    student = student_of("llava", plan)
    course = course_of("llava", student, plan)
    assert [(one.path, one.place, one.first, one.last) for one in course.lessons] == [
        (f"{tower}.0", f"{tower}.1", f"{tower}.0", f"{tower}.1")
    ]
    (found,) = course.teacher.read(0, course.lessons).taught.values()
    before, after = (
        course.teacher.read(0, [Lesson(path, path, path, path, "text")]).taught[path]
        for path in (f"{tower}.0", f"{tower}.1")
    )
    hidden = [one.args[0] if one.args else one.kwargs["hidden_states"] for one in (found, before)]
    assert hidden[0].equal(hidden[1])
    assert found.output.equal(after.output)
    (learnt,), _ = learn_blocks(student, course, options_of(), tmp_path)
    assert learnt.after < learnt.before


def test_padding_says_nothing(tmp_path: Path) -> None:
    plan = random_plan(dense("llava"), seed=1)
    student = student_of("llava", plan)
    course = course_of("llava", student, plan)
    lesson = course.lessons[-1]
    taught = course.teacher.read(0, [lesson]).taught[lesson.path]
    mask = torch.ones(taught.output.shape[:-1], dtype=torch.bool)
    mask[:, -2:] = False
    other = taught.output.clone()
    other[:, -2:] = torch.nan
    missed = []
    for output in (taught.output, other):
        pupil = Pupil(student, lesson, options_of(), tmp_path, "", 0)
        pupil.look(taught._replace(output=output, mask=mask))
        pupil.judge()
        missed.append(pupil.learnt.before)
    assert missed[0] == missed[1] > 0


@pytest.mark.parametrize("train", ["lora", "full"])
def test_bf16_learns_and_keeps_its_dtype(train: str, tmp_path: Path) -> None:
    teacher = copy.deepcopy(dense("qwen2_vl")).to(torch.bfloat16)
    plan = random_plan(dense("qwen2_vl"), seed=1)
    student = student_of("qwen2_vl", plan, torch.bfloat16)
    course = course_of("qwen2_vl", student, plan, steps=6, teacher=teacher)
    if train == "lora":
        attach(student.requires_grad_(False), plan, None, LowRank(rank=1, recall=False))
    else:
        student.float()  # as a recovery holds weights that take small steps
    learnt, _ = learn_blocks(student, course, options_of(steps=6, learning_rate=1e-2), tmp_path)
    assert sum(one.after for one in learnt) < sum(one.before for one in learnt)
    trained = {value.dtype for value in student.parameters() if value.requires_grad}
    assert trained == {torch.float32}


def test_a_block_that_learns_nothing_good_stays_as_it_was_and_says_so(tmp_path: Path) -> None:
    plan = random_plan(dense("llava"), seed=1)
    student = student_of("llava", plan)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    learnt, _ = learn_blocks(student, course_of("llava", student, plan), options_of(learning_rate=1e3), tmp_path)
    assert {one.best_step for one in learnt} == {0}
    assert [one.after for one in learnt] == [one.before for one in learnt]
    assert all(value.equal(before[key]) for key, value in student.state_dict().items())


def test_steps_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    plan = random_plan(dense("llava"), seed=1)
    student = student_of("llava", plan)
    course = course_of("llava", student, plan)

    class Broken(WholeTeacher):
        def read(self, number, lessons) -> Reading:
            found = super().read(number, lessons)
            if number == 0:
                found.taught[lessons[0].path].output.fill_(torch.inf)
            return found

    broken = Course(course.lessons, Broken(dense("llava"), family_of("llava"), batches("llava")), [0] * 4, [1])
    learnt, _ = learn_blocks(student, broken, options_of(), tmp_path)
    assert [one.skipped for one in learnt] == [4, *[0] * (len(learnt) - 1)]
    assert learnt[0].best_step == 0
    assert all(one.best_step for one in learnt[1:])


class _KilledError(Exception):
    pass


def test_a_killed_recovery_goes_on_block_by_block_to_the_same_weights(tmp_path: Path) -> None:
    """Blocks learn one after the other, as where memory is for one; those that are done are not asked for again."""
    plan = random_plan(dense("llava"), seed=1)

    class OneByOne(WholeTeacher):
        asked: list[str] = []  # noqa: RUF012 (of one test)

        def passes(self, lessons, size):
            for lesson in lessons:
                self.asked.append(lesson.path)
                yield [lesson]

    def run(folder: Path, killed_at: int | None = None) -> tuple[nn.Module, list[Learnt]]:
        student = student_of("llava", plan)
        attach(student.requires_grad_(False), plan, None, LowRank(rank=1, recall=False, dropout=0.3))
        torch.manual_seed(1)
        with torch.no_grad():  # attach draws
            for value in (value for value in student.parameters() if value.requires_grad):
                value.add_(0.01 * torch.randn(value.shape))
        calls = []

        def told(*_: object) -> None:
            calls.append(0)
            if len(calls) == killed_at:
                raise _KilledError

        course = course_of("llava", student, plan)
        one = OneByOne(dense("llava"), family_of("llava"), batches("llava"))
        OneByOne.asked = []
        course = Course(course.lessons, one, course.steps, course.held_out)
        learnt, _ = learn_blocks(student, course, options_of(checkpoint_every=1), folder, told)
        return student, learnt

    whole, learnt = run(tmp_path / "whole")
    everyone = OneByOne.asked
    for folder, killed_at in ((tmp_path / "first", 2), (tmp_path / "third", 11)):
        with pytest.raises(_KilledError):
            run(folder, killed_at)
        student, again = run(folder)
        assert OneByOne.asked == everyone[(killed_at - 1) // 4 :]
        assert again == learnt
        states = (model.state_dict() for model in (whole, student))
        assert all(one.equal(other) for one, other in zip(*(state.values() for state in states), strict=True))
    run(tmp_path / "whole")
    assert OneByOne.asked == []


def test_what_another_course_left_in_the_folder_is_learnt_again(tmp_path: Path) -> None:
    plan = random_plan(dense("llava"), seed=1)
    rates = (1e-3, 3e-3)
    found = []
    for rate in rates:
        student = student_of("llava", plan)
        learnt, _ = learn_blocks(student, course_of("llava", student, plan), options_of(learning_rate=rate), tmp_path)
        found.append(learnt)
    student = student_of("llava", plan)
    fresh, _ = learn_blocks(
        student, course_of("llava", student, plan), options_of(learning_rate=rates[1]), tmp_path / "fresh"
    )
    assert found[0] != found[1] == fresh


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [WholeTeacher, StreamedTeacher])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_blocks_learn_on_a_gpu(kind: type, precision: str, tmp_path: Path) -> None:
    teacher, plan = copy.deepcopy(dense("llava")).cuda(), random_plan(dense("llava"), seed=1)
    student = student_of("llava", plan).cuda()
    lessons = lessons_of(student, teacher, family_of("llava"), {})
    teaching = kind(teacher, family_of("llava"), batches("llava"), precision)
    learnt, _ = learn_blocks(
        student, Course(lessons, teaching, [0] * 4, [1]), options_of(precision=precision), tmp_path
    )
    assert sum(one.after for one in learnt) < sum(one.before for one in learnt)
