"""The files beside the graphs that a client reads: config, generation config, tokenizer, image processor, template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.models.modeling_slim import PREFIX, RECORD
from slimvlm.export.graphs.graph import Model
from slimvlm.export.running.generation import Prompting
from slimvlm.export.running.manifest import Document, Manifest

CARRIED = ("LICENSE*", "NOTICE*", "spiece.model", "tokenizer.model", "vocab.json", "merges.txt")
TEXT_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
PIL = "Pil"  # suffix of image processor classes that work without torchvision; clients know the plain names


def write_client_files(
    folder: Path, model: Model, collator: Collator, prompting: Prompting | None, external: Mapping[str, int]
) -> None:
    """Writes what transformers.js and its like load beside `onnx/`.

    Args:
        prompting: its ends and padding go into generation_config.json; None for dual encoders.
        external: which graphs have how many files of weights beside them.
    """
    config = _config(model, collator.family.export.flat_config)
    if external:
        config["transformers.js_config"] = {"use_external_data_format": dict(external)}
    write_document(folder / "config.json", config)
    if prompting is not None:
        write_document(folder / "generation_config.json", _generation(model, prompting))
    collator.processor.tokenizer.save_pretrained(folder)
    _save_processor(folder, collator.processor)
    for pattern in CARRIED:
        for path in Path(model.config.name_or_path or ".").glob(pattern):
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def external_data(folder: Path, manifest: Manifest) -> dict[str, int]:
    """Names of the ONNX graphs with weights in files beside them, and how many files."""
    files = (artifact.file for artifact in manifest.artifacts if artifact.format == "onnx")
    return {file.removeprefix("onnx/"): 1 for file in files if (folder / f"{file}_data").exists()}


def _config(model: Model, flat: bool) -> Document:
    """The model's config under the name of its stock class; `auto_map` points to code that is not here.

    Args:
        flat: repeat the sizes of the text model at the top.
    """
    config = model.config.to_dict()
    config.pop("auto_map", None)
    config.pop("_name_or_path", None)
    config["architectures"] = [type(model).__name__.removeprefix(PREFIX)]
    if flat:
        text = config["text_config"]
        config |= {name: text[name] for name in TEXT_SIZES if name in text and name not in config}
    if RECORD in config:
        config[RECORD] = {"per_layer_config": config[RECORD].get("per_layer_config")}
    plain: Document = json.loads(json.dumps(config, default=str))
    return plain


def _generation(model: Model, prompting: Prompting) -> Document:
    config = model.generation_config.to_diff_dict()
    ends = list(prompting.end)
    return {**config, "eos_token_id": ends if len(ends) != 1 else ends[0], "pad_token_id": prompting.pad}


def _save_processor(folder: Path, processor: Model) -> None:
    """One file for the whole processor and one for its image part: older clients read only the second."""
    name = type(processor).__name__
    images = json.loads(processor.image_processor.to_json_string())
    images["image_processor_type"] = _plain(
        images.get("image_processor_type") or type(processor.image_processor).__name__
    )
    images["processor_class"] = name
    write_document(folder / "preprocessor_config.json", images)
    whole = {
        key: value
        for key, value in processor.to_dict().items()
        if key not in ("tokenizer", "chat_template", "video_processor", "auto_map") and value is not None
    }
    whole |= {"processor_class": name, "image_processor": images}
    if whole.get("vision_feature_select_strategy") == "default" and whole.get("num_additional_image_tokens"):
        # The same number of image tokens in fewer steps: transformers.js adds, but does not take one off for `default`.
        whole["num_additional_image_tokens"] -= 1
        whole["vision_feature_select_strategy"] = "full"
    write_document(folder / "processor_config.json", whole)
    template = getattr(processor, "chat_template", None)
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template)


def _plain(name: str) -> str:
    return name.removesuffix("Fast").removesuffix(PIL)


def write_document(path: Path, document: Mapping[str, object], sort_keys: bool = True) -> None:
    """Writes JSON as the tools do whose files these are."""
    path.write_text(json.dumps(document, indent=2, sort_keys=sort_keys, default=str) + "\n")
