"""The loss whose gradients count: over the poorly fitted tokens only (UKMP, AAAI 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimvlm.compress.data.collate import IGNORED
from slimvlm.compress.data.questions import Question


def poorly_fitted_loss(logits: Tensor, labels: Tensor, threshold: float | None) -> Tensor:
    """Sum over examples of the mean cross entropy (fp32, nats) over each example's poorly fitted positions.

    UKMP section "sub-task selection": positions whose largest probability is at most max(threshold, the smallest such
    probability of the example). Being per example, it does not depend on how examples are batched.

    Args:
        logits: [B, L, V], or [L, V] for one example.
        labels: [B, L] or [L], aligned with the logits (already shifted); -100 is ignored.
        threshold: None takes all positions.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.ndim not in (2, 3) or labels.shape != logits.shape[:-1]:
        raise ValueError(f"poorly_fitted_loss: labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
    if logits.ndim == 2:
        logits, labels = logits[None], labels[None]
    valid = labels != IGNORED
    example = valid.nonzero()[:, 0]
    picked = logits[valid].float()
    normaliser = picked.logsumexp(-1)
    losses = normaliser - picked.gather(-1, labels[valid][:, None])[:, 0]
    with torch.no_grad():
        selected = torch.ones_like(losses)
        if threshold is not None:
            confidence = (picked.amax(-1) - normaliser).exp()
            least = confidence.new_ones(len(labels)).scatter_reduce(0, example, confidence, "amin")
            selected = (confidence <= least.clamp_min(threshold)[example]).float()
        counts = torch.zeros(len(labels), device=losses.device).index_add(0, example, selected)
    return (losses * selected / counts[example]).sum()


def loss(model: nn.Module, question: Question, threshold: float | None) -> tuple[Tensor, Tensor]:
    """(loss with its graph, tokens that gave a gradient: filled in by the backward): scalars on the model's device.

    The loss is the sum over samples of the mean over the sample's poorly fitted tokens (all answer tokens if
    `threshold` is None), or, for a dual encoder, the contrastive loss times the number of samples; that has no tokens.
    """
    output = model(**question.inputs)
    selected = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
    if question.labels is None:
        return output.loss * question.tally.samples, selected
    logits = question.chosen(output.logits)

    def count(grad: Tensor) -> None:
        selected.add_(grad.any(-1).sum())

    if logits.requires_grad:
        logits.register_hook(count)
    return poorly_fitted_loss(logits, question.labels, threshold), selected
