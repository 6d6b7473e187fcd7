"""For onnxruntime-genai, where that runtime knows the model type: its config, its image processing, one more graph.

It puts image features into the prompt inside a graph of its own, `embedding`; the other graphs are shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.models.families import Family
from slimvlm.export.client.client_files import write_document
from slimvlm.export.graphs.decoder import Embed, embedding_width
from slimvlm.export.graphs.graph import ROWS, Graph, Model, Port
from slimvlm.export.running.generation import Prompting
from slimvlm.export.running.manifest import Document

CONFIG, IMAGES = "genai_config.json", "genai_processor.json"
PIXELS = 3


class Merge(nn.Module):
    """Token ids [B, S] and image features [N, C] -> embeddings [B, S, C]; the n-th image token takes the n-th row.

    An image token beyond the N-th has its own embedding, as in the model: it may also be one that the model gave.
    """

    def __init__(self, embedding: Model, width: int, image_token: int) -> None:
        super().__init__()
        self.embed, self.image_token = Embed(embedding, width), image_token

    def forward(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        """Look up and replace, fp32; N may be 0."""
        image = input_ids == self.image_token
        embeds = self.embed(input_ids)
        rows = torch.cat([torch.zeros_like(embeds[:1, 0]), image_features])  # row 0 is for text
        place = image.flatten().long().cumsum(0).view(image.shape) * image
        filled = image & (place < rows.shape[0])
        return torch.where(filled[..., None], rows[place * filled], embeds)


def genai_graphs(model: Model, family: Family) -> tuple[Graph, ...]:
    """`embedding`, traced with three image tokens in two rows; nothing for a family that the runtime does not know."""
    if family.export.genai is None:
        return ()
    embedding, width = model.get_input_embeddings(), embedding_width(model, family)
    image_token = model.config.image_token_id
    ids = torch.tensor([[1, image_token, image_token, 2, 3], [image_token, 1, 2, 3, 4]])
    features = torch.randn(PIXELS, width, generator=torch.Generator().manual_seed(2))
    ports = (Port("input_ids", ids, ROWS), Port("image_features", features, {0: "num_features"}))
    return (Graph("embedding", Merge(embedding, width, image_token).eval(), ports, {"inputs_embeds": ROWS}),)


def write_genai(folder: Path, model: Model, collator: Collator, prompting: Prompting, files: Mapping[str, str]) -> None:
    """Writes `genai_config.json` and `genai_processor.json`.

    Args:
        files: per graph the one to run.
    """
    config = {"model": _model(model, collator.family, prompting, files), "search": _search(model)}
    write_document(folder / CONFIG, config, sort_keys=False)
    images = {"processor": {"name": "image", "transforms": _transforms(collator.processor.image_processor)}}
    write_document(folder / IMAGES, images, sort_keys=False)


def _model(model: Model, family: Family, prompting: Prompting, files: Mapping[str, str]) -> Document:
    config, text = model.config, model.config.text_config
    heads = text.num_attention_heads
    options = {"log_id": "onnxruntime-genai", "provider_options": []}
    cache = {name: f"past_key_values.%d.{name.split('_')[1]}" for name in ("past_key_names", "past_value_names")}
    present = {name: f"present.%d.{name.split('_')[1]}" for name in ("present_key_names", "present_value_names")}
    features = {"image_features": "image_features"}
    return {
        "type": family.export.genai,
        "bos_token_id": text.bos_token_id if text.bos_token_id is not None else prompting.end[0],
        "eos_token_id": list(prompting.end),
        "pad_token_id": prompting.pad,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "decoder": {
            "session_options": options,
            "filename": files["decoder_model_merged"],
            "head_size": getattr(text, "head_dim", None) or text.hidden_size // heads,
            "hidden_size": embedding_width(model, family),
            "num_attention_heads": heads,
            "num_key_value_heads": text.num_key_value_heads,
            "num_hidden_layers": text.num_hidden_layers,
            "inputs": {
                **{name: name for name in ("inputs_embeds", "attention_mask", "position_ids")},
                **cache,
            },
            "outputs": {"logits": "logits", **present},
        },
        "embedding": {
            "session_options": options,
            "filename": files["embedding"],
            "inputs": {"input_ids": "input_ids", **features},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        "vision": {
            "session_options": options,
            "filename": files["vision_encoder"],
            "config_filename": IMAGES,
            "spatial_merge_size": config.vision_config.spatial_merge_size,
            "patch_size": config.vision_config.patch_size,
            "tokens_per_second": float(getattr(config.vision_config, "tokens_per_second", 2.0)),
            "inputs": {"pixel_values": "pixel_values"},
            "outputs": features,
        },
    }


def _search(model: Model) -> Document:
    return {
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "max_length": model.config.text_config.max_position_embeddings,
        "min_length": 0,
        "past_present_share_buffer": False,  # the cache grows, and layers differ in their heads
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }


def _transforms(images: Model) -> list[Document]:
    """The steps of Qwen's image processor in the terms of onnxruntime-extensions."""
    patch = {"patch_size": images.patch_size, "merge_size": images.merge_size}
    size = {"min_pixels": images.size["shortest_edge"], "max_pixels": images.size["longest_edge"]}
    colours = {"mean": list(images.image_mean), "std": list(images.image_std), "qwen2_5_vl": 1}
    steps: list[tuple[str, Document]] = [
        ("DecodeImage", {"color_space": "RGB"}),
        ("ConvertRGB", {}),
        ("Resize", {"width": 540, "height": 360, "smart_resize": 1, **size, **patch}),
        ("Rescale", {"rescale_factor": images.rescale_factor}),
        ("Normalize", colours),
        ("PatchImage", {"temporal_patch_size": images.temporal_patch_size, **patch}),
    ]
    return [
        {"operation": {"name": kind.lower(), "type": kind, **({"attrs": attributes} if attributes else {})}}
        for kind, attributes in steps
    ]
