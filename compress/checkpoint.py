"""Checkpoints in and out: dense, per-layer (widths differ, see modeling_slim) and stock (unmodified classes load it).

A folder is written beside its final name and renamed when it is complete. Nothing is loaded that does not fit: what is
missing, left over, of another size, truncated or changed is refused, never initialised at random. No pickle is read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from slimvlm.compress.errors import CheckpointError, MissingDependencyError
from slimvlm.compress.families import Family, find_family
from slimvlm.compress.files import file_digest, write_text, written_folder
from slimvlm.compress.modeling_slim import RECORD, slim_class
from slimvlm.compress.plan import Plan
from slimvlm.compress.stock import stock_model

LAYOUTS = ("per-layer", "stock")
PLAN = "plan.json"
MANIFEST = "manifest.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What a processor may need besides the files it saves itself, and what a licence asks to pass on.
CARRIED = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json", "LICENSE*", "NOTICE*"),
)
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in eval mode and what came with it; `digest` identifies its weight files, `folder` is where they are."""

    model: PreTrainedModel
    processor: Any | None
    family: Family
    digest: str
    folder: Path


def load(folder: str | os.PathLike[str]) -> tuple[PreTrainedModel, Any | None]:
    """The model (eval mode, its saved dtype, CPU) and the processor (None if there is none) of a checkpoint folder.

    Raises:
        CheckpointError: the folder is not a complete, unchanged checkpoint.
        UnsupportedModelError: its model type has no row in the family table.
    """
    loaded = load_model(folder)
    return loaded.model, loaded.processor


def load_model(
    name: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str | None = None,
) -> Loaded:
    """Loads a dense, per-layer or stock checkpoint. The model is built on the meta device and its weights stream in.

    Args:
        name: a folder, or the name of a model on the hub (the only case in which the network is used).
        trust_remote_code: whether code inside the checkpoint may run. slimvlm's own checkpoints do not need it.
        dtype: of the floating weights; None keeps what was saved.
        attention: implementation (`sdpa`, `eager`); None is the default of transformers.

    Raises:
        CheckpointError, UnsupportedModelError: as `load`.
    """
    folder, digest = locate(name)
    config, family = read_config(folder, trust_remote_code)
    options = {"dtype": dtype or "auto", "device_map": {"": device}, "attn_implementation": attention}
    model = _build(folder, config, family, options)
    return Loaded(model.eval(), load_processor(folder, trust_remote_code), family, digest, folder)


def build_meta(name: str | os.PathLike[str], trust_remote_code: bool = False) -> tuple[PreTrainedModel, Family]:
    """The model of a checkpoint on the meta device and its family, from the config alone: no weights are read.

    Raises:
        CheckpointError, UnsupportedModelError: as `load`.
    """
    folder = _local_folder(os.fspath(name), ("config.json",))
    config, family = read_config(folder, trust_remote_code)
    try:
        with torch.device("meta"):
            return _model_class(config, family)(config), family
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: the model cannot be built ({_first_line(error)})") from error


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: PreTrainedModel,
    processor: Any | None,
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


def locate(name: str | os.PathLike[str]) -> tuple[Path, str]:
    """Folder and weight digest of a checkpoint, without building its model.

    Raises:
        CheckpointError: as `check_weights`.
    """
    folder = _local_folder(os.fspath(name), ("*.json", "*.safetensors", *CARRIED))
    return folder, check_weights(folder)


def check_weights(folder: Path) -> str:
    """Digest of the weight files (sha256 over their sha256 sums in name order), after checking that each is whole.

    Raises:
        CheckpointError: no safetensors, a missing shard, a damaged file, or one that differs from manifest.json.
    """
    files = weight_files(folder)
    manifest = _read_json(folder / MANIFEST)["files"] if (folder / MANIFEST).is_file() else {}
    total = hashlib.sha256()
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{folder}: weight file {path.name} is missing; copy or download it again")
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged ({_first_line(error)}); copy or download it again") from error
        digest = file_digest(path)
        if path.name in manifest and manifest[path.name]["sha256"] != digest:
            raise CheckpointError(
                f"{path} is not what {MANIFEST} says; copy it again, or delete {MANIFEST} if you changed it on purpose"
            )
        total.update(digest.encode())
    return total.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single one, or the shards its index names.

    Raises:
        CheckpointError: there is neither, or the index is damaged.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        index = _read_json(folder / INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise CheckpointError(f"{folder / INDEX} has no weight_map; copy or download it again")
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    raise CheckpointError(f"{folder} holds no {SINGLE} (pickled weights are not read); save it as safetensors")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({_first_line(error)}); copy or download it again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy or download it again")
    return document


def _local_folder(name: str, patterns: Sequence[str]) -> Path:
    """The folder itself, or the snapshot of a hub name: those of its files that match `patterns`."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json, so it is not a checkpoint folder")
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name} is not a folder; give a checkpoint folder or a hub name such as owner/model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise CheckpointError(
            f"{name} is no folder here, and the hub does not give it ({_first_line(error)})"
        ) from error


def read_config(folder: Path, trust_remote_code: bool = False) -> tuple[transformers.PreTrainedConfig, Family]:
    """The config of a folder and the row of its family.

    Raises:
        CheckpointError: config.json cannot be read.
        UnsupportedModelError: its model type has no row in the family table.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: config.json cannot be read ({_first_line(error)})") from error
    return config, find_family(config)


def _build(
    folder: Path, config: transformers.PreTrainedConfig, family: Family, options: dict[str, Any]
) -> PreTrainedModel:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what it only warns of is an error here
    try:
        model, info = _model_class(config, family).from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed; they are refused below
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the model cannot be built ({_first_line(error)})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    _check_loading(folder, info)
    return model


def _model_class(config: transformers.PreTrainedConfig, family: Family) -> Any:
    dual = family.kind == "dual-encoder"
    mapping = transformers.MODEL_MAPPING if dual else transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    base = mapping[type(config)]
    return slim_class(base) if getattr(config, RECORD, None) else base


def _check_loading(folder: Path, info: dict[str, Any]) -> None:
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(entry if isinstance(entry, str) else str(entry[0]) for entry in info.get(what) or ()):
            names = ", ".join(found[:3]) + (" ..." if len(found) > 3 else "")
            kind = what.removesuffix("_keys").replace("_", " ")
            raise CheckpointError(f"{folder}: {len(found)} {kind} weights ({names}): they do not fit the config")


def load_processor(folder: Path, trust_remote_code: bool = False) -> Any | None:
    """The processor saved in a folder, or None if there is none.

    Raises:
        CheckpointError, MissingDependencyError: it cannot be loaded.
    """
    if not any((folder / name).is_file() for name in PROCESSOR):
        return None
    try:
        return transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: its processor cannot be loaded ({_first_line(error)})") from error
    except (TypeError, AttributeError, ImportError) as error:  # how processors fail whose video part lacks torchvision
        message = f"{folder}: its processor cannot be loaded ({_first_line(error)})"
        if importlib.util.find_spec("torchvision") is None:
            raise MissingDependencyError(
                f"{message}; it may need torchvision: pip install 'slimvlm[vision]'"
            ) from error
        raise CheckpointError(message) from error


def _save_processor(folder: Path, processor: Any | None, source: Path) -> None:
    if processor is not None:
        processor.save_pretrained(folder)
    if source.is_dir():
        for pattern in CARRIED:
            for path in source.glob(pattern):
                if not (folder / path.name).exists():
                    shutil.copyfile(path, folder / path.name)


def _write_manifest(folder: Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in sorted(folder.iterdir())
    }
    write_text(folder / MANIFEST, json.dumps({"schema": 1, "files": files}, indent=2) + "\n")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
