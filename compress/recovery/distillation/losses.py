"""What the student is compared by: block outputs, token distributions, hidden states, answers.

Logits are the largest tensors of a run (label tokens x vocabulary), so their losses leave no fp32 copy: they form
their gradient at once and keep nothing else, in the student's own dtype. Block outputs are kept as they are.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from slimvlm.compress.data.collate import IGNORED
from slimvlm.compress.recovery.distillation.share import WHOLE, Share

FLOOR = 1e-8  # of a norm that divides
# `ctx: Any` below: torch gives the contexts of its functions no type.


def feature_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None, share: Share = WHOLE) -> Tensor:
    """1 - cosine between two block outputs, each taken as one long vector over batch, tokens and channels; fp32 scalar.

    This is the paper's normalised squared error (UKMP, Eq. 13) without its factor 2 / (B S C), which ties the scale of
    the loss to batch size, length and width.

    Args:
        student, teacher: [..., C] of one shape. The teacher gets no gradient.
        mask: bool [...], True where a token counts; None: all do.
        share: what of the vector this is, where processes share it: each is given the whole distance.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape("block outputs", student, teacher)
    rows = None if mask is None else mask.reshape(student.shape[:-1])
    return cast(Tensor, _Distance.apply(student, teacher, rows, share))


def normalised_error(student: Tensor, teacher: Tensor, share: Share = WHOLE) -> Tensor:
    """The paper's feature loss: mean squared difference of the two tensors, each divided by its Frobenius norm.

    Padding counts, as in the paper's code (UKMP, Eq. 13). `share` is as of `feature_distance`.
    """
    elements = share.sum(student.new_full((), student.numel(), dtype=torch.float32))
    return feature_distance(student, teacher, share=share) * (2 / elements.clamp_min(1))


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, *, reverse: bool = False) -> Tensor:
    """Kullback-Leibler divergence of token distributions, mean over rows, times temperature squared; fp32 scalar, nats.

    Args:
        student, teacher: logits [rows, V]. The teacher gets no gradient.
        reverse: KL(student || teacher) instead of KL(teacher || student).

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape("logits", student, teacher)
    return cast(Tensor, _Divergence.apply(student, teacher, temperature, reverse))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the labelled rows (nats, fp32 scalar); zero if there is none.

    Args:
        logits: [rows, V].
        labels: int64 [rows]; -100 is ignored.
    """
    return cast(Tensor, _CrossEntropy.apply(logits, labels))


def squared_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Element-wise mean squared difference of hidden states over the tokens that count; fp32 scalar.

    Args:
        student, teacher: [..., C] of one shape.
        mask: bool [...], True where a token counts; None: all do.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape("hidden states", student, teacher)
    difference = student.float() - teacher.float()
    if mask is None:
        return difference.square().sum() / max(difference.numel(), 1)
    mask = mask.reshape(student.shape[:-1])
    total = torch.where(mask[..., None], difference, 0).square().sum()
    return total / (mask.sum() * student.shape[-1]).clamp_min(1)


def lost_energy(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(|student - teacher|^2, |teacher|^2) of two block outputs, over the tokens that count; fp32 scalars.

    Args:
        student, teacher: [..., C] of one shape.
        mask: bool [...], True where a token counts; None: all do.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape("block outputs", student, teacher)
    truth = teacher.float()
    difference = student.float() - truth
    if mask is not None:  # where, not a product: a padded row may hold anything
        mask = mask.reshape(student.shape[:-1])
        difference, truth = (torch.where(mask[..., None], value, 0) for value in (difference, truth))
    return difference.square().sum(), truth.square().sum()


def contrast_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, *, reverse: bool = False) -> Tensor:
    """`divergence` between two matrices of image-text similarities [B, B]: mean over its rows and its columns."""
    rows = divergence(student, teacher, temperature, reverse=reverse)
    return (rows + divergence(student.T, teacher.T, temperature, reverse=reverse)) / 2


class _Distance(torch.autograd.Function):
    """1 - cos = |s/|s| - t/|t||^2 / 2: exactly zero for equal tensors, never negative."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None, share: Share) -> Tensor:
        s, t = student.float(), teacher.float()
        if mask is not None:  # where, not a product: a padded row may hold anything
            s, t = (torch.where(mask[..., None], value, 0) for value in (s, t))
        squares = torch.stack([torch.linalg.vector_norm(value).square_() for value in (s, t)])
        norms = share.sum(squares).sqrt_().clamp_min_(FLOOR).unbind()
        distance: Tensor = share.sum((s / norms[0]).sub_(t / norms[1]).square_().sum()) / 2
        ctx.save_for_backward(student, teacher, mask, distance, *norms)
        ctx.processes = share.processes
        return distance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher, mask, distance, student_norm, teacher_norm = ctx.saved_tensors
        factor = gradients[0] * ctx.processes / student_norm
        result = student.float() * (factor * (1 - distance) / student_norm)
        result.sub_(teacher.float() * (factor / teacher_norm))
        if mask is not None:
            result = torch.where(mask[..., None], result, 0)
        return result.to(student.dtype), None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        counted = labels != IGNORED
        rows = counted.sum().clamp_min(1)
        index = labels.clamp_min(0)[:, None]
        gradient = torch.log_softmax(logits, -1, dtype=torch.float32)
        each = torch.where(counted, -gradient.gather(-1, index)[:, 0], 0)
        gradient.exp_().scatter_add_(-1, index, gradient.new_full(index.shape, -1)).mul_(counted[:, None])
        ctx.save_for_backward(gradient.to(logits.dtype), rows)
        return each.sum() / rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient, rows = ctx.saved_tensors
        return (gradient * (gradients[0] / rows)).to(gradient.dtype), None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, reverse: bool) -> Tensor:
        s, t = (_log_probabilities(logits, temperature) for logits in (student, teacher))
        rows = max(len(student), 1)
        if reverse:
            gradient = s.exp()
            s.sub_(t)
            each = (gradient * s).sum(-1, keepdim=True)
            gradient.mul_(s.sub_(each))
        else:
            truth = t.exp()
            each = (truth * t.sub_(s)).sum(-1)
            gradient = s.exp_().sub_(truth)
        ctx.save_for_backward(gradient.to(student.dtype))
        ctx.scale = temperature / rows
        return each.sum() * (temperature**2 / rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * (gradients[0] * ctx.scale)).to(gradient.dtype), None, None, None


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    if temperature == 1:
        return torch.log_softmax(logits, -1, dtype=torch.float32)
    return torch.log_softmax(logits.float() / temperature, -1)


def _same_shape(what: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"{what} of student and teacher differ: {tuple(student.shape)} and {tuple(teacher.shape)}")
