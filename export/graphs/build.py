"""The graphs of a model of any family."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slimvlm.compress.errors import UnsupportedModelError
from slimvlm.compress.models.families import Family
from slimvlm.export.graphs.decoder import decoder_graph, embed_graph
from slimvlm.export.graphs.dual import dual_encoder
from slimvlm.export.graphs.graph import BATCH, PATCHES, Graph, Model, Port
from slimvlm.export.graphs.seq2seq import encoder_decoder_graphs
from slimvlm.export.graphs.vision import Marked, Patches, Single, vision_encoder
from slimvlm.export.graphs.windows import refuse_unknown_windows
from slimvlm.export.running.names import VISION

# Per kind of vision graph: the axes of its inputs, and the first axis of its features.
VISION_AXES = {
    "patches": ({0: PATCHES}, "num_features"),
    "masked_tiles": ({0: BATCH, 1: "num_images"}, "batch_size x num_images"),
}


def build_graphs(model: Model, family: Family, batch: Mapping[str, Tensor]) -> tuple[Graph, ...]:
    """The graphs of a model, in the order in which generation runs them.

    Args:
        batch: two samples as the model's processor makes them; their image decides the vision graph's fixed sizes.

    Raises:
        UnsupportedModelError: the model has a part that cannot be exported (named).
    """
    check_exportable(model.config, family)
    if family.contrastive:
        return dual_encoder(model, family, batch)
    first = (vision_graph(model, family, batch), embed_graph(model, family))
    if family.own_decoder:
        return first + encoder_decoder_graphs(model.get_submodule(family.export.text))
    return (*first, decoder_graph(model, family))


def check_exportable(config: object, family: Family) -> None:
    """Raises UnsupportedModelError if no graph can be made of a text model of this family and config."""
    if family.export.refused is not None:
        raise UnsupportedModelError(
            f"{family.name} cannot be exported: {family.export.refused}, which the exported graphs do not carry; use "
            "the torch checkpoint"
        )
    refuse_unknown_windows(config)


def vision_graph(model: Model, family: Family, batch: Mapping[str, Tensor]) -> Graph:
    """`vision_encoder`: what the processor makes of images -> features, one row per image token."""
    kind = family.export.vision
    module, names = vision_encoder(model, kind, batch)
    read = (Marked(module) if family.export.image_blocks else module).eval()
    if isinstance(module, Single):
        ports = [Port(name, module.one[name]) for name in module.names]
        return Graph(VISION, read, tuple(ports), {"image_features": {}})
    axes, output = VISION_AXES.get(kind, ({0: BATCH}, BATCH))
    tensors = {name: batch[name].bool() if name == "pixel_attention_mask" else batch[name] for name in names}
    ports = [Port(name, _two_or_more(tensor, axes), axes) for name, tensor in tensors.items()]
    unit = {PATCHES: module.count} if isinstance(module, Patches) else {}
    return Graph(VISION, read, tuple(ports), {"image_features": {0: output}}, unit=unit)


def _two_or_more(tensor: Tensor, axes: Mapping[int, str]) -> Tensor:
    """A varying axis of size 1 would be taken for fixed."""
    for axis in axes:
        if tensor.shape[axis] == 1:
            tensor = torch.cat([tensor] * 3, dim=axis)
    return tensor
