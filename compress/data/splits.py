"""Who sees which sample: to calibrate on, to evaluate with, to train on, and to choose the best state with.

Samples of one image stay together: a model that was trained on an image must not be asked about it in the evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slimvlm.compress.data.samples import BadSample, Sample, SampleSet, digest_of, load_samples
from slimvlm.compress.errors import SampleError
from slimvlm.compress.options import EvaluateOptions, LearnOptions, PlanOptions, RecoverOptions

HELD_OUT = 512  # samples of --data kept for the comparison when no --eval-data is given
# To validate a sample (its right answer read, its own answer generated) costs about what it costs to train on it.
VALIDATED = 0.15  # samples validated, over all validations, for every sample trained on
VALIDATIONS, VALIDATION_SAMPLES = 8, 256  # at most, besides those before and after the training
FEW = 64  # samples, below which there are rather fewer validations than smaller ones


@dataclass(frozen=True)
class Measured:
    """Samples to calibrate on and to evaluate with.

    Attributes:
        held_out: no image is in both.
        digest: of what was read to calibrate on, less what was left out.
        left_out: samples not calibrated on because --eval-data shows their image.
    """

    calibration: Sequence[Sample]
    evaluation: Sequence[Sample]
    held_out: bool
    digest: str
    bad: tuple[BadSample, ...]
    left_out: int = 0


@dataclass(frozen=True)
class Trained:
    """Samples to train on, and samples to choose the best state with.

    Attributes:
        validations: during the training; one before it and one of the merged weights come on top.
        left_out: samples not used because the evaluation shows their image.
    """

    training: Sequence[Sample]
    validation: Sequence[Sample]
    digest: str
    bad: tuple[BadSample, ...]
    validations: int = VALIDATIONS
    left_out: int = 0


def read_measured(options: PlanOptions) -> Measured:
    """Calibration samples from --data; evaluation samples from --eval-data, else some of --data.

    Raises:
        SampleError: unreadable data, or --eval-data shows every image of --data.
    """
    wanted = options.eval_samples or HELD_OUT
    limit = options.samples if options.eval_data else options.samples + wanted
    read = _load(options, options.data, limit)
    if options.eval_data:
        held = _load(options, options.eval_data, options.eval_samples)
        kept = _without(read.samples, held.samples)
        if not kept:
            raise SampleError(
                f"--eval-data {held.source} shows the images of all {len(read.samples)} samples of --data "
                f"{read.source}, so none is left to calibrate on; give other samples to one of them, or leave "
                "--eval-data out: then a part of --data is held out"
            )
        left_out = len(read.samples) - len(kept)
        return Measured(kept, held.samples, True, digest_of(kept), (*read.bad, *held.bad), left_out)
    calibration, evaluation = hold_out(read.samples, max(0, min(wanted, len(read.samples) - options.samples)))
    return Measured(calibration, evaluation or calibration, bool(evaluation), read.digest, read.bad)


def read_evaluation(options: EvaluateOptions) -> Sequence[Sample]:
    """The samples of --data, at most --eval-samples of them."""
    return _load(options, options.data, options.eval_samples).samples


def read_validation(options: PlanOptions, measured: Measured, most: int) -> Sequence[Sample]:
    """At most so many questions to choose among candidates by: of --data, about images that are neither calibrated on
    nor evaluated with; where there are hardly any, of the evaluation.

    Raises:
        SampleError: unreadable data.
    """
    known = [*measured.calibration, *measured.evaluation]
    free = _without(_load(options, options.data, len(known) + 2 * most).samples, known)
    return _drawn(free if len(free) >= min(FEW, most) else measured.evaluation, most, options.seed)


def read_trained(options: LearnOptions, measured: Measured) -> Trained:
    """Training and validation samples from --recover-data, else from --data; no image of the evaluation is among them.

    Raises:
        SampleError: unreadable data, only one image, or less than one batch is left.
    """
    limit = None
    if options.steps is not None and options.data_fraction == 1:  # more cannot be used
        held = options.validation_samples or VALIDATION_SAMPLES
        limit = options.steps * options.train_batch_size + held + len(measured.evaluation)
    read = _load(options, options.recover_data or options.data, limit)
    usable = _without(read.samples, measured.evaluation if measured.held_out else ())
    size, validations = validation_of(options, len(usable))
    training, validation = hold_out(usable, min(size, max(1, len(usable) // 4)))
    if not validation:
        raise SampleError(
            f"the {len(usable)} samples to train on show fewer than two images, and one is held out to choose the best "
            "state with; give more data, or leave the recovery out with --recover none"
        )
    count = round(options.data_fraction * len(training))
    if count < options.train_batch_size:
        raise SampleError(
            f"{count} of {len(training)} samples are left to train on (--data-fraction {options.data_fraction:g}), "
            f"less than one batch of {options.train_batch_size}; give more data, a larger fraction or a smaller "
            "--train-batch-size, or leave the recovery out with --recover none"
        )
    left_out = len(read.samples) - len(usable)
    return Trained(_drawn(training, count, options.seed), validation, read.digest, read.bad, validations, left_out)


def steps_of(options: RecoverOptions, trained: Trained) -> int:
    """Optimiser steps: what was asked for, else what the passes over the samples are."""
    return options.steps or max(1, round(options.epochs * len(trained.training) / options.train_batch_size))


def validation_of(options: RecoverOptions, usable: int) -> tuple[int, int]:
    """(samples of a validation, validations during the training): what was asked for, else so few that all validations
    together read at most VALIDATED of what the training reads. Counted, not timed, so the same every time.

    Args:
        usable: samples there are to train on and to validate with.
    """
    read = options.epochs * options.data_fraction * usable
    if options.steps is not None:
        read = options.steps * options.train_batch_size
    room = VALIDATED * read
    if options.validate_every is not None:
        steps = max(1, round(read / options.train_batch_size))
        times = -(-steps // options.validate_every)
    else:
        each = options.validation_samples or FEW
        times = min(max(int(room / each) - 2, 1), VALIDATIONS)
    return options.validation_samples or min(max(int(room / (times + 2)), 1), VALIDATION_SAMPLES), times


def hold_out(samples: Sequence[Sample], count: int) -> tuple[list[Sample], list[Sample]]:
    """(the rest, about `count` held out): whole images, spread evenly over the file, the order kept.

    At least one image is held out unless `count` is 0, and one stays in the rest, so none is held out where all
    samples share one.
    """
    images = list(dict.fromkeys(sample.image_key for sample in samples))
    number = min(max(1, round(count * len(images) / len(samples))), len(images) - 1) if samples and count else 0
    held = {images[int((index + 0.5) * len(images) / number)] for index in range(number)}
    rest = [sample for sample in samples if sample.image_key not in held]
    return rest, [sample for sample in samples if sample.image_key in held]


def _without(samples: Sequence[Sample], others: Sequence[Sample]) -> Sequence[Sample]:
    """The samples whose image none of the others shows, told by its bytes: a copy under another name is the same."""
    shown = {sample.image_key for sample in others}
    return [sample for sample in samples if sample.image_key not in shown]


def _load(options: EvaluateOptions, data: Path, limit: int | None) -> SampleSet:
    return load_samples(
        data, limit=limit, seed=options.seed, max_bad=options.max_bad_samples, split_prefix=options.prefix_split
    )


def _drawn(samples: Sequence[Sample], count: int, seed: int) -> Sequence[Sample]:
    """`count` samples drawn by `seed`, in file order."""
    if count >= len(samples):
        return samples
    return [samples[index] for index in sorted(random.Random(seed).sample(range(len(samples)), count))]
