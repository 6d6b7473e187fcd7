"""The generation loop on a model of a few lines, whose right answers can be counted out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exports import cut_model

from slimvlm.export.running.generation import PortInfo, Prompting, embed_prompt, generate, prompt_positions, until_end

WORDS, IMAGE = 8, 7
COUNTING = Prompting("decoder", image_token=IMAGE, end=(5,), pad=0)


class CountingModel:
    """Says the last token plus one; embeddings are one-hot, features are rows of nines, the cache holds positions."""

    def __init__(self) -> None:
        self.masks: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []

    def inputs(self, graph):
        if graph == "vision_encoder":
            return (PortInfo("pixel_values", "float32", ("batch_size", 2)),)
        return (PortInfo("past_key_values.0.key", "float32", ("batch_size", 1, "past_sequence_length", 1)),)

    def run(self, graph, feeds):
        if graph == "vision_encoder":
            return {"image_features": np.full((len(feeds["pixel_values"]), 2, WORDS), 9.0)}
        if graph == "embed_tokens":
            return {"inputs_embeds": np.eye(WORDS)[feeds["input_ids"]]}
        self.masks.append(feeds["attention_mask"])
        self.positions.append(feeds["position_ids"])
        logits = np.roll(feeds["inputs_embeds"], 1, axis=-1)
        new = feeds["position_ids"][:, None, :, None].astype(np.float32)
        cache = np.concatenate([feeds["past_key_values.0.key"], new], axis=2)
        assert cache.shape[2] == feeds["attention_mask"].shape[1]
        return {"logits": logits, "present.0.key": cache}


def prompt(*rows):
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": np.array(ids), "attention_mask": np.array(mask), "pixel_values": np.zeros((len(rows), 2))}


def test_a_row_that_ended_is_padded_and_the_others_go_on():
    model = CountingModel()
    result = generate(model, COUNTING, prompt([IMAGE, IMAGE, 4], [IMAGE, IMAGE, 6, 2]), 10)
    assert result.tokens.tolist() == [[5, 0, 0], [3, 4, 5]]
    assert result.first_logits.argmax(-1).tolist() == [5, 3]


def test_generation_stops_at_the_most_tokens():
    assert generate(CountingModel(), COUNTING, prompt([IMAGE, IMAGE, 0]), 3).tokens.tolist() == [[1, 2, 3]]


def test_positions_count_real_tokens_and_go_on_per_row():
    model = CountingModel()
    generate(model, COUNTING, prompt([IMAGE, IMAGE, 1], [IMAGE, IMAGE, 1, 1, 1]), 3)
    assert model.positions[0].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert [step.tolist() for step in model.positions[1:]] == [[[3], [5]], [[4], [6]]]
    assert [mask.shape[1] for mask in model.masks] == [5, 6, 7]
    assert model.masks[2][0].tolist() == [0, 0, 1, 1, 1, 1, 1]


def test_positions_may_begin_at_one():
    start = Prompting("decoder", IMAGE, (5,), 0, first_position=1)
    assert prompt_positions(start, np.array([[3, 3]]), np.array([[1, 1]])).tolist() == [[1, 2]]


def test_features_take_the_places_of_image_tokens_in_order():
    embeds = embed_prompt(CountingModel(), COUNTING, prompt([1, IMAGE, IMAGE], [IMAGE, 2, IMAGE]))
    assert (embeds[[0, 0, 1, 1], [1, 2, 0, 2]] == 9).all()
    assert embeds[1, 1].argmax() == 2


def test_another_number_of_image_tokens_than_features_is_refused():
    with pytest.raises(ValueError, match="3 image tokens in the prompts, but 2 image features"):
        generate(CountingModel(), COUNTING, prompt([IMAGE, IMAGE, IMAGE]), 1)


def test_images_of_nothing_but_padding_stand_for_no_token():
    class Tiled(CountingModel):
        def inputs(self, graph):
            more = (PortInfo("pixel_attention_mask", "bool", ("batch_size", "num_images")),)
            return super().inputs(graph) + (more if graph == "vision_encoder" else ())

        def run(self, graph, feeds):
            if graph == "vision_encoder":
                return {"image_features": np.arange(4.0)[:, None, None] * np.ones((1, 2, WORDS))}
            return super().run(graph, feeds)

    batch = {**prompt([IMAGE] * 4, [IMAGE] * 2), "pixel_attention_mask": np.array([[1, 1], [1, 0]])[..., None, None]}
    embeds = embed_prompt(Tiled(), COUNTING, batch)
    assert embeds[0, :, 0].tolist() == [0, 0, 1, 1]
    assert embeds[1, 2:, 0].tolist() == [2, 2]


def test_image_positions_are_those_of_the_model():
    """Two rows of different lengths, left-padded, with images of 4 x 6 and 6 x 4 patches, merged two by two."""
    model, collator = cut_model("qwen2_vl")
    image = int(collator.image_token_id)
    ids = torch.tensor([[0, 0, 5, *[image] * 6, 8], [4, 5, 6, *[image] * 6, 9]])
    mask = torch.tensor([[0, 0, *[1] * 8], [1] * 10])
    grids = torch.tensor([[1, 4, 6], [1, 6, 4]])
    wanted, _ = model.model.get_rope_index(ids, (ids == image).int(), image_grid_thw=grids, attention_mask=mask)
    prompting = Prompting("decoder", image, (2,), 0, positions="mrope", merge=2)
    found = prompt_positions(prompting, ids.numpy(), mask.numpy(), grids.numpy())
    real = mask.bool().numpy()
    assert (found[:, real] == wanted.numpy()[:, real]).all()


def test_an_answer_reaches_to_its_end():
    assert until_end([3, 5, 0, 0], (5,)) == [3, 5]
    assert until_end([3, 4], (5,)) == [3, 4]
