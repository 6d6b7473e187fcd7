"""The allocators by name."""

from __future__ import annotations

from slimvlm.compress.allocate.balanced import allocate_balanced, allocate_global
from slimvlm.compress.allocate.local import allocate_local

ALLOCATORS = {"balanced": allocate_balanced, "global": allocate_global, "local": allocate_local}
