"""A slim model as GGUF for llama.cpp, every layer with its own number of heads and channels.

    python convert_hf_to_gguf.py my-vlm --outfile my-vlm.gguf    # llama.cpp's own, of the model before the cut
    python convert_hf_to_gguf.py my-vlm --mmproj --outfile mmproj.gguf
    python examples/to_gguf.py out/model my-vlm.gguf slim.gguf   # needs: pip install gguf
    python examples/to_gguf.py out/model mmproj.gguf slim-mmproj.gguf

Tokenizer, positions, how an image is prepared and the types of tensors are those of the second file. A Llama is written
as `deci`, llama.cpp's name for a Llama whose layers differ. A vision tower has one number of heads there: heads that
were cut are filled up with zeros, which changes no answer and saves nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, Keys

from slimvlm.compress.models.checkpoint import load_model

LAYERED = ("llama",)  # architectures that `deci` computes the same as
DECI = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DECI]
HEADS = ("attn_q", "attn_k", "attn_v", "attn_out")  # of a vision tower

Tensors = dict[str, np.ndarray]


def text_tensors(loaded: Any, blocks: int) -> Tensors:
    """The language model by llama.cpp's names, queries and keys in the order its rotary positions take."""
    text = loaded.model.get_submodule(loaded.family.export.text)
    state = {f"model.{name}": tensor for name, tensor in text.state_dict().items()}
    if not loaded.model.config.tie_word_embeddings:
        state["lm_head.weight"] = loaded.model.get_submodule(loaded.family.export.head).weight.detach()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, blocks)
    width = text.layers[0].self_attn.head_dim
    found = {}
    for name, tensor in state.items():
        array = tensor.float().numpy()
        if ".q_proj." in name or ".k_proj." in name:
            halves = array.reshape(-1, 2, width // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise SystemExit(f"{name} has no place in llama.cpp's {DECI}; make the cut with --layout stock")
        found[target] = array
    return found


def text_fields(loaded: Any, blocks: int) -> dict[str, Any]:
    """What the cut changes of a language model's description: three numbers become a number per layer."""
    layers = loaded.model.get_submodule(loaded.family.export.text).layers
    width = layers[0].self_attn.head_dim
    return {
        Keys.LLM.BLOCK_COUNT: blocks,
        Keys.LLM.FEED_FORWARD_LENGTH: [layer.mlp.gate_proj.out_features for layer in layers],
        Keys.Attention.HEAD_COUNT: [layer.self_attn.q_proj.out_features // width for layer in layers],
        Keys.Attention.HEAD_COUNT_KV: [layer.self_attn.k_proj.out_features // width for layer in layers],
        Keys.Attention.KEY_LENGTH: width,
        Keys.Attention.VALUE_LENGTH: width,
        Keys.Rope.DIMENSION_COUNT: width,
    }


def vision_tensors(loaded: Any, like: GGUFReader) -> Tensors:
    """The tower and its projector by llama.cpp's names, each block with as many heads as LIKE's."""
    shapes = {tensor.name: tuple(int(size) for size in tensor.shape[::-1]) for tensor in like.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, len(shapes))
    found: Tensors = {}
    for name, tensor in loaded.model.state_dict().items():
        ways = (names.get_name(way, (".weight", ".bias")) for way in (name, name.removeprefix("model.")))
        target = next(filter(None, ways), "")
        if target in shapes:
            array = tensor.float().numpy()
            if any(f".{part}." in target for part in HEADS):
                array = np.pad(array, [(0, size - own) for size, own in zip(shapes[target], array.shape, strict=True)])
            found[target] = array
    blocks = vision_blocks(found)
    missing = [name for name in shapes if name not in found and block_of(name) < blocks]
    if missing:
        raise SystemExit(f"{missing[0]} is not in the model; is LIKE of the model before the cut?")
    return found


def block_of(name: str) -> int:
    """Number of the block that a tensor of a vision tower belongs to; -1 of others."""
    return int(name.split(".")[2]) if name.startswith("v.blk.") else -1


def vision_blocks(tensors: Tensors) -> int:
    """How many blocks the tower has."""
    return max(map(block_of, tensors)) + 1


def write(target: Path, like: GGUFReader, arch: str, fields: dict[str, Any], tensors: Tensors) -> None:
    """LIKE's description with these fields, and the tensors in the types that LIKE has for their names."""
    writer = GGUFWriter(target, arch)
    own = like.fields[Keys.General.ARCHITECTURE].contents()
    for name, field in like.fields.items():
        renamed = f"{arch}{name.removeprefix(own)}" if name.startswith(f"{own}.") else name
        if not name.startswith("GGUF.") and name != Keys.General.ARCHITECTURE and renamed not in fields:
            writer.add_key_value(
                renamed, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None
            )
    for name, value in fields.items():
        (writer.add_array if isinstance(value, list) else writer.add_uint32)(name, value)
    types = {tensor.name: tensor.tensor_type for tensor in like.tensors}
    for name, array in tensors.items():
        kind = types.get(name, GGMLQuantizationType.F32)
        try:
            data = gguf.quantize(array, kind)
        except (NotImplementedError, gguf.QuantError):  # a type that only llama.cpp makes, or a row it does not divide
            kind = GGMLQuantizationType.F16
            data = gguf.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Write one file, of the language model or of the vision tower, as LIKE is of one of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="checkpoint folder that slimvlm wrote, in whatever layout")
    parser.add_argument("like", type=Path, help="GGUF of the same part of the model before it was cut")
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    like = GGUFReader(asked.like)
    loaded: Any = load_model(asked.model, dtype=torch.float32)
    arch = like.fields[Keys.General.ARCHITECTURE].contents()
    if arch == "clip":
        tensors = vision_tensors(loaded, like)
        write(asked.out, like, arch, {Keys.ClipVision.BLOCK_COUNT: vision_blocks(tensors)}, tensors)
        return
    if arch not in LAYERED:
        raise SystemExit(
            f"llama.cpp has no layers of different sizes for {arch}: cut it with --layout stock, and convert that"
        )
    blocks = len(loaded.model.get_submodule(loaded.family.export.text).layers)
    tensors = text_tensors(loaded, blocks)
    tensors |= {tensor.name: tensor.data for tensor in like.tensors if tensor.name == "rope_freqs.weight"}
    fields = {name.format(arch=DECI): value for name, value in text_fields(loaded, blocks).items()}
    write(asked.out, like, DECI, fields, tensors)


if __name__ == "__main__":
    main()
