"""One process or several: `torchrun` and `accelerate launch` set the environment, this joins their group."""

from __future__ import annotations

import os
import re

import torch
from torch import distributed

from slimvlm.compress.errors import DeviceError, UnsuitableOptionError, foreign

LAUNCH = "start several processes by torchrun or accelerate launch, or unset WORLD_SIZE for one"


def join() -> None:
    """Join the process group the launcher describes; does nothing in a single process or when already joined."""
    if numbered("WORLD_SIZE", 1) > 1 and not distributed.is_initialized():
        with foreign("the processes find no other", LAUNCH, UnsuitableOptionError):
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def numbered(name: str, default: int) -> int:
    """A number that a launcher puts into the environment.

    Raises:
        UnsuitableOptionError: it is none.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,6}", text):
        raise UnsuitableOptionError(f"the environment says {name}={text[:40]!r}, which is no number; {LAUNCH}")
    return int(text)


def leave() -> None:
    """Leave the process group, if one was joined."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number; 0 writes the files."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def wait_for_all() -> None:
    """Return once every process got here."""
    if distributed.is_initialized():
        distributed.barrier()


def pick_device(asked: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda`, ...: with several processes each takes the CUDA device of its local rank.

    Raises:
        DeviceError: the device is not there.
    """
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise DeviceError(f"device {asked!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(f"device {asked!r} is not available here; use --device cpu")
        return torch.device("cuda", numbered("LOCAL_RANK", device.index or 0))
    return device
