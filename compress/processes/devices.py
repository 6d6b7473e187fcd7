"""The device of each process."""

from __future__ import annotations

import os

import torch

from slimvlm.compress.errors import DeviceError
from slimvlm.compress.processes.joining import numbered


def pick_device(asked: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda`, ..., which becomes torch's current one: `cuda` alone, events and waits mean
    it from now on. Of several processes each takes the CUDA device of its local rank.

    Raises:
        DeviceError: the device is not there.
    """
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise DeviceError(f"device {asked!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise DeviceError(f"device {asked!r} is not available here; use --device cpu")
    index, count = numbered("LOCAL_RANK", device.index or 0), torch.cuda.device_count()
    if index >= count:
        who = f"LOCAL_RANK={index}" if os.environ.get("LOCAL_RANK") else f"device {asked!r}"
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise DeviceError(
            f"{who} asks for a GPU that is not there: this machine has {there}; choose one of these and start no more "
            "than one process for each, or use --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
