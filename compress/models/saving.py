"""A checkpoint folder, whole or absent: weights, config, processor, plan and manifest.

The stock layout is that of a cut model whose sizes the unmodified class can build from plain config fields.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from slimvlm.compress.card import write_card
from slimvlm.compress.errors import CheckpointError
from slimvlm.compress.files.decoding import read
from slimvlm.compress.files.folders import (
    MANIFEST,
    list_files,
    refuse_inside,
    require_free,
    require_room,
    reserved,
    written_folder,
)
from slimvlm.compress.files.writing import write_text
from slimvlm.compress.models.checkpoint import (
    CARRIED,
    PLAN,
    build_meta,
    load_model,
    stream_model,
    weight_files,
    weight_sizes,
)
from slimvlm.compress.models.computing import free_memory, is_to_be_streamed
from slimvlm.compress.models.experts import ALIGNED, together
from slimvlm.compress.models.families import Experts, Family, Mlp, find_family
from slimvlm.compress.models.groups import Group, count_parameters, find_groups
from slimvlm.compress.models.modeling_slim import RECORD
from slimvlm.compress.models.quantized import held_form, quantize, require_torchao
from slimvlm.compress.models.streaming.weights import Holding, streamed
from slimvlm.compress.options import LAYOUTS
from slimvlm.compress.plan import Plan

SHARD, STREAMED_SHARD = "5GB", "1GB"  # of a streamed model, one is in memory
ADVICE = "make the plan with --layout stock, or save with --layout per-layer"


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: PreTrainedModel,
    processor: ProcessorMixin | None,
    plan: Plan | None,
    layout: str = "per-layer",
    max_shard_size: str | None = None,
) -> Path:
    """Writes a checkpoint: weights (safetensors), config, processor, plan.json, model card, manifest.json (sizes and
    sha256). Of a streamed model, one shard at a time is in memory.

    Args:
        plan: what was cut from the dense model; None for a model that was not cut.
        layout: `per-layer`, or `stock` (only what the unmodified class can build).
        max_shard_size: of a weight file; None: 5 GB, or 1 GB of a streamed model.

    Raises:
        OutputError: the folder is not empty, cannot be written, or has no room for the weights.
        CheckpointError: layout `stock`, and the model has sizes that the unmodified class cannot build (named).
        ValueError: unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    folder = Path(folder)
    saved = stock_model(model) if layout == "stock" else model
    if getattr(model, "hf_quantizer", None) is None:  # else a weight does not say what it takes
        require_room(folder, sum(weight.nbytes for weight in model.parameters()))
    max_shard_size = max_shard_size or (STREAMED_SHARD if streamed(model) else SHARD)
    with together(model), written_folder(folder) as partial:
        saved.save_pretrained(partial, max_shard_size=max_shard_size)
        source = Path(model.config.name_or_path).expanduser() if model.config.name_or_path else None
        _save_processor(partial, processor, source)
        if plan is not None:
            write_text(partial / PLAN, plan.to_json())
        contrastive = find_family(model.config).contrastive
        write_card(partial, source, plan, contrastive=contrastive, form=held_form(partial))
        _write_manifest(partial)
    return folder


@dataclass(frozen=True, slots=True)
class Quantized:
    """A checkpoint that was put in a form of IN_TORCH: bytes of its weight files and of those it was made of, and how
    many linears are held as what (`int8`, `int4`); a row that 4 bits do not fit is in 8.
    """

    out: Path
    form: str
    bytes: int
    bytes_before: int
    linears: Mapping[str, int]


def quantize_checkpoint(
    name: str | os.PathLike[str],
    out: str | os.PathLike[str],
    form: str,
    trust_remote_code: bool = False,
    stream: str = "auto",
) -> Quantized:
    """Writes a float checkpoint (dense, per-layer or stock layout) anew, its linears in `form`, as `from_pretrained` of
    transformers loads it where torchao is installed.

    Args:
        stream: of STREAM: whether a weight at a time is read and written; `auto`: where all of them do not fit.

    Raises:
        CheckpointError, UnsupportedModelError: it cannot be loaded, or is quantized already.
        MissingDependencyError: no torchao.
        OutputError: the folder `out` is not empty, or cannot be written.
    """
    require_torchao()
    out = Path(out)
    refuse_inside(out, {"model": os.fspath(name)})
    require_free(out)
    least = count_parameters(build_meta(name, trust_remote_code)[0])  # a byte of each
    require_room(out, least)
    streams = is_to_be_streamed(stream, least + sum(weight_sizes(name).values()))
    load = partial(stream_model, holding=Holding(free_memory())) if streams else load_model
    with reserved(out):
        loaded = load(name, trust_remote_code=trust_remote_code)
        linears = quantize(loaded.model, form)
        plan = read(loaded.folder / PLAN, Plan) if (loaded.folder / PLAN).is_file() else None
        save_checkpoint(out, loaded.model, loaded.processor, plan)
    after, before = (sum(path.stat().st_size for path in weight_files(one)) for one in (out, loaded.folder))
    return Quantized(out, form, after, before, linears)


def _save_processor(folder: Path, processor: ProcessorMixin | None, source: Path | None) -> None:
    if processor is not None:
        processor.save_pretrained(folder)
    if source is not None and source.is_dir():
        for pattern in CARRIED:
            for path in source.glob(pattern):
                if not (folder / path.name).exists():
                    shutil.copyfile(path, folder / path.name)


def _write_manifest(folder: Path) -> None:
    write_text(folder / MANIFEST, json.dumps({"schema": 1, "files": list_files(folder)}, indent=2) + "\n")


def stock_model(model: PreTrainedModel) -> PreTrainedModel:
    """A view of `model` (same weights) of the unmodified class, with the config that builds these sizes.

    Raises:
        CheckpointError: the widths of one tower differ from layer to layer, or the class cannot build one of them.
    """
    record = getattr(model.config, RECORD, None)
    stock = copy.copy(model)
    stock.__class__ = getattr(type(model), "stock_class", type(model))
    stock.config = copy.deepcopy(model.config)
    if record:
        family = find_family(model.config)
        for path, fields in stock_fields(model, family, {*record["shapes"], *record.get("stacked", ())}).items():
            with _refused():
                set_fields(attrgetter(path)(stock.config), fields)
    for name in (RECORD, "auto_map"):
        if hasattr(stock.config, name):
            delattr(stock.config, name)
    with together(stock):
        _check_build(stock)
    return stock


def _check_build(model: PreTrainedModel) -> None:
    """The class must build exactly these sizes: a config field may size more than what was cut (SigLIP's pooling head),
    or be refused (Llama wants a number of heads that divides the hidden size)."""
    with _refused():
        config = type(model.config).from_dict(model.config.to_dict())  # as a reload does: checks the values
        with torch.device("meta"):
            built = type(model)(config)
    expected = {name: tensor.shape for name, tensor in built.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if expected.get(name) != tensor.shape:
            sizes = f"{tuple(expected.get(name, ()))}, not {tuple(tensor.shape)}"
            raise CheckpointError(f"layout stock: the unmodified class would build {name} as {sizes}; {ADVICE}")


@contextmanager
def _refused() -> Iterator[None]:
    """Errors of the class or its config as one of ours."""
    try:
        yield
    except (ValueError, StrictDataclassError) as error:
        why = " ".join(str(error).split())
        raise CheckpointError(f"layout stock: the unmodified class refuses these sizes ({why}); {ADVICE}") from error


def set_fields(config: PreTrainedConfig, fields: Mapping[str, float]) -> None:
    """Set `fields` in `config`, in place.

    Raises:
        StrictDataclassError: it refuses one of them, or what they are together.
    """
    for name, value in fields.items():
        setattr(config, name, float(value) if isinstance(getattr(config, name, None), float) else value)
    config.validate()


def stock_values(group: Group) -> dict[str, float]:
    """Field of the config of the group's tower -> value that builds its present size; empty: none does."""
    sizes: dict[str, float] = {"size": group.size, "heads": group.size, "per_head": group.heads_per_kv}
    sizes |= {"kv_heads": group.kv_heads, "head_dim": group.head_dim}
    if isinstance(group.part, Mlp) and group.part.ratio:
        hidden = group.weights_per_unit // len(group.members)
        # A fraction is a little larger than it has to be, for the class rounds its product down.
        sizes["ratio"] = (group.size + 0.5) / hidden if group.size % hidden else group.size // hidden
    return {name: sizes[fact] for name, fact in group.part.fields}


def stock_fields(model: nn.Module, family: Family, cut: set[str]) -> dict[str, dict[str, float]]:
    """Config path -> field -> value that build the present sizes of `model`, of which the modules `cut` were cut."""
    values: dict[tuple[str, str], dict[float, str]] = {}
    changed = set()
    for group in find_groups(model, family):
        facts = {(group.home.config, name): value for name, value in stock_values(group).items()}
        if cut & {group.path, *(member.path for member in group.members)}:
            if not facts:
                raise CheckpointError(
                    f"layout stock: the unmodified class cannot build a narrower {group.key}; {ADVICE}"
                )
            if isinstance(group.part, Experts) and group.heads_per_kv % ALIGNED:
                raise CheckpointError(
                    f"layout stock: the unmodified class wants a multiple of {ALIGNED} channels in an expert, and "
                    f"{group.key} has {group.heads_per_kv}; {ADVICE}"
                )
            changed |= set(facts)
        for field, value in facts.items():
            values.setdefault(field, {}).setdefault(value, group.key)
    fields: dict[str, dict[str, float]] = {}
    for path, name in sorted(changed):
        found = values[path, name]
        if len(found) > 1:
            where = ", ".join(f"{value} for {key}" for value, key in found.items())
            raise CheckpointError(f"layout stock: {path}.{name} would have to be {where}; {ADVICE}")
        fields.setdefault(path, {})[name] = next(iter(found))
    return fields
