"""The sample stored beside the files: one real prompt with image, and what torch answered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from slimvlm.compress.errors import CheckpointError
from slimvlm.export.running.generation import Arrays
from slimvlm.export.running.manifest import SAMPLE

GIVEN, EXPECTED = "given.", "expected."


def write_sample(folder: Path, given: Arrays, expected: Arrays) -> None:
    """Writes `sample.safetensors`."""
    tensors = {GIVEN + name: array for name, array in given.items()}
    tensors |= {EXPECTED + name: array for name, array in expected.items()}
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / SAMPLE)
    (folder / SAMPLE).chmod(0o644)  # as the other files; safetensors writes for the owner alone


def read_sample(folder: Path) -> tuple[Arrays, Arrays]:
    """The batch and what torch gave for it.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        tensors = load_file(folder / SAMPLE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / SAMPLE} cannot be read ({error}); copy the export again") from error

    def part(prefix: str) -> Arrays:
        return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}

    return part(GIVEN), part(EXPECTED)
