"""Exported graphs behind the interface of backends.py: TorchScript and ONNX Runtime, on values that stay in place.

The steps are those of `export.running.generation`, but what a step leaves for the next (the cache) stays in the
runtime's own form: arrays on the CPU, values bound to a GPU, tensors of TorchScript. What does not depend on the tokens
is made once, so that a step is two calls of a session and a few assignments: a client's loop does no less.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from slimvlm.export.running.generation import PAST, PRESENT, Arrays, Prompting, empty_cache, prompt_positions
from slimvlm.export.running.names import DECODER, EMBED, ENCODER, TEXT_TOWER, VISION, VISION_TOWER
from slimvlm.export.running.runners import SessionRunner, TorchRunner, Value

Tensors = dict[str, Tensor]
Graphs = SessionRunner | TorchRunner
EMBEDS, MASK, POSITIONS = "inputs_embeds", "attention_mask", "position_ids"


def run_graph(graphs: Graphs, graph: str, feeds: Mapping[str, Tensor]) -> Tensors:
    """Outputs by name; feeds the graph does not take are left out."""
    outputs = graphs.call(graph, values_for(graphs, graph, feeds))
    return {name: graphs.tensor(value) for name, value in zip(graphs.outputs(graph), outputs, strict=True)}


def values_for(graphs: Graphs, graph: str, feeds: Mapping[str, Tensor]) -> dict[str, Value]:
    """Of `feeds` what the graph takes, as values in its dtypes, in its order."""
    ports = graphs.inputs(graph)
    return {
        port.name: graphs.value(feeds[port.name].to(getattr(torch, port.dtype)).contiguous())
        for port in ports
        if port.name in feeds
    }


class GraphBackend:
    """The graphs of one variant.

    Args:
        prompting: of the export; None for a dual encoder.
    """

    def __init__(self, graphs: Graphs, prompting: Prompting | None, device: torch.device) -> None:
        self.graphs, self.prompting, self.device = graphs, prompting, device
        self._batch: Tensors = {}
        self._empty: Tensors = {}
        self._image = self._positions = torch.zeros(0)
        self._feeds: dict[str, Value] = {}  # of the decoder, as its runtime takes them
        self._later: list[dict[str, Value]] = []  # of them what changes with every step, but not with the tokens
        self._steps = 0
        self._start = None if prompting is None else prompting.start
        if prompting is not None:
            outputs, taken = graphs.outputs(DECODER), {port.name: port for port in graphs.inputs(DECODER)}
            self._logits = outputs.index("logits")
            # What stays in the cache: place among outputs, name among inputs. An encoder's stays as it was given.
            pairs = [(place, _past(name)) for place, name in enumerate(outputs) if name.startswith(PRESENT)]
            self._kept = [(place, name) for place, name in pairs if name in taken]

    def place(self, arrays: Arrays) -> None:
        """See `Backend`."""
        self._batch = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        if self.prompting is None:
            return
        ids = arrays["input_ids"]
        grids = arrays.get("image_grid_thw")
        positions = prompt_positions(self.prompting, ids, np.ones_like(ids), grids)
        self._positions = torch.from_numpy(positions).to(self.device)
        image = self._batch["input_ids"] == self.prompting.image_token
        self._image = image[..., None]
        self._batch["input_ids"] = self._batch["input_ids"].masked_fill(image, 0)  # may lie outside the vocabulary
        cache = empty_cache(self.graphs, len(ids), {})
        self._empty = {name: torch.from_numpy(array).to(self.device) for name, array in cache.items()}
        self._later = []

    def vision(self) -> Value:
        """See `Backend`."""
        if self.prompting is None:
            return run_graph(self.graphs, VISION_TOWER, self._batch)
        if "pixel_values" not in self._batch:
            return None
        pixels = self.graphs.inputs(VISION)[0]
        one = pixels.shape[0] if isinstance(pixels.shape[0], int) else len(self._batch[pixels.name])
        parts = [{**self._batch, pixels.name: part} for part in self._batch[pixels.name].split(one)]
        features = torch.cat([run_graph(self.graphs, VISION, part)["image_features"] for part in parts])
        if "pixel_attention_mask" in self._batch:  # images of nothing but padding stand for no token
            features = features[self._batch["pixel_attention_mask"].reshape(len(features), -1).any(dim=1)]
        return features

    def text(self) -> Value:
        """See `Backend`."""
        return run_graph(self.graphs, TEXT_TOWER, self._batch)

    def prefill(self, features: Value, new_tokens: int) -> Value:
        """See `Backend`."""
        ids = self._batch["input_ids"]
        embeds = self._embed(ids)
        if features is not None:
            embeds = embeds.masked_scatter(self._image, features.to(embeds.dtype))
        self._prepare(new_tokens)
        feeds = {EMBEDS: embeds, MASK: torch.ones_like(ids), POSITIONS: self._positions}
        if self._start is not None:
            encoded = run_graph(self.graphs, ENCODER, feeds)
            given = {_past(name): value for name, value in encoded.items() if name.startswith(PRESENT)}
            start = self._embed(ids.new_full((len(ids), 1), self._start))
            feeds = {**given, EMBEDS: start, "encoder_attention_mask": feeds[MASK]}
        self._feeds = values_for(self.graphs, DECODER, {**self._empty, **feeds})
        self._steps = 0
        return self._decode()

    def step(self, token: Value) -> Value:
        """See `Backend`."""
        self._feeds[EMBEDS] = self.graphs.call(EMBED, {"input_ids": token})[0]
        self._feeds.update(self._later[self._steps - 1])
        return self._decode()

    def _prepare(self, new_tokens: int) -> None:
        """Masks and positions of the steps after the first token, once per workload."""
        ids, following = self._batch["input_ids"], self._positions.amax(-1, keepdim=True) + 1
        for step in range(len(self._later), new_tokens - 1):
            length = self._positions.shape[-1] + step + 1
            later = {MASK: ids.new_ones(len(ids), length), POSITIONS: following + step}
            self._later.append(values_for(self.graphs, DECODER, later) if self._start is None else {})

    def _embed(self, ids: Tensor) -> Tensor:
        return run_graph(self.graphs, EMBED, {"input_ids": ids})[EMBEDS]

    def _decode(self) -> Value:
        self._steps += 1
        outputs = self.graphs.call(DECODER, self._feeds)
        for place, name in self._kept:
            self._feeds[name] = outputs[place]
        return self.graphs.last(outputs[self._logits])


def _past(name: str) -> str:
    """The decoder's input that an output (of its own, or the encoder's) becomes."""
    return name.replace(PRESENT, PAST)
