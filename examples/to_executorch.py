"""ExecuTorch programs of an export: every graph as a `.pte` for XNNPACK, a decoder with its cache inside.

    slimvlm export out/model exported --format pt2
    pip install executorch==1.5.1
    python examples/to_executorch.py exported --longest 1024

EXPORT gets a folder `executorch`. One prompt at a time: images have the shape of the one in `sample.safetensors`, texts
any length up to `--longest`, prompt and answer together. A decoder takes `past_mask` [1, tokens in the cache], ones or
zeros at padding, and then what its graph in `manifest.json` takes, without the mask and the cache: it keeps keys and
values itself, behind those that `past_mask` counts. With an empty mask another answer begins. It gives the logits.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from torch.export import Dim

PAST, TOTAL = "past_sequence_length", "total_sequence_length"


class Holding(nn.Module):
    """A decoder that keeps its cache: `longest` places of every head and layer, filled from the front."""

    def __init__(self, decoder: nn.Module, ports: list[dict[str, Any]], longest: int) -> None:
        super().__init__()
        self.decoder, self.ports = decoder, ports
        for index, port in enumerate(port for port in ports if PAST in port["shape"]):
            shape = [{"batch_size": 1, PAST: longest}.get(size, size) for size in port["shape"]]
            self.register_buffer(f"cache_{index}", torch.zeros(shape, dtype=getattr(torch, port["dtype"])))

    def forward(self, past_mask: Tensor, inputs_embeds: Tensor, *others: Tensor) -> Tensor:
        """Mask of the tokens in the cache [1, P], embeddings of the new ones [1, S, C], what else the graph takes."""
        past, new = past_mask.shape[1], inputs_embeds.shape[1]
        buffers, given = iter(self.buffers(recurse=False)), iter((inputs_embeds, *others))
        filled = []
        for port in self.ports:
            if PAST in port["shape"]:
                filled.append(next(buffers)[:, :, :past])
            elif TOTAL in port["shape"]:
                filled.append(torch.cat([past_mask, torch.ones((1, new), dtype=torch.int64)], dim=1))
            else:
                filled.append(next(given))
        logits, *grown = self.decoder(*filled)
        for buffer, keys in zip(self.buffers(recurse=False), grown, strict=True):
            buffer[:, :, torch.arange(new) + past] = keys[:, :, past:]
        return logits


def program_of(folder: Path, graph: dict[str, Any], sample: dict[str, Tensor], longest: int) -> bytes:
    """The `.pte` of one graph of the manifest."""
    module: nn.Module = without_detach(torch.export.load(folder / graph["file"]).module(check_guards=False))
    ports = graph["inputs"]
    if any(PAST in port["shape"] for port in ports):
        module = Holding(module, ports, longest)
        mask = {"name": "past_mask", "dtype": "int64", "shape": ["batch_size", PAST]}
        ports = [mask, *(port for port in ports if not {PAST, TOTAL} & set(port["shape"]))]
    dims: dict[str, Any] = {PAST: Dim(PAST, min=0, max=longest - 1)}
    arguments, shapes = [], []
    for port in ports:
        sizes = {axis: size for axis, size in enumerate(port["shape"]) if "sequence" in str(size)}
        fixed = None if sizes else sample.get(f"given.{port['name']}")
        shapes.append({axis: dims.setdefault(size, Dim(size, min=1, max=longest)) for axis, size in sizes.items()})
        shape = [{"batch_size": 1, PAST: 4}.get(size, 3) if isinstance(size, str) else size for size in port["shape"]]
        blank = torch.ones(shape, dtype=getattr(torch, port["dtype"]))
        arguments.append(blank if fixed is None else fixed.to(blank.dtype))
    with torch.no_grad():
        program = torch.export.export(module, tuple(arguments), dynamic_shapes=shaped(module, shapes), strict=False)
    program = program.run_decompositions(WRITTEN)
    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer


def without_detach(module: fx.GraphModule) -> fx.GraphModule:
    """Constants of a model are detached in place, which cannot be traced again and does nothing here."""
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.detach_.default):
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
    module.recompile()
    return module


def patch_product(patches: Tensor, weight: Tensor, bias: Tensor | None = None, *_: object) -> Tensor:
    """A convolution over whole patches [N, C, T, H, W] as a product: ExecuTorch has none in three dimensions."""
    if patches.shape[1:] != weight.shape[1:]:
        raise NotImplementedError("a convolution in three dimensions over more than one patch")
    return nn.functional.linear(patches.flatten(1), weight.flatten(1), bias)[..., None, None, None]


def tanh_gelu(values: Tensor, approximate: str = "none") -> Tensor:
    """GELU by tanh, written out: the delegate's own is the one by the error function, whichever is asked for."""
    if approximate != "tanh":
        return NotImplemented
    inner = math.sqrt(2 / math.pi) * (values + 0.044715 * values * values * values)
    return 0.5 * values * (1 + torch.tanh(inner))


WRITTEN = {torch.ops.aten.conv3d.default: patch_product, torch.ops.aten.gelu.default: tanh_gelu}


def shaped(module: nn.Module, shapes: list[dict[int, Any]]) -> tuple[Any, ...]:
    """The varying axes by parameter."""
    return (*shapes[:2], tuple(shapes[2:])) if isinstance(module, Holding) else tuple(shapes)


def main() -> None:
    """Write all graphs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("export", type=Path, help="folder that `slimvlm export --format pt2` wrote")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of prompt and answer together")
    asked = parser.parse_args()
    graphs = json.loads((asked.export / "manifest.json").read_text())["artifacts"]
    sample = load_file(asked.export / "sample.safetensors")
    (asked.export / "executorch").mkdir(exist_ok=True)
    for graph in (one for one in graphs if one["format"] == "pt2"):
        target = asked.export / "executorch" / Path(graph["file"]).with_suffix(".pte").name
        target.write_bytes(program_of(asked.export, graph, sample, asked.longest))
        print(target)


if __name__ == "__main__":
    main()
