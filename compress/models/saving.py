"""A checkpoint folder, whole or absent: weights, config, processor, plan and manifest."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin

from slimvlm.compress.files.folders import MANIFEST, list_files, written_folder
from slimvlm.compress.files.writing import write_text
from slimvlm.compress.models.checkpoint import CARRIED, PLAN
from slimvlm.compress.models.stock import stock_model
from slimvlm.compress.options import LAYOUTS
from slimvlm.compress.plan import Plan


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: PreTrainedModel,
    processor: ProcessorMixin | None,
    plan: Plan | None,
    layout: str = "per-layer",
    max_shard_size: str = "5GB",
) -> Path:
    """Writes a checkpoint: weights (safetensors), config, processor, plan.json, manifest.json (sizes and sha256).

    Args:
        plan: what was cut from the dense model; None for a model that was not cut.
        layout: `per-layer`, or `stock` (only what the unmodified class can build).

    Raises:
        OutputError: the folder is not empty, or cannot be written.
        CheckpointError: layout `stock`, and the model has sizes that the unmodified class cannot build (named).
        ValueError: unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    folder = Path(folder)
    saved = stock_model(model) if layout == "stock" else model
    with written_folder(folder) as partial:
        saved.save_pretrained(partial, max_shard_size=max_shard_size)
        _save_processor(partial, processor, Path(model.config.name_or_path or partial))
        if plan is not None:
            write_text(partial / PLAN, plan.to_json())
        _write_manifest(partial)
    return folder


def _save_processor(folder: Path, processor: ProcessorMixin | None, source: Path) -> None:
    if processor is not None:
        processor.save_pretrained(folder)
    if source.is_dir():
        for pattern in CARRIED:
            for path in source.glob(pattern):
                if not (folder / path.name).exists():
                    shutil.copyfile(path, folder / path.name)


def _write_manifest(folder: Path) -> None:
    write_text(folder / MANIFEST, json.dumps({"schema": 1, "files": list_files(folder)}, indent=2) + "\n")
