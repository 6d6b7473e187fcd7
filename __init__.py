"""slimvlm: a vision-language model in, a smaller dense one out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimvlm.compress.models.checkpoint import load

__all__ = ["load"]

# Where torchao is installed transformers imports it, and it tells of its kernels for other devices.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name != "load":  # imported on first use: importing slimvlm must not import torch
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from slimvlm.compress.models.checkpoint import load

    return load
