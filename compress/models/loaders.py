"""The one door to transformers' loaders: config, model and processor of a folder that somebody else wrote.

These loaders promise no kind of error: whatever a strange file makes them raise becomes one refusal that names the
folder. What they would do silently and wrongly (attach an adapter, cast integers, unpack somebody's quantization) is
refused before they are called.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any  # classes and options of transformers' loaders

import torch
import transformers
from safetensors import safe_open
from transformers import PreTrainedModel

from slimvlm.compress.errors import CheckpointError, MissingDependencyError, UnsupportedModelError, foreign
from slimvlm.compress.models.discovery.discover import Discovery, discover
from slimvlm.compress.models.experts import take_apart
from slimvlm.compress.models.families import CARRIED, Family, find_family
from slimvlm.compress.models.modeling_slim import RECORD, slim_class
from slimvlm.compress.models.quantized import held_form
from slimvlm.compress.models.streaming.weights import Holding, make_resident, open_streamed, require_memory, tables_of
from slimvlm.compress.options import TRUST_DISCOVERED

PROCESSOR = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
FLOATING = ("F16", "BF16", "F32", "F64")  # types of weights, as safetensors calls them
COUNTED = ("_ids", "_index", "_tracked")  # ends of names of buffers that older checkpoints keep, and that are integers
MODULES = ("layer", "depth", "block", "expert", "stage")  # in names of config fields that count modules
AGAIN = "copy or download it again"
SIZES = ("num_", "hidden_size", "intermediate_size", "image_size", "patch_size", "vocab_size")
MOST_MODULES = 1024  # eight times the deepest model there is; building more takes minutes


def read_config(
    folder: Path, trust_remote_code: bool = False, form: str | None = None
) -> tuple[transformers.PreTrainedConfig, Family]:
    """The config of a folder, and its family. A family that was discovered goes on in the config, and with it into
    every checkpoint that is made of it.

    Args:
        form: of torchao's weights, which are accepted besides floating-point ones.

    Raises:
        CheckpointError: config.json cannot be read, or asks for what no model has; an adapter lies beside it, or its
            weights are quantized.
        UnsupportedModelError: its model type has no row in the family table and, where TRUST_DISCOVERED says that one
            may be discovered, was not understood.
    """
    config = _read_config(folder, trust_remote_code, form)
    try:
        return config, find_family(config)
    except UnsupportedModelError:
        if not os.environ.get(TRUST_DISCOVERED):
            raise
    family = discover(build_empty(folder, config)).trusted()
    setattr(config, CARRIED, asdict(family))
    return config, family


def read_to_discover(folder: Path, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Discovery]:
    """The model of a folder on the meta device, and the rows of its family as far as they are found by experiment.

    Raises:
        CheckpointError: as `read_config`.
        UnsupportedModelError: there is nothing to discover.
    """
    model = build_empty(folder, _read_config(folder, trust_remote_code))
    return model, discover(model)


def _read_config(
    folder: Path, trust_remote_code: bool = False, form: str | None = None
) -> transformers.PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json, so it is not a checkpoint folder")
    refuse_adapter(folder)
    with foreign(f"{folder}: config.json cannot be read"), _quiet():
        document, _ = transformers.PreTrainedConfig.get_config_dict(folder)
    if form is not None and held_form(folder) == form:
        document.pop("quantization_config")
    _check_numbers(folder, document, "")  # first: a config may make lists as long as it has layers
    with foreign(f"{folder}: config.json cannot be read"), _quiet():
        config: transformers.PreTrainedConfig = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    return config


def refuse_adapter(folder: Path) -> None:
    """Transformers attaches an adapter that lies beside weights, and then fills in the weights at random.

    Raises:
        CheckpointError: there is one.
    """
    found = [name for name in ADAPTER if (folder / name).exists()]
    if found:
        raise CheckpointError(
            f"{folder} holds an adapter ({', '.join(found)}), not the weights of a whole model; merge it into its base "
            "model first (peft: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)), "
            "or move the adapter's files away if the weights are complete without it"
        )


def stored_weights(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type (as safetensors calls it) and shape of every tensor of a safetensors file, from its header.

    Raises:
        CheckpointError: it is damaged.
    """
    with foreign(f"{path} is damaged", AGAIN), safe_open(path, "pt") as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}


def check_types(path: Path) -> None:
    """Weights are floating point: integers would be cast to it without the scale they were made with.

    Args:
        path: a safetensors file.

    Raises:
        CheckpointError: one is not, with its name.
    """
    kinds = {name: kind for name, (kind, _) in stored_weights(path).items()}
    wrong = [name for name, kind in kinds.items() if kind not in FLOATING and not name.endswith(COUNTED)]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} weights are {kinds[wrong[0]]} ({wrong[0]}{', ...' if wrong[1:] else ''}); accepted "
            f"are {', '.join(FLOATING)}. Save the model dequantized, as float32, bfloat16 or float16"
        )


def build_empty(folder: Path, config: transformers.PreTrainedConfig, family: Family | None = None) -> PreTrainedModel:
    """The model of a config on the meta device: no weight takes memory. Without a family, the one that answers, if
    there is one.

    Raises:
        CheckpointError: it cannot be built.
    """
    model_class = _model_class(config, family)
    with foreign(f"{folder}: the model cannot be built"), _quiet(), torch.device("meta"):
        model: PreTrainedModel = model_class(config)
    if family is not None:
        take_apart(model, family)
    return model


def _fuses_attention(model_class: Any, config: transformers.PreTrainedConfig) -> bool:
    """Of the class, and of those of its tower and text model."""
    configs = [one for name in config.sub_configs if (one := getattr(config, name, None)) is not None]
    parts = (transformers.MODEL_MAPPING.get(type(one), None) for one in configs)
    return all(getattr(part, "_supports_sdpa", True) for part in (model_class, *parts))


def build_loaded(
    folder: Path, config: transformers.PreTrainedConfig, family: Family, options: dict[str, Any]
) -> PreTrainedModel:
    """The model with the weights of the folder, every one of them in its place, and every one a number.

    Raises:
        CheckpointError: it cannot be built, a weight is missing, left over, of another size, or not finite.
    """
    model_class = _model_class(config, family)
    options = _with_listed(config, model_class, options)
    with foreign(f"{folder}: the model cannot be built"), _quiet():
        loaded: tuple[PreTrainedModel, dict[str, Any]] = model_class.from_pretrained(folder, **options)
    model, info = loaded
    _check_loading(folder, info)
    _check_finite(folder, model)
    take_apart(model, family)
    return model


def build_streamed(
    folder: Path,
    files: Sequence[Path],
    config: transformers.PreTrainedConfig,
    family: Family,
    options: dict[str, Any],
    holding: Holding,
) -> PreTrainedModel:
    """As `build_loaded`, but the weights of the blocks are read from these files when they are needed, and that every
    one is a number is found then.

    Raises:
        CheckpointError: as `build_loaded`.
        UnsuitableOptionError: two blocks, and what is outside of them, are more than may be held.
    """
    model_class = _model_class(config, family)
    options = _with_listed(config, model_class, options)
    with foreign(f"{folder}: the model cannot be built"), _quiet():
        loaded: tuple[PreTrainedModel, Any] = open_streamed(model_class, folder, files, options)
    model, info = loaded
    _check_loading(folder, info)
    take_apart(model, family)
    blocks = [tower.blocks for tower in family.towers]
    tables = () if holding.tables else tables_of(model)
    if holding.bound is not None:
        require_memory(model, blocks, holding.bound, tables)
    make_resident(model, [*blocks, *tables])
    return model


def _with_listed(config: transformers.PreTrainedConfig, model_class: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options of `from_pretrained`: what does not fit is listed."""
    if options.get("attn_implementation") == "sdpa" and not _fuses_attention(model_class, config):
        options = {**options, "attn_implementation": None}
    listed = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which is refused
    return {"config": config, "use_safetensors": True, **listed, **options}


def load_processor(folder: Path, trust_remote_code: bool = False) -> transformers.ProcessorMixin | None:
    """The processor saved in a folder, or None if there is none.

    Raises:
        CheckpointError, MissingDependencyError: it cannot be loaded.
    """
    if not any((folder / name).is_file() for name in PROCESSOR):
        return None
    try:
        with foreign(f"{folder}: its processor cannot be loaded"), _quiet():
            found: transformers.ProcessorMixin = transformers.AutoProcessor.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
            return found
    except CheckpointError as refused:
        # How processors fail whose video part lacks torchvision.
        cause = refused.__cause__
        without = isinstance(cause, TypeError | AttributeError | ImportError) or "torchvision" in str(cause)
        if without and importlib.util.find_spec("torchvision") is None:
            raise MissingDependencyError(
                f"{refused}; it may need torchvision: pip install 'slimvlm[vision]'"
            ) from refused
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers only warns of is an error here, or of no interest."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _model_class(config: transformers.PreTrainedConfig, family: Family | None) -> Any:
    answers, embeds = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, transformers.MODEL_MAPPING
    mappings = (answers, embeds) if family is None else (embeds if family.contrastive else answers,)
    base = next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)
    if base is None:
        name = config.model_type if family is None else family.name
        raise UnsupportedModelError(f"transformers {transformers.__version__} has no model for a {name} config")
    return slim_class(base) if getattr(config, RECORD, None) else base


def _check_numbers(folder: Path, document: object, place: str) -> None:
    """Counts of modules that a machine can build, and no weights in a form of somebody else's."""
    if isinstance(document, dict):
        if document.get("quantization_config"):
            method = document["quantization_config"]
            method = method.get("quant_method") if isinstance(method, dict) else method
            raise CheckpointError(
                f"{folder}: the weights are quantized (quantization_config{place and ' of ' + place}: {method}); only "
                "floating-point weights can be cut. Take the model it was made of, or save it dequantized"
            )
        for name, value in document.items():
            where = f"{place}.{name}" if place else str(name)
            number = value if isinstance(value, int) else 0
            if number > MOST_MODULES and any(word in str(name) for word in MODULES):
                raise CheckpointError(
                    f"{folder}: config.json says {where} = {number:.3g}; accepted is at most {MOST_MODULES}. Correct it"
                )
            if number < 0 and str(name).startswith(SIZES):
                raise CheckpointError(
                    f"{folder}: config.json says {where} = {number}; accepted is 0 or more. Correct it"
                )
            _check_numbers(folder, value, where)


def _check_loading(folder: Path, info: dict[str, Any]) -> None:
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(entry if isinstance(entry, str) else str(entry[0]) for entry in info.get(what) or ()):
            kind = what.removesuffix("_keys").replace("_", " ")
            raise CheckpointError(f"{folder}: {len(found)} {kind} weights ({_some(found)}): they do not fit the config")


def _check_finite(folder: Path, model: PreTrainedModel) -> None:
    """One pass over the weights, without a copy of any: the extremes of a tensor are not finite if a value is not. A
    GPU is waited for once.
    """
    names = [name for name, weight in model.named_parameters() if weight.numel()]
    # What torchao holds is as finite as its scales.
    numbers = (getattr(weight := model.get_parameter(name).detach(), "scale", weight) for name in names)
    extremes = (torch.stack(torch.aminmax(one)) for one in numbers)
    finite = torch.stack([found.isfinite().all() for found in extremes]).tolist()
    wrong = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
    if wrong:
        raise CheckpointError(
            f"{folder}: {len(wrong)} weights hold values that are not finite ({_some(wrong)}); nothing can be computed "
            "with them. Copy or download the checkpoint again, or take an earlier state of its training"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
