"""A distiller of a few thousand parameters, and samples it can learn: what a training needs, and nothing of a VLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimvlm.compress.recovery.distillation.recipe import Stage
from slimvlm.compress.recovery.distillation.share import WHOLE, Share
from slimvlm.compress.recovery.training.choice import Score, Validation
from slimvlm.compress.recovery.training.stepping import Task

VOCAB, WIDTH, LENGTH = 24, 16, 7
COUNT = 20


class ToyBlock(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.down(F.gelu(self.up(self.dropout(states))))


class ToyModel(nn.Module):
    """Tokens [B, S] -> logits [B, S, VOCAB]."""

    _no_split_modules = ("ToyBlock",)

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(VOCAB, WIDTH)
            self.blocks = nn.ModuleList(ToyBlock(dropout) for _ in range(2))
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.embed(input_ids)
        for block in self.blocks:
            states = block(states)
        return self.head(self.norm(states))


class ToyDistiller(nn.Module):
    """Cross entropy, and the distance to a frozen teacher's logits, as means over label tokens.

    Args:
        poison: (first, last) calls whose loss is not finite.
    """

    def __init__(self, dropout: float = 0.0, poison: range = range(0)) -> None:
        super().__init__()
        self.student, self.teacher = ToyModel(dropout, seed=0), ToyModel(seed=1)
        self.teacher.requires_grad_(False)
        self.poison, self.calls = poison, 0

    def target_names(self, stage: Stage) -> tuple[str, ...]:
        return ("logits",)

    def targets(self, batch: dict[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": self.teacher(batch["input_ids"])}

    def counts(self, batch: dict[str, Tensor]) -> dict[str, int]:
        return dict.fromkeys(("sft", "kl"), int((batch["labels"] != -100).sum()))

    def forward(
        self, batch: dict[str, Tensor], stage: Stage, targets=None, share: Share = WHOLE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits, told = self.student(batch["input_ids"]), targets or self.targets(batch, stage)
        counted = batch["labels"] != -100
        parts = {
            "sft": F.cross_entropy(logits[counted], batch["labels"][counted]),
            "kl": (logits - told["logits"]).square().mean(-1)[counted].mean(),
        }
        parts = {name: share.weight(name) * value for name, value in parts.items()}
        self.calls += 1
        if self.calls - 1 in self.poison:
            parts["sft"] = parts["sft"] * torch.inf
        loss = sum(weight * parts[name] for name, weight in stage.losses.items())
        return loss, {name: parts[name].detach() for name in stage.losses}


def collate(indices: list[int]) -> dict[str, Tensor]:
    """Right-padded samples of different lengths: each token is to be followed by a fixed other one."""
    rows = torch.tensor(indices)[:, None]
    ids = (3 * torch.arange(LENGTH) + rows) % VOCAB
    labels = (5 * ids + 1) % VOCAB
    mask = (torch.arange(LENGTH) < 2 + rows % (LENGTH - 1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


def token_loss(student: nn.Module) -> float:
    """Over all samples."""
    batch = collate(list(range(COUNT)))
    with torch.no_grad():
        return F.cross_entropy(student(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten()).item()


def toy_task(
    stages: tuple[Stage, ...] | None = None,
    count: int = COUNT,
    validate: Callable[[], Score] | None = None,
    **more: Any,
) -> Task:
    """Of all samples, in both stages; and what is given. Of what `validate` says nothing is left to chance."""
    exact = None if validate is None else lambda: Validation(*2 * (validate(),))
    return Task(stages or TAUGHT, collate, count, seed=3, validate=exact, **more)


TASK = (Stage("task", (), {"sft": 1.0}, 1.0),)
TAUGHT = (Stage("features", (), {"kl": 1.0}, 0.4), Stage("task", (), {"sft": 1.0, "kl": 0.5}, 0.6))
