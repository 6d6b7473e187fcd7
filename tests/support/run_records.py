"""A run.json that was changed and still passes for one: its digest fits again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimvlm.compress.run_record import record_text


def edit_record(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let `change` change the record in place."""
    record = json.loads((run / "run.json").read_text())
    change(record)
    (run / "run.json").write_text(record_text(record))
