"""Exported graphs behind the interface of backends.py: TorchScript and ONNX Runtime, on tensors that stay in place.

The steps are those of `compress.generation`, but features, embeddings and the cache are tensors of the device: on a GPU
the outputs `present.*` of ONNX Runtime are bound as inputs of the next step and never leave it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from slimvlm.compress.generation import PAST, PRESENT, Arrays, PortInfo, Prompting, empty_cache, prompt_positions
from slimvlm.compress.runners import SessionRunner, TorchRunner

Tensors = dict[str, Tensor]
VISION, EMBED, ENCODER, DECODER = "vision_encoder", "embed_tokens", "encoder_model", "decoder_model_merged"
DUAL = ("vision_model", "text_model")


class Graphs(Protocol):
    """Graphs that can be run by name on tensors."""

    @property
    def runner(self) -> SessionRunner | TorchRunner:
        """The same graphs on arrays."""

    def inputs(self, graph: str) -> tuple[PortInfo, ...]:
        """What the graph takes."""

    def run(self, graph: str, feeds: Mapping[str, Tensor]) -> Tensors:
        """Outputs by name; feeds the graph does not take are left out."""


def _fitting(ports: tuple[PortInfo, ...], feeds: Mapping[str, Tensor]) -> Tensors:
    """Of `feeds` what the ports take, contiguous and in their dtypes, in their order."""
    return {port.name: feeds[port.name].to(getattr(torch, port.dtype)).contiguous() for port in ports}


class TorchGraphs:
    """TorchScript modules."""

    def __init__(self, runner: TorchRunner) -> None:
        self.runner, self.inputs = runner, runner.inputs

    def run(self, graph: str, feeds: Mapping[str, Tensor]) -> Tensors:
        """See `Graphs`."""
        outputs = self.runner.modules[graph](*_fitting(self.inputs(graph), feeds).values())
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return dict(zip(self.runner.names[graph], outputs, strict=True))


class OnnxGraphs:
    """Sessions of ONNX Runtime on the CPU; arrays and tensors share their memory."""

    def __init__(self, runner: SessionRunner) -> None:
        self.runner = runner
        self._ports: dict[str, tuple[PortInfo, ...]] = {}

    def inputs(self, graph: str) -> tuple[PortInfo, ...]:
        """See `Graphs`; asked once of a session, which takes longer to say than a small graph to run."""
        if graph not in self._ports:
            self._ports[graph] = self.runner.inputs(graph)
        return self._ports[graph]

    def run(self, graph: str, feeds: Mapping[str, Tensor]) -> Tensors:
        """See `Graphs`."""
        session = self.runner.session(graph)
        arrays = {name: tensor.numpy() for name, tensor in _fitting(self.inputs(graph), feeds).items()}
        outputs = session.run(None, arrays)
        names = (output.name for output in session.get_outputs())
        return {name: torch.from_numpy(array) for name, array in zip(names, outputs, strict=True)}


class BoundOnnxGraphs(OnnxGraphs):
    """Sessions of ONNX Runtime whose inputs and outputs are bound where they lie: on a GPU nothing goes to the host.

    Args:
        device: of the tensors, and of the sessions.
    """

    def __init__(self, runner: SessionRunner, device: torch.device) -> None:
        super().__init__(runner)
        self.place = device.type, device.index or 0
        self._nowhere = torch.zeros(1, device=device)

    def run(self, graph: str, feeds: Mapping[str, Tensor]) -> Tensors:
        """See `Graphs`."""
        session = self.runner.session(graph)
        binding = session.io_binding()
        given = _fitting(self.inputs(graph), feeds)
        for port in self.inputs(graph):
            tensor = given[port.name]
            pointer = tensor.data_ptr() or self._nowhere.data_ptr()  # a null pointer is refused, also for no elements
            binding.bind_input(port.name, *self.place, np.dtype(port.dtype), tuple(tensor.shape), pointer)
        names = [output.name for output in session.get_outputs()]
        for name in names:
            binding.bind_output(name, *self.place)
        if self._nowhere.is_cuda:  # the session has a stream of its own, and leaves it when all is done
            torch.cuda.current_stream(self._nowhere.device).synchronize()
        session.run_with_iobinding(binding)
        return {name: torch.from_dlpack(value) for name, value in zip(names, binding.get_outputs(), strict=True)}


class GraphBackend:
    """The graphs of one variant.

    Args:
        prompting: of the export; None for a dual encoder.
    """

    def __init__(self, graphs: Graphs, prompting: Prompting | None, device: torch.device) -> None:
        self.graphs, self.prompting, self.device = graphs, prompting, device
        self._batch: Tensors = {}
        self._feeds: Tensors = {}
        self._empty: Tensors = {}
        self._image = self._mask = torch.zeros(0)
        self._positions = self._following = torch.zeros(0)
        self._steps = 0
        self._start = None if prompting is None else prompting.start

    def place(self, arrays: Arrays) -> None:
        """See `Backend`."""
        self._batch = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        if self.prompting is None:
            return
        ids = arrays["input_ids"]
        grids = arrays.get("image_grid_thw")
        positions = prompt_positions(self.prompting, ids, np.ones_like(ids), grids)
        self._positions = torch.from_numpy(positions).to(self.device)
        self._following = self._positions.amax(-1, keepdim=True) + 1
        image = self._batch["input_ids"] == self.prompting.image_token
        self._image = image[..., None]
        self._batch["input_ids"] = self._batch["input_ids"].masked_fill(image, 0)  # may lie outside the vocabulary
        cache = empty_cache(self.graphs.runner, len(ids), {})
        self._empty = {name: torch.from_numpy(array).to(self.device) for name, array in cache.items()}

    def vision(self) -> Any:
        """See `Backend`."""
        if self.prompting is None:
            return self.graphs.run(DUAL[0], self._batch)
        if "pixel_values" not in self._batch:
            return None
        features = self.graphs.run(VISION, self._batch)["image_features"]
        if "pixel_attention_mask" in self._batch:  # images of nothing but padding stand for no token
            features = features[self._batch["pixel_attention_mask"].reshape(len(features), -1).any(dim=1)]
        return features

    def text(self) -> Any:
        """See `Backend`."""
        return self.graphs.run(DUAL[1], self._batch)

    def prefill(self, features: Any, new_tokens: int) -> Tensor:
        """See `Backend`."""
        ids = self._batch["input_ids"]
        embeds = self._embed(ids)
        if features is not None:
            embeds = embeds.masked_scatter(self._image, features.to(embeds.dtype))
        self._steps = 0
        if self._start is None:
            self._mask = ids.new_ones(len(ids), ids.shape[1] + new_tokens)
            feeds = {"inputs_embeds": embeds, "attention_mask": self._mask[:, : ids.shape[1]]}
            self._feeds = {**self._empty, **feeds, "position_ids": self._positions}
            return self._decode()
        encoded = self.graphs.run(ENCODER, {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids)})
        start = self._embed(ids.new_full((len(ids), 1), self._start))
        feeds = {"inputs_embeds": start, "encoder_attention_mask": torch.ones_like(ids)}
        self._feeds = {**self._empty, **_as_past(encoded), **feeds}
        return self._decode()

    def step(self, token: Tensor) -> Tensor:
        """See `Backend`."""
        self._feeds["inputs_embeds"] = self._embed(token)
        if self._start is None:
            seen = self._positions.shape[-1] + self._steps
            self._feeds["attention_mask"] = self._mask[:, :seen]
            self._feeds["position_ids"] = self._following + (self._steps - 1)
        return self._decode()

    def _embed(self, ids: Tensor) -> Tensor:
        return self.graphs.run(EMBED, {"input_ids": ids})["inputs_embeds"]

    def _decode(self) -> Tensor:
        self._steps += 1
        outputs = self.graphs.run(DECODER, self._feeds)
        self._feeds |= _as_past(outputs)
        return outputs["logits"][:, -1]


def _as_past(outputs: Tensors) -> Tensors:
    """What the next step takes as keys and values; an encoder's stay as they were given."""
    return {name.replace(PRESENT, PAST): tensor for name, tensor in outputs.items() if name.startswith(PRESENT)}
