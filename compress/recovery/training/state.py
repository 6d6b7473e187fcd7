"""What a training keeps on disk: its last checkpoint and its best weights, as safetensors of torch's own distributed
checkpoints (DCP): every process writes what it holds, and any number of them reads that again.

`state.json` holds the facts of the training so far and names two folders: `state-STEP` with the trained weights and the
moments of the optimiser, `best-STEP` with the trained weights that have the best validation. It gets its name only
after all was written and flushed, and a folder is deleted only when no checkpoint names it any more: a training killed
at any moment goes on from its last checkpoint. No state of a random generator is kept: every step seeds its own (see
`trainer`).
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from slimvlm.compress import processes
from slimvlm.compress.errors import OutputError, RecoveryError, one_line
from slimvlm.compress.files.decoding import MisfitError, content_of, decode, dump, parse, shown
from slimvlm.compress.files.writing import PARTIAL, sync, write_text
from slimvlm.compress.recovery.training.history import History

STATE = "state.json"
WEIGHT = "weight/"  # before the names of weights in a checkpoint
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, per parameter


class StateFacts(TypedDict):
    """A checkpoint: what is known so far, whose training it is, which folders hold its tensors and the best weights."""

    facts: History
    training: dict[str, Any]
    scaler: dict[str, Any] | None
    tensors: str
    best_file: str


class StateFolder:
    """The files of one training. What saves is called by all processes that share the training, what reads by any.

    Args:
        path: the folder; created when absent.
        writer: of several processes one writes the facts, and removes what is left of earlier ones.
    """

    def __init__(self, path: Path, writer: bool = True) -> None:
        self.path, self.writer = path, writer
        self._named: set[str] = set()  # folders, by the checkpoint on disk
        if writer:
            path.mkdir(parents=True, exist_ok=True)

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], step: int, best: str) -> None:
        """Replace the checkpoint by this one, which goes with the best weights in the folder `best`.

        Raises:
            OutputError: it cannot be written, or the disk is full; the earlier checkpoint is still there.
        """
        name = f"state-{step:08d}"
        self._put(name, tensors)
        if self.writer:
            write_text(self.path / STATE, dump({**facts, "tensors": name, "best_file": best}))
        self._named = {name, best}
        self._keep(name, best)

    def save_best(self, tensors: Mapping[str, Tensor], step: int) -> str:
        """Keep these as the best weights; the name of their folder.

        Raises:
            OutputError: they cannot be written, or the disk is full; those before are still there.
        """
        name = f"best-{step:08d}"
        self._put(name, tensors)
        self._keep(name)
        return name

    def load(self) -> StateFacts | None:
        """The checkpoint, without its tensors; None if there is none.

        Raises:
            RecoveryError: it is damaged.
        """
        if not (self.path / STATE).is_file():
            return None
        with self._readable(STATE):
            facts: StateFacts = decode(parse(content_of(self.path / STATE)), StateFacts)
            for kind, name in (("state", facts["tensors"]), ("best", facts["best_file"])):
                if not re.fullmatch(rf"{kind}-[0-9]{{8}}", name) and (kind, name) != ("best", ""):
                    raise MisfitError(f"{shown(name)} is no folder of this one")
        self._named = {facts["tensors"], facts["best_file"]}
        return facts

    def shapes(self, name: str) -> dict[str, torch.Size]:
        """Those of the tensors in the folder `name`.

        Raises:
            RecoveryError: it is missing or damaged.
        """
        with self._readable(name):
            found = HuggingFaceStorageReader(str(self.path / name)).read_metadata().state_dict_metadata
        return {key: tensor.size for key, tensor in found.items() if isinstance(tensor, TensorStorageMetadata)}

    def fill(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Put what the folder `name` holds into these tensors, which may be sharded, and otherwise than what wrote it.

        Raises:
            RecoveryError: one is missing, or of another shape: then nothing was changed; or the folder is damaged.
        """
        shapes = self.shapes(name)
        for key, tensor in tensors.items():
            if shapes.get(key) != tensor.shape:
                raise RecoveryError(
                    f"{self.path} holds no {key.removeprefix(WEIGHT)} of this shape; delete the folder to train from "
                    "the start"
                )
        with self._readable(name), torch.no_grad():
            if tensors:
                checkpoint.load(tensors, storage_reader=HuggingFaceStorageReader(str(self.path / name)), no_dist=True)

    def clear(self) -> None:
        """Forget an earlier training."""
        if self.writer:
            for path in (self.path / STATE, *self.path.glob(f".*{PARTIAL}")):
                path.unlink(missing_ok=True)
            self._named = set()
            self._keep()

    def _put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the folder `name`, unless it is there and named: then it is of this step of this training."""
        if name in self._named:
            return
        folder = self.path / name
        if self.writer:
            shutil.rmtree(folder, ignore_errors=True)  # of a process that died while it wrote
        processes.reduce(stays := torch.tensor(int(self.writer and folder.exists())), "max")
        if stays:
            raise OutputError(f"{folder} is in the way and cannot be removed; check permissions, or remove it")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is in one process
                checkpoint.save(
                    {key: tensor.detach().contiguous() for key, tensor in tensors.items()},
                    storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
                    no_dist=processes.count() == 1,
                )
        except CheckpointException as error:
            raise _cannot_write(folder, error) from error
        if self.writer:
            sync(folder)

    def _keep(self, *names: str) -> None:
        """Remove the folders that are neither these nor named."""
        if self.writer:
            for path in (*self.path.glob("state-*"), *self.path.glob("best-*")):
                if path.name not in {*names, *self._named}:
                    shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            try:
                yield
            except (OSError, ValueError, KeyError, CheckpointException, SafetensorError) as error:
                raise RecoveryError(
                    f"{self.path / name} is no readable state of a training ({_reason(error)}); delete the folder to "
                    "train from the start"
                ) from None


def _cannot_write(folder: Path, error: CheckpointException) -> OutputError:
    return OutputError(
        f"cannot write {folder}: {_reason(error)}; check free space and permissions, or choose another folder"
    )


def _reason(error: BaseException) -> str:
    """What a process says first."""
    if isinstance(error, CheckpointException):
        error = next((failed[0] for failed in error.failures.values()), error)
    return getattr(error, "strerror", None) or one_line(error)


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
        f"{moment}/{name}": optimizer.state[parameter][moment]
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


def make_moments(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter], known: Collection[str]
) -> dict[str, Tensor]:
    """Room for what AdamW remembered, as `moments` gives it, where its keys are `known`; to be filled."""
    for name, parameter in trained.items():
        if f"{MOMENTS[0]}/{name}" in known:
            step = torch.zeros((), device=parameter.device)
            averages = (torch.zeros_like(parameter, memory_format=torch.preserve_format) for _ in MOMENTS[1:])
            optimizer.state[parameter] = dict(zip(MOMENTS, (step, *averages), strict=True))
    return moments(optimizer, trained)


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
    best, parameters = saved["best_file"], dict(student.named_parameters())
    if foreign := sorted((learnt := files.shapes(best)).keys() - parameters.keys()):
        raise RecoveryError(f"{folder} holds the training of another model, which has {foreign[0]}")
    files.fill(best, {name: parameters[name].detach() for name in learnt})


def _like(target: Tensor, value: Tensor) -> Tensor:
    value = value.to(device=target.device, dtype=target.dtype)
    return distribute_tensor(value, target.device_mesh, target.placements) if isinstance(target, DTensor) else value
