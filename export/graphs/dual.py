"""The two towers of a dual encoder as graphs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from slimvlm.compress.models.families import Family
from slimvlm.export.graphs.graph import BATCH, ROWS, SEQUENCE, Graph, Model, Port
from slimvlm.export.running.names import TEXT_TOWER, VISION_TOWER


class Encoder(nn.Module):
    """One side of a dual encoder: `get_image_features` or `get_text_features`, as one tensor [B, C]."""

    def __init__(self, model: Model, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *inputs: Tensor) -> Tensor:
        """Pixels, or token ids and mask."""
        embedding: Tensor = getattr(self.model, self.method)(*inputs).pooler_output
        return embedding.float()


def dual_encoder(model: Model, family: Family, batch: Mapping[str, Tensor]) -> tuple[Graph, ...]:
    """`vision_model` and `text_model`, each giving the embeddings that are compared."""
    row = family.export
    text = tuple(Port(name, batch[name], ROWS) for name in ("input_ids", "attention_mask") if name in batch)
    image = (Port("pixel_values", batch["pixel_values"], {0: BATCH}),)
    longest = {SEQUENCE: model.config.text_config.max_position_embeddings}
    return (
        Graph(VISION_TOWER, Encoder(model, "get_image_features").eval(), image, {row.image_output: {0: BATCH}}),
        Graph(TEXT_TOWER, Encoder(model, "get_text_features").eval(), text, {row.text_output: {0: BATCH}}, longest),
    )
