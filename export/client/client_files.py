"""The files beside the graphs that a client reads: config, generation config, tokenizer, image processor, template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimvlm.compress.models.modeling_slim import PREFIX, RECORD
from slimvlm.export.running.generation import Prompting

CARRIED = ("LICENSE*", "NOTICE*", "spiece.model", "tokenizer.model", "vocab.json", "merges.txt")
TEXT_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
PIL = "Pil"  # suffix of image processor classes that work without torchvision; clients know the plain names


def write_client_files(
    folder: Path, model: Any, processor: Any, prompting: Prompting | None, source: Path, flat: bool
) -> None:
    """Writes what transformers.js and its like load beside `onnx/`.

    Args:
        flat: repeat the sizes of the text model at the top of the config.
        prompting: its ends and padding go into generation_config.json; None for dual encoders.
        source: the checkpoint, for licences and tokenizer files that the tokenizer does not write by itself.
    """
    _write(folder / "config.json", _config(model, flat))
    if prompting is not None:
        _write(folder / "generation_config.json", _generation(model, prompting))
    processor.tokenizer.save_pretrained(folder)
    _save_processor(folder, processor)
    for pattern in CARRIED:
        for path in source.glob(pattern):
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def name_external_data(folder: Path, files: Mapping[str, int]) -> None:
    """Tells transformers.js which graphs have how many files of weights beside them."""
    if files:
        config = json.loads((folder / "config.json").read_text())
        config["transformers.js_config"] = {"use_external_data_format": dict(files)}
        _write(folder / "config.json", config)


def _config(model: Any, flat: bool) -> dict[str, Any]:
    """The model's config under the name of its stock class; `auto_map` points to code that is not here."""
    config = model.config.to_dict()
    config.pop("auto_map", None)
    config.pop("_name_or_path", None)
    config["architectures"] = [type(model).__name__.removeprefix(PREFIX)]
    if flat:
        text = config["text_config"]
        config |= {name: text[name] for name in TEXT_SIZES if name in text and name not in config}
    if RECORD in config:
        config[RECORD] = {"per_layer_config": config[RECORD].get("per_layer_config")}
    return json.loads(json.dumps(config, default=str))


def _generation(model: Any, prompting: Prompting) -> dict[str, Any]:
    config = model.generation_config.to_diff_dict()
    ends = list(prompting.end)
    return {**config, "eos_token_id": ends if len(ends) != 1 else ends[0], "pad_token_id": prompting.pad}


def _save_processor(folder: Path, processor: Any) -> None:
    """One file for the whole processor and one for its image part: older clients read only the second."""
    name = type(processor).__name__
    images = json.loads(processor.image_processor.to_json_string())
    images["image_processor_type"] = _plain(
        images.get("image_processor_type") or type(processor.image_processor).__name__
    )
    images["processor_class"] = name
    _write(folder / "preprocessor_config.json", images)
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
    _write(folder / "processor_config.json", whole)
    template = getattr(processor, "chat_template", None)
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template)


def _plain(name: str) -> str:
    return name.removesuffix("Fast").removesuffix(PIL)


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True, default=str) + "\n")
