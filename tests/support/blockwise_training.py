"""A block-wise recovery of a tiny model, in this process or those it has joined; then two steps of the whole."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from plans import random_plan
from tiny_models import tiny_model
from torch import Tensor
from train_options import train_options

from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import depths_of
from slimvlm.compress.options import LowRank
from slimvlm.compress.recovery.adapters.frozen import freeze
from slimvlm.compress.recovery.adapters.recall import attach
from slimvlm.compress.recovery.blockwise.blocks import Course, learn_blocks
from slimvlm.compress.recovery.blockwise.lessons import WholeTeacher, lessons_of
from slimvlm.compress.recovery.distillation.distiller import Distiller
from slimvlm.compress.recovery.distillation.recipe import make_stages, parse_recipe
from slimvlm.compress.recovery.training.stepping import Task
from slimvlm.compress.recovery.training.trainer import train
from slimvlm.compress.slicing.apply import apply_plan

COUNT = 4


def blockwise_training(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """(what the low-rank layers of a frozen base in 8 bits have learnt block by block, the blocks whose lessons were
    read here)."""
    tiny = tiny_model("llava")
    model, family = tiny.model, find_family(tiny.model.config)
    plan, samples = random_plan(model, seed=1), tiny.inputs(COUNT)
    student = apply_plan(copy.deepcopy(model), plan).eval().requires_grad_(False)
    lessons = lessons_of(student, model, family, plan.blocks)
    freeze(student, "int8")
    torch.manual_seed(0)
    attach(student, plan, None, LowRank(rank=1, recall=False))
    read: list[str] = []

    class Watched(WholeTeacher):
        def read(self, number, lessons):
            read.extend(lesson.path for lesson in lessons if lesson.path not in read)
            return super().read(number, lessons)

    options = train_options(steps=4, validate_every=2, learning_rate=1e-2, train_batch_size=COUNT)
    teacher = Watched(model, family, [lambda: dict(samples)])
    learn_blocks(student, Course(lessons, teacher, [0] * 4, [0]), options, folder)
    learnt = {key: value.detach().clone() for key, value in student.named_parameters() if value.requires_grad}
    distiller = Distiller(student, None, family, parse_recipe("sft"))
    stages = make_stages(family, depths_of(student, family), distiller.recipe)
    collate = lambda indices: {name: value[indices] for name, value in samples.items()}  # noqa: E731
    train(distiller, Task(stages, collate, COUNT), train_options(steps=2, train_batch_size=COUNT), folder)
    return learnt, read
