"""One process or several, and the device of each.

What waits for the other processes waits on the host (gloo), where waiting may take hours: the first process cuts,
saves and evaluates alone. What computes on GPUs is exchanged between them (NCCL).
"""

from slimvlm.compress.processes.devices import pick_device
from slimvlm.compress.processes.joining import LAUNCH, joined, leave, numbered
from slimvlm.compress.processes.sharing import (
    alone,
    count,
    rank,
    reduce,
    require_same,
    require_shared,
    share,
    tell,
    wait_for_all,
)

__all__ = [
    "LAUNCH",
    "alone",
    "count",
    "joined",
    "leave",
    "numbered",
    "pick_device",
    "rank",
    "reduce",
    "require_same",
    "require_shared",
    "share",
    "tell",
    "wait_for_all",
]
