"""What a training keeps on disk: its last checkpoint and its best weights, as safetensors with JSON in the header.

`state.safetensors` holds the trained weights, the moments of the optimiser and the facts of the training so far;
`best-STEP.safetensors` the trained weights with the best validation. A file gets its name only after it was written and
flushed beside it, and a best one is deleted only when no checkpoint names it any more: a training killed at any moment
goes on from its last checkpoint. No state of a random generator is kept: every step seeds its own (see `trainer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from slimvlm.compress.errors import RecoveryError
from slimvlm.compress.files.decoding import MisfitError, decode
from slimvlm.compress.files.writing import PARTIAL, load_tensors, save_tensors
from slimvlm.compress.recovery.training.history import History

STATE = "state.safetensors"
WEIGHT = "weight/"  # before the names of weights in a checkpoint
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, per parameter


class Saved(NamedTuple):
    """Tensors by name, and the facts that were saved with them (Any: the values of JSON)."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class BestFacts(TypedDict):
    """In the header of the best weights."""

    step: int


class StateFacts(TypedDict):
    """In the header of a checkpoint: what is known so far, whose training it is, which file holds the best weights."""

    facts: History
    training: dict[str, Any]
    scaler: dict[str, Any] | None
    best_file: str


class StateFolder:
    """The files of one training.

    Args:
        path: the folder; created when absent.
        writer: of several processes one writes; all read.
    """

    def __init__(self, path: Path, writer: bool = True) -> None:
        self.path, self.writer = path, writer
        self._named_best = ""  # by the checkpoint on disk
        if writer:
            path.mkdir(parents=True, exist_ok=True)

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], best: str) -> None:
        """Replace the checkpoint by this one, which goes with the best weights in the file `best`.

        Raises:
            OutputError: it cannot be written, or the disk is full; the earlier checkpoint is still there.
        """
        self._write(STATE, tensors, {**facts, "best_file": best})
        self._named_best = best
        self._keep_best(best)

    def save_best(self, tensors: Mapping[str, Tensor], step: int) -> str:
        """Keep these as the best weights; the name of their file.

        Raises:
            OutputError: they cannot be written, or the disk is full; those before are still there.
        """
        name = f"best-{step:08d}.safetensors"
        self._write(name, tensors, {"step": step})
        self._keep_best(name)
        return name

    def load(self) -> Saved | None:
        """The checkpoint; None if there is none.

        Raises:
            RecoveryError: it is damaged.
        """
        if not (self.path / STATE).is_file():
            return None
        saved = self._read(STATE, StateFacts)
        self._named_best = saved.facts["best_file"]
        return saved

    def read(self, name: str) -> Saved:
        """The best weights in the file `name` of this folder.

        Raises:
            RecoveryError: it is missing or damaged.
        """
        return self._read(name, BestFacts)

    def _read(self, name: str, wanted: Any) -> Saved:
        path = self.path / name
        try:
            if Path(name).name != name:
                raise MisfitError("it lies in another folder")
            tensors, facts = load_tensors(path)
            return Saved(tensors, decode(facts.get("facts"), wanted))
        except ValueError as error:
            raise RecoveryError(
                f"{path} is no readable state of a training ({error}); delete the folder to train from the start"
            ) from None

    def clear(self) -> None:
        """Forget an earlier training."""
        if self.writer:
            for path in (self.path / STATE, *self.path.glob("best-*.safetensors"), *self.path.glob(f".*{PARTIAL}")):
                path.unlink(missing_ok=True)

    def _write(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        if self.writer:
            save_tensors(self.path / name, tensors, {"facts": facts})

    def _keep_best(self, name: str) -> None:
        if self.writer:
            for path in self.path.glob("best-*.safetensors"):
                if path.name not in (name, self._named_best):
                    path.unlink()


def whole(tensor: Tensor) -> Tensor:
    """The tensor on the host; gathered from all processes (which must all call this) where it is sharded."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def restore(
    parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor], folder: Path, prefix: str = ""
) -> None:
    """Fill parameters, which may be sharded, with the saved tensors of their names after `prefix`; every process gives
    the whole ones.

    Raises:
        RecoveryError: one is missing, or of another shape; nothing was changed.
    """
    for name, parameter in parameters.items():
        if prefix + name not in saved or saved[prefix + name].shape != parameter.shape:
            raise RecoveryError(f"{folder} holds no {name} of this shape; delete the folder to train from the start")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_like(parameter, saved[prefix + name]))


def moments(optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What AdamW remembers, keyed `moment/parameter`; nothing for parameters that had no gradient yet."""
    return {
        f"{moment}/{name}": whole(optimizer.state[parameter][moment])
        for name, parameter in trained.items()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def set_moments(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Make AdamW remember what `moments` gave."""
    for name, parameter in trained.items():
        if f"{MOMENTS[0]}/{name}" in tensors:
            step, *averages = (tensors[f"{moment}/{name}"] for moment in MOMENTS)
            values = [step.to(parameter.device), *(_like(parameter, average) for average in averages)]
            optimizer.state[parameter] = dict(zip(MOMENTS, values, strict=True))


def load_best(student: nn.Module, folder: Path) -> None:
    """Put the best weights of a finished training into a fresh copy of its student.

    After a training with sharded weights (FSDP) no process holds a whole student any more: load the starting one again
    and fill in what was learnt.

    Raises:
        RecoveryError: there is no finished training in `folder`, or it is not this student's.
    """
    files = StateFolder(folder, writer=False)
    saved = files.load()
    if saved is None:
        raise RecoveryError(f"{folder} holds no training; give the folder `train` was given")
    best, parameters = files.read(saved.facts["best_file"]).tensors, dict(student.named_parameters())
    if foreign := sorted(best.keys() - parameters.keys()):
        raise RecoveryError(f"{folder} holds the training of another model, which has {foreign[0]}")
    restore({name: parameters[name] for name in best}, best, folder)


def _like(target: Tensor, value: Tensor) -> Tensor:
    value = value.to(device=target.device, dtype=target.dtype)
    return distribute_tensor(value, target.device_mesh, target.placements) if isinstance(target, DTensor) else value
