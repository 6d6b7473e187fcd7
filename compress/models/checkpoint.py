"""Checkpoints in and out: dense, per-layer (widths differ, see modeling_slim) and stock (unmodified classes load it).

A folder is written beside its final name and renamed when it is complete. Nothing is loaded that does not fit: what is
missing, left over, of another size, truncated or changed is refused, never initialised at random. No pickle is read.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from transformers import PreTrainedModel, ProcessorMixin

from slimvlm.compress.card import BASE_CARD, CARD
from slimvlm.compress.errors import CheckpointError, UnsuitableOptionError, foreign, one_line
from slimvlm.compress.files.decoding import read
from slimvlm.compress.files.folders import MANIFEST, Listing
from slimvlm.compress.files.writing import file_digest
from slimvlm.compress.models.experts import put_together
from slimvlm.compress.models.families import Family
from slimvlm.compress.models.loaders import (
    build_empty,
    build_loaded,
    build_streamed,
    check_types,
    load_processor,
    read_config,
    refuse_adapter,
    stored_weights,
)
from slimvlm.compress.models.quantized import held_form, pack, quantize, require_torchao
from slimvlm.compress.models.streaming.weights import WITH_TABLES, Holding

PLAN = "plan.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SLACK = 2**24  # weights that may be made anew without anybody noticing
# What a processor may need besides the files it saves itself, and what a licence asks to pass on.
CARRIED = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json", "LICENSE*", "NOTICE*"),
)


class Shards(TypedDict):
    """`model.safetensors.index.json`: which file holds a weight."""

    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in eval mode and what came with it; `digest` identifies its weight files, `folder` is where they are."""

    model: PreTrainedModel
    processor: ProcessorMixin | None
    family: Family
    digest: str
    folder: Path


def load(folder: str | os.PathLike[str]) -> tuple[PreTrainedModel, ProcessorMixin | None]:
    """The model (eval mode, its saved dtype, CPU) and the processor (None if there is none) of a checkpoint folder.

    Raises:
        CheckpointError: the folder is not a complete, unchanged checkpoint.
        UnsupportedModelError: its model type has no row in the family table.
    """
    loaded = load_model(folder, form=held_form(Path(folder).expanduser()))
    put_together(loaded.model)
    return loaded.model, loaded.processor


def load_model(
    name: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str | None = None,
    form: str | None = None,
) -> Loaded:
    """Loads a dense, per-layer or stock checkpoint. The model is built on the meta device and its weights stream in.

    Args:
        name: a folder, or the name of a model on the hub (the only case in which the network is used).
        trust_remote_code: whether code inside the checkpoint may run. slimvlm's own checkpoints do not need it.
        dtype: of the floating weights; None keeps what was saved.
        attention: implementation (`sdpa`, `eager`); None is the default of transformers.
        form: of IN_TORCH, to run alone: float weights are put in it, and a folder that holds it is accepted.

    Raises:
        CheckpointError, UnsupportedModelError: as `load`.
        UnsuitableOptionError: the folder holds weights of another form.
        MissingDependencyError: a form, and no torchao.
    """
    folder, digest = locate(name)
    held = held_form(folder)
    if form is not None and held not in (None, form):
        raise UnsuitableOptionError(
            f"{folder} holds {held} weights, which run as torch:{held}; for torch:{form} give the model it was made of"
        )
    if form is not None:
        require_torchao()
    config, family = read_config(folder, trust_remote_code, form)
    options = {"dtype": dtype or "auto", "device_map": {"": device}, "attn_implementation": attention}
    _check_room(folder, build_empty(folder, config, family))
    model = build_loaded(folder, config, family, options)
    if form is not None:
        if held is None:
            quantize(model, form)
        pack(model)
    return Loaded(model.eval(), load_processor(folder, trust_remote_code), family, digest, folder)


def stream_model(
    name: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    holding: Holding = WITH_TABLES,
) -> Loaded:
    """As `load_model`, for a model that does not fit into memory: its blocks' parameters are lazy (see streaming.lazy).

    Args:
        holding: what of it is in memory, and how much that may be.

    Raises:
        CheckpointError, UnsupportedModelError: as `load`.
        UnsuitableOptionError: its weights are quantized, or two blocks are more than may be held.
    """
    folder, digest = locate(name)
    if held := held_form(folder):
        raise UnsuitableOptionError(f"{folder} holds {held} weights, which are not streamed; give the model of floats")
    config, family = read_config(folder, trust_remote_code)
    options = {"dtype": dtype or "auto", "attn_implementation": attention}
    model = build_streamed(folder, weight_files(folder), config, family, options, holding)
    return Loaded(model.eval(), load_processor(folder, trust_remote_code), family, digest, folder)


def build_meta(
    name: str | os.PathLike[str], trust_remote_code: bool = False, form: str | None = None
) -> tuple[PreTrainedModel, Family]:
    """The model of a checkpoint on the meta device and its family, from the config alone: no weights are read.

    Args:
        form: as of `load_model`; the model is that of float weights.

    Raises:
        CheckpointError, UnsupportedModelError: as `load`.
    """
    folder = config_folder(name)
    config, family = read_config(folder, trust_remote_code, form)
    return build_empty(folder, config, family), family


def config_folder(name: str | os.PathLike[str]) -> Path:
    """Where the config of a checkpoint is.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    return _local_folder(os.fspath(name), ("config.json",))


def locate(name: str | os.PathLike[str]) -> tuple[Path, str]:
    """Folder and weight digest of a checkpoint, without building its model.

    Raises:
        CheckpointError: as `check_weights`.
    """
    folder = _weight_folder(name)
    return folder, check_weights(folder)


def stored_types(name: str | os.PathLike[str]) -> dict[str, int]:
    """Weights of a checkpoint by the type they are stored in, as safetensors calls it; from the headers of its files.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    found: dict[str, int] = {}
    for path in weight_files(_weight_folder(name)):
        for kind, shape in stored_weights(path).values():
            found[kind] = found.get(kind, 0) + math.prod(shape)
    return found


def weight_sizes(name: str | os.PathLike[str]) -> dict[str, int]:
    """Bytes of the weight files of a checkpoint by their names, without reading them.

    Raises:
        CheckpointError: it is not there, or lacks one.
    """
    files = weight_files(_weight_folder(name))
    with foreign(f"{name} is incomplete", "copy or download it again"):
        return {path.name: path.stat().st_size for path in files}


def _weight_folder(name: str | os.PathLike[str]) -> Path:
    return _local_folder(os.fspath(name), ("*.json", "*.safetensors", CARD, BASE_CARD, *CARRIED))


def check_weights(folder: Path) -> str:
    """Digest of the weight files (sha256 over their sha256 sums in name order), after checking that each is whole.

    Raises:
        CheckpointError: no safetensors, a missing shard, a damaged file, or one that differs from manifest.json.
    """
    refuse_adapter(folder)
    files = weight_files(folder)
    listed = read(folder / MANIFEST, Listing)["files"] if (folder / MANIFEST).is_file() else {}
    total = hashlib.sha256()
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{folder}: weight file {path.name} is missing; copy or download it again")
        if held_form(folder) is None:
            check_types(path)
        digest = file_digest(path)
        if path.name in listed and listed[path.name]["sha256"] != digest:
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
        names = sorted(set(read(folder / INDEX, Shards)["weight_map"].values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):  # "../a", "/etc/passwd", ".."
                raise CheckpointError(f"{folder / INDEX} names {name!r}, which is no file of its folder; do not use it")
        if not names:
            raise CheckpointError(f"{folder / INDEX} names no file; copy or download it again")
        return [folder / name for name in names]
    raise CheckpointError(f"{folder} holds no {SINGLE} (pickled weights are not read); save it as safetensors")


def _check_room(folder: Path, empty: PreTrainedModel) -> None:
    """Refuse a config that asks for far more weights than are there, before memory is taken for them."""
    asked = sum(parameter.numel() for parameter in empty.parameters())
    held = sum(math.prod(shape) for path in weight_files(folder) for _, shape in stored_weights(path).values())
    if asked > 2 * held + SLACK:
        raise CheckpointError(
            f"{folder}: config.json describes a model of {asked} weights, but the weight files hold {held}; they do "
            "not belong together"
        )


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
        raise CheckpointError(f"{name} is no folder here, and the hub does not give it ({one_line(error)})") from error
