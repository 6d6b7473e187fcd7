"""The options of a recovery; their names and defaults are those of `RecoverOptions`."""

from __future__ import annotations

import click

from slimvlm.compress.options import IN_TORCH, PRECISIONS, SCHEDULES, TRAINED, RecoverOptions
from slimvlm.compress.recovery.distillation.recipe import LOSSES, PROGRESSIONS, STARTS
from slimvlm.console.options.making import (
    COUNT,
    FILE_OR_FOLDER,
    NAME,
    POSITIVE,
    RATIO,
    RATIO_OR_ALL,
    RECOVERY,
    TEXT,
    TRAINING,
    defaulting_to,
    panel,
    together,
)
from slimvlm.console.options.values import MOST, Count, Number, Size

option = defaulting_to(RecoverOptions)
RECIPES = (
    f"{', '.join(PROGRESSIONS)}, a sum of {', '.join(LOSSES)} as sft+0.5*kl, {', '.join(STARTS)} alone or before them, "
    "or none."
)

recover_option = panel(RECOVERY, option("--recover", type=TEXT, metavar="RECIPE", help=RECIPES))
steps_option = panel(
    TRAINING, option("--steps", type=COUNT, help="Optimiser steps of the recovery; else what --epochs needs.")
)
train_batch_option = panel(
    TRAINING,
    option("--train-batch-size", type=COUNT, help="Samples per step, over all processes; else 16 or the paper's."),
)
goal_options = panel(
    RECOVERY,
    recover_option,
    option("--recover-data", type=FILE_OR_FOLDER, help="Samples to train on; else those of --data not evaluated."),
    option("--data-fraction", type=RATIO_OR_ALL, help="Train on this share of them, drawn by --seed."),
    option("--validation-samples", type=COUNT, help="Held out, by image, to keep the best state; else by the steps."),
    option("--teacher", type=NAME, metavar="MODEL", help="Learn from this checkpoint; else from the dense model."),
    option("--train", type=click.Choice(TRAINED), help="What is trained."),
    option("--frozen", type=click.Choice(tuple(IN_TORCH)), help="Hold what is not trained in 8 or 4 bits meanwhile."),
    option("--recover-as", type=TEXT, metavar="VARIANT", help="Train for the weights of this export: q8, q4 or q2."),
    option("--rank", type=COUNT, help="Of the low-rank update."),
    option("--recall-rank", type=COUNT, help="Of the branch through the pruned weights."),
    option("--alpha", type=POSITIVE, help="Updates are scaled by alpha / rank."),
    option("--dropout", type=Number(0, 1, max_open=True), help="On the input of the low-rank update."),
    option("--targets", type=TEXT, multiple=True, metavar="NAME", help="Adapt linears of these names; repeatable."),
    option("--recall/--no-recall", default=True, help="Recall the pruned weights."),
    option("--staged/--not-staged", default=True, help="lpd: supervise ever more blocks, or all of them at once."),
    option("--block-share", type=RATIO, help="blockwise+RECIPE: steps of every block by itself; else three tenths."),
    option("--feature-share", type=RATIO, help="lpd: samples for the stages before the answers; else a fifth."),
    option("--temperature", type=POSITIVE, help="Of the losses kl and rkl."),
    option(
        "--hidden-states",
        type=Count(-MOST),
        multiple=True,
        metavar="INDEX",
        help="Compared by the loss hidden: -1 is the last, 0 the embeddings; repeatable.",
    ),
    option("--teacher-cache", type=Size(), metavar="SIZE", help="Keep so much of the teacher's outputs on disk."),
)
training_options = panel(
    TRAINING,
    option("--epochs", type=POSITIVE, help="Passes over the samples."),
    steps_option,
    train_batch_option,
    option("--accumulate", type=COUNT, help="Compute a batch in so many parts."),
    option("--learning-rate", type=POSITIVE, help="Else by what is trained, falling with the model's width."),
    option("--schedule", type=click.Choice(SCHEDULES), help="Of the learning rate; else cosine or the paper's."),
    option("--warmup", type=Count(0), help="Steps of linear warm-up; else 10 or the paper's."),
    option("--weight-decay", type=Number(min=0), help="Of matrices."),
    option("--clip", type=Number(0), help="Largest norm of the gradient, 0 for any; else 1 or the paper's 0."),
    option("--reset-optimizer/--keep-optimizer", default=None, help="Begin each stage with a fresh optimiser."),
    option("--precision", type=click.Choice(("auto", *PRECISIONS)), help="Of matrix products in training."),
    option("--gradient-checkpointing", is_flag=True, help="Less memory for more time."),
    option("--checkpoint-every", type=COUNT, help="Steps between states that --resume continues from."),
    option("--validate-every", type=COUNT, help="Steps between validations; else at least an eighth of all."),
    option("--patience", type=COUNT, help="Stop after so many validations without improvement."),
)
recover_options = together(goal_options, training_options)
