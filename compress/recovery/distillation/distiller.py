"""Student, teacher and losses as ONE module, whose forward returns the loss of a batch in a stage.

Being one module it can be wrapped by DDP or sharded by FSDP as it is. Block outputs are caught by hooks; when nothing
behind the last wanted output matters, the forward of student and teacher ends there. Hooks leave with each forward.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from slimvlm.compress.data.collate import IGNORED
from slimvlm.compress.data.questions import PATCHES, aligned, patch_mask, pose, stream_through
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.families import Family, Tower
from slimvlm.compress.models.groups import depths_of
from slimvlm.compress.recovery.distillation import losses
from slimvlm.compress.recovery.distillation.recipe import TAUGHT, Recipe, Stage
from slimvlm.compress.recovery.distillation.share import WHOLE, Share
from slimvlm.compress.recovery.distillation.teacher_checks import check_states, check_teacher

Batch = Mapping[str, Any]  # Any here: what transformers' models take and put out, and None for a mask of everything
Targets = dict[str, Tensor]
LOGITS = "logits"
ROWS, PATCH_MASK = "answer_rows", "patch_mask"  # of a located batch
EMBEDDINGS = ("image_embeds", "text_embeds")  # the hidden states of a dual encoder


class _SeenAllError(Exception):
    """Ends a forward; never leaves this module."""


@dataclass(frozen=True, slots=True)
class _Question:
    """A batch as the models are asked it.

    Attributes:
        inputs: keyword arguments of the forward.
        rows: which of the flattened (batch, token) positions get logits, int64 [n]; None for a dual encoder.
        labels: int64 [n] of these positions.
        masks: per stream the tokens that are no padding; None: all of them.
        share: what of the samples of all processes it is.
    """

    inputs: dict[str, Any]
    rows: Tensor | None
    labels: Tensor | None
    masks: Mapping[str, Tensor | None]
    share: Share


class Distiller(nn.Module):
    """The loss of a student on a batch, by itself and against a teacher.

    The teacher is frozen and always in evaluation mode. So is the backbone of the student, as in the paper: in training
    mode only adapters (their dropout) and blocks (gradient checkpointing asks for it) are switched.

    Args:
        student: the cut model, its adapters in place if there are any (of a peft model: its base model).
        teacher: the dense model; None if the recipe needs none.
        block_map: tower -> the teacher layer each student layer follows; missing: the same layer (see `match_blocks`).

    Raises:
        UnsuitableOptionError: the recipe needs a teacher and there is none; the teacher is of another family, width,
            depth or vocabulary; a hidden state that does not exist.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        family: Family,
        recipe: Recipe,
        block_map: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.family, self.recipe = family, recipe
        self.depths = depths_of(student, family)
        self.streams = {tower.name: stream_through(family, tower) for tower in family.towers}
        self.block_map = dict(block_map or {})
        if recipe.needs_teacher and teacher is None:
            raise UnsuitableOptionError("this recipe learns from the dense model; name it as the teacher, or use sft")
        if teacher is not None:
            check_teacher(student, teacher, family, self.block_map)
            check_states(recipe, teacher, family)
            teacher.requires_grad_(False)
        for module in student.modules():  # a block's own dropout (OPT's) follows the flag that checkpointing needs
            if isinstance(module, GradientCheckpointingLayer) and isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0  # type: ignore[assignment]
        self.student, self.teacher = student, teacher
        self.train(student.training)

    def train(self, mode: bool = True) -> Distiller:
        """Training mode for adapters and blocks of the student only; dropout of the backbone stays off."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        self.student.eval()
        for module in self.student.modules():
            if isinstance(module, BaseTunerLayer):
                module.train(mode)
            elif isinstance(module, GradientCheckpointingLayer):
                module.training = mode
        return self

    def forward(
        self, batch: Batch, stage: Stage, targets: Targets | None = None, share: Share = WHOLE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(the loss, its parts detached and unweighted); a part is a loss or a tower's sum of feature losses.

        Args:
            batch: a padded training batch, on the student's device.
            targets: what `targets` gave for this batch and a stage that needs at least as much; None: ask the teacher.
            share: what of a step the batch is: loss and parts are then this batch's of the step's.
        """
        question = self._ask(batch, share)
        if targets is None:
            targets = self._taught(question, stage)
        device = next(self.student.parameters()).device
        truth = {name: value.to(device, non_blocking=True) for name, value in targets.items()}
        seen = self._observe(self.student, question, stage, teacher=False)
        parts: dict[str, Tensor] = {}
        for block in stage.blocks:
            mask = question.masks[self.streams[block.tower]]
            value = block.weight * share.even * self._feature(seen[block.key], truth[block.key], mask, share)
            parts[block.tower] = parts[block.tower] + value if block.tower in parts else value
        total = sum(parts.values(), start=torch.zeros((), device=device))
        for name, weight in stage.losses.items():
            parts[name] = share.weight(name) * self._output_loss(name, question, seen, truth)
            total = total + weight * parts[name]
        return total, {name: value.detach() for name, value in parts.items()}

    def targets(self, batch: Batch, stage: Stage) -> Targets:
        """What the teacher says of this batch, as far as the stage needs it, in the teacher's dtype."""
        return self._taught(self._ask(batch, WHOLE), stage)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Loss -> over how many rows or tokens of this batch it is a mean; a loss of all samples at once has none."""
        if self.family.contrastive:
            return {}
        labels = aligned(self.family, batch)
        mask = pose(self.student, self.family, batch).masks[self.streams[self.family.towers[-1].name]]
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        answers, rows = (int(mask.sum()) for mask in (labels != IGNORED, self._counted(labels)))
        return {"sft": answers, "kl": rows, "rkl": rows, "hidden": tokens}

    def target_names(self, stage: Stage) -> tuple[str, ...]:
        """The names of `targets`: `tower.layer` of supervised blocks, `logits`, `hidden.-1`, ..."""
        names = [block.key for block in stage.blocks]
        if any(name in stage.losses for name in ("kl", "rkl")):
            names.append(LOGITS)
        if "hidden" in stage.losses:
            states = [f"hidden.{index}" for index in self.recipe.hidden_states]
            names += EMBEDDINGS if self.family.contrastive else states
        return tuple(names)

    def _feature(self, student: Tensor, teacher: Tensor, mask: Tensor | None, share: Share) -> Tensor:
        if self.recipe.literal:
            return losses.normalised_error(student, teacher, share)
        return losses.feature_distance(student, teacher, mask, share)

    def _output_loss(self, name: str, question: _Question, seen: Targets, truth: Targets) -> Tensor:
        if name == "sft":
            return seen["loss"] if question.labels is None else losses.cross_entropy(seen[LOGITS], question.labels)
        if name == "hidden":
            names = [key for key in truth if key.startswith("hidden.") or key in EMBEDDINGS]
            mask = None if question.rows is None else question.masks[self.streams[self.family.towers[-1].name]]
            return torch.stack([losses.squared_error(seen[key], truth[key], mask) for key in names]).mean()
        compare = losses.divergence if question.rows is not None else losses.contrast_divergence
        return compare(seen[LOGITS], truth[LOGITS], self.recipe.temperature, reverse=name == "rkl")

    @torch.no_grad()
    def _taught(self, question: _Question, stage: Stage) -> Targets:
        if not self.target_names(stage):
            return {}
        if self.teacher is None:
            raise ValueError(f"stage {stage.name!r} needs a teacher or its targets, and there is neither")
        seen = self._observe(self.teacher, question, stage, teacher=True)
        return {name: seen[name] for name in self.target_names(stage)}

    def _observe(self, model: PreTrainedModel, question: _Question, stage: Stage, *, teacher: bool) -> Targets:
        """The outputs that the stage asks for, by name; the forward ends once they are complete."""
        wanted: dict[str, str] = {}
        for block in stage.blocks:
            layers = self.block_map.get(block.tower) if teacher else None
            layer = layers[block.layer] if layers else block.layer
            tower = next(tower for tower in self.family.towers if tower.name == block.tower)
            wanted[block.key] = f"{tower.blocks}.{layer}"
        dual = self.family.contrastive
        if "hidden" in stage.losses and not dual:
            tower = self.family.towers[-1]
            followed = None if teacher else self.block_map.get(tower.name)
            depth = followed[-1] + 1 if followed else depths_of(model, self.family)[tower.name]
            for index in self.recipe.hidden_states:
                wanted[f"hidden.{index}"] = _state(tower, depth, index, followed)
        asked = set(stage.losses) if not teacher else set(stage.losses) & set(TAUGHT)
        to_the_end = bool(asked if dual else asked - {"hidden"})  # somebody wants logits
        with ExitStack() as hooks:
            for path in self.family.projector if to_the_end and dual else ():  # pairs of all processes are compared
                join = partial(_join, question.share)
                hooks.enter_context(model.get_submodule(path).register_forward_hook(join))
            output, seen = _watched(model, question.inputs, wanted, question.rows, to_the_end)
        if to_the_end and dual:
            seen |= {name: output[name] for name in EMBEDDINGS} | {"loss": output.loss}
            seen[LOGITS] = output.logits_per_image
        elif to_the_end:
            seen[LOGITS] = output.logits.flatten(0, -2)
        return seen

    def located(self, batch: Batch) -> dict[str, Any]:
        """The batch and what is where in it: the positions whose logits count, the patches that hold a pixel.

        How many there are only a look at the values tells, and on a GPU the host would wait for it: this is for the
        host, before the batch is put on the device. `forward` does without, and then waits.
        """
        found = {**batch, PATCH_MASK: patch_mask(self.student, batch)}
        if not self.family.contrastive:
            found[ROWS] = self._counted(aligned(self.family, batch)).flatten().nonzero().flatten()
        return found

    def _counted(self, labels: Tensor) -> Tensor:
        """Bool: the positions whose logits count, of labels that are aligned with them."""
        if not self.recipe.literal:
            return labels != IGNORED
        counted = torch.ones_like(labels, dtype=torch.bool)
        if self.family.labels_shifted:
            counted[:, -1] = False  # nothing follows the last token
        return counted

    def _ask(self, batch: Batch, share: Share) -> _Question:
        located = dict(batch) if PATCH_MASK in batch else self.located(batch)
        rows, patches = located.pop(ROWS, None), located.pop(PATCH_MASK)
        posed = pose(self.student, self.family, located)
        labels = None if posed.labels is None else posed.labels.flatten()[rows]
        return _Question(posed.inputs, rows, labels, {**posed.masks, PATCHES: patches}, share)


def _join(share: Share, _: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return share.joined(output)


def _watched(
    model: PreTrainedModel, inputs: Mapping[str, Any], wanted: Mapping[str, str], rows: Tensor | None, last: bool
) -> tuple[Any, Targets]:
    """What the model puts out, and what its modules do, as `wanted`: name -> path.

    Args:
        rows: flattened (batch, token) positions that the output head is to see: no other logits are ever formed.
        last: whether the model's own output is wanted; otherwise the forward ends once all modules have been seen.
    """
    seen: Targets = {}

    def keep(name: str, value: Tensor) -> None:
        seen[name] = value
        if not last and len(seen) == len(wanted):
            raise _SeenAllError

    def wrote(name: str, _: nn.Module, inputs: object, output: Any) -> None:
        keep(name, output if isinstance(output, Tensor) else output[0])

    def read(name: str, _: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Any]) -> None:
        keep(name, inputs[0] if inputs else named["hidden_states"])

    def chosen(rows: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0].flatten(0, -2).index_select(0, rows)[None],)

    with ExitStack() as hooks:
        for name, path in wanted.items():
            before, _, path = path.rpartition(":")
            module = model.get_submodule(path)
            if before:
                hooks.enter_context(module.register_forward_pre_hook(partial(read, name), with_kwargs=True))
            else:
                hooks.enter_context(module.register_forward_hook(partial(wrote, name)))
        if last and rows is not None:
            hooks.enter_context(model.get_output_embeddings().register_forward_pre_hook(partial(chosen, rows)))
        with suppress(_SeenAllError):
            return model(**inputs), seen
    return None, seen


def _state(tower: Tower, depth: int, index: int, followed: tuple[int, ...] | None = None) -> str:
    """Where hidden state `index` of a tower is: before a block (`before:path`), after one, or after the final norm.

    Args:
        depth: blocks of the dense model's tower.
        followed: of a student that lacks some: the dense block each of its blocks follows. What a block gives that
            nobody follows stands for what the next one gives that somebody does.
    """
    position = index if index >= 0 else depth + 1 + index
    if position == depth:
        return tower.blocks.rpartition(".")[0]
    block = bisect_left(followed, position - 1) if followed else position - 1
    return f"{tower.blocks}.{block}" if position else f"before:{tower.blocks}.0"
