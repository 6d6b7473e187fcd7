"""Greedy generation over exported graphs, in numpy: the same loop for every runtime and every family.

It is what a client of the files has to do, no more: features in the place of image tokens, positions, an empty cache
whose shapes the decoder's inputs state, one step after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import numpy as np

from slimvlm.export.running.names import DECODER, EMBED, ENCODER, VISION

Arrays = dict[str, np.ndarray]
PAST, PRESENT = "past_key_values.", "present."


@dataclass(frozen=True, slots=True)
class PortInfo:
    """What a runtime knows of one input or output: numpy dtype name and shape, varying axes by name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Runner(Protocol):
    """Graphs that can be run by name."""

    def inputs(self, graph: str) -> tuple[PortInfo, ...]:
        """What the graph takes."""

    def run(self, graph: str, feeds: Arrays) -> Arrays:
        """Outputs by name."""


@dataclass(frozen=True, slots=True)
class Prompting:
    """What generation needs to know besides the graphs.

    Attributes:
        kind: `decoder` or `encoder-decoder`.
        image_token: stands for one image feature in the prompt.
        end: tokens that end an answer; `pad` fills the rows that are done.
        positions: `count` from `first_position`, or `mrope` with `merge` patches per token and axis.
        start: first token of an encoder-decoder's answer.
    """

    kind: Annotated[str, Literal["decoder", "encoder-decoder"]]
    image_token: int
    end: tuple[int, ...]
    pad: int
    positions: Annotated[str, Literal["count", "mrope"]] = "count"
    first_position: int = 0
    merge: int = 1
    start: int | None = None

    def __post_init__(self) -> None:
        if self.image_token < 0 or self.merge < 1 or self.first_position < 0:
            raise ValueError("a token is below 0, or merge below 1")


@dataclass(frozen=True, slots=True)
class Generated:
    """New tokens [B, T], padded after the end of a row, and the logits [B, V] of each row's first new token."""

    tokens: np.ndarray
    first_logits: np.ndarray


def generate(runner: Runner, prompting: Prompting, batch: Mapping[str, np.ndarray], max_new_tokens: int) -> Generated:
    """The most probable tokens, one after the other, until every row ended; see `steps`."""
    told = steps(runner, prompting, batch, max_new_tokens)
    chosen, first = next(told)
    tokens = [chosen, *(later for later, _ in told)]
    return Generated(np.stack(tokens, axis=1).astype(np.int64), first)


def steps(
    runner: Runner,
    prompting: Prompting,
    batch: Mapping[str, np.ndarray],
    max_new_tokens: int,
    follow: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The next most probable token of every row [B] and the logits [B, V] it was chosen by, until every row ended.

    Args:
        batch: left-padded `input_ids` [B, S] and `attention_mask`, and what the vision graph takes.
        follow: tokens [B, T] to go on with, whatever was most probable, to the last of them.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"].astype(np.int64)
    embeds = embed_prompt(runner, prompting, batch)
    positions = prompt_positions(prompting, ids, mask, batch.get("image_grid_thw"))
    following = positions.max(axis=-1) + 1  # [B] or [3, B]
    feeds: Arrays = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
    if prompting.kind == "encoder-decoder":
        feeds, mask = _encode(runner, prompting, feeds), np.zeros((len(ids), 0), np.int64)
    feeds |= empty_cache(runner, len(ids), feeds)
    done = np.zeros(len(ids), bool)
    for step in range(1, max_new_tokens + 1):
        outputs = runner.run(DECODER, feeds)
        logits = outputs["logits"][:, -1].copy()  # those of a prompt may be large
        cache = {name.replace(PRESENT, PAST): value for name, value in outputs.items() if name.startswith(PRESENT)}
        del outputs
        chosen = np.where(done, prompting.pad, logits.argmax(-1))
        yield chosen, logits
        chosen = chosen if follow is None else follow[:, step - 1]
        done |= np.isin(chosen, prompting.end)
        if step == max_new_tokens or (follow is None and done.all()):
            return
        mask = np.concatenate([mask, np.ones((len(ids), 1), np.int64)], axis=1)
        place = {"position_ids": (following + step - 1)[..., None], "attention_mask": mask}
        feeds = {**feeds, **cache, **place, "inputs_embeds": _embed(runner, chosen[:, None])}


def embed_prompt(runner: Runner, prompting: Prompting, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Embeddings [B, S, C] of a prompt with image features in the place of its image tokens.

    Raises:
        ValueError: there are not as many image tokens as features.
    """
    ids = batch["input_ids"]
    taken = {port.name: batch[port.name] for port in runner.inputs(VISION)}
    features = image_features(runner, taken)
    if "pixel_attention_mask" in taken:  # images of nothing but padding stand for no token
        features = features[batch["pixel_attention_mask"].reshape(len(features), -1).any(axis=1)]
    features = features.reshape(-1, features.shape[-1])
    image = ids == prompting.image_token
    if image.sum() != len(features):
        raise ValueError(f"{image.sum()} image tokens in the prompts, but {len(features)} image features")
    embeds = _embed(runner, np.where(image, 0, ids)).copy()  # the token itself may lie outside the vocabulary
    embeds[image] = features
    return embeds


def image_features(runner: Runner, taken: Arrays) -> np.ndarray:
    """Of all images; a graph of one image is run for each of them."""
    first = runner.inputs(VISION)[0]
    rows, one = len(taken[first.name]), first.shape[0]
    if not isinstance(one, int) or one == rows:
        return runner.run(VISION, taken)["image_features"]
    parts = ({name: array[at : at + one] for name, array in taken.items()} for at in range(0, rows, one))
    return np.concatenate([runner.run(VISION, part)["image_features"] for part in parts])


def prompt_positions(
    prompting: Prompting, ids: np.ndarray, mask: np.ndarray, grids: np.ndarray | None = None
) -> np.ndarray:
    """Positions of prompts: [B, S], or [3, B, S] for M-RoPE, where an image counts up its rows and columns apart.

    Args:
        grids: [images, 3], frames, rows and columns of patches of every image, in the order of the image tokens.
    """
    if prompting.positions == "count":
        counted: np.ndarray = np.maximum(mask.cumsum(-1) - 1, 0) + prompting.first_position
        return counted
    remaining = iter(() if grids is None else grids.tolist())
    result = np.ones((3, *ids.shape), np.int64)
    for row, (tokens, real) in enumerate(zip(ids, mask.astype(bool), strict=True)):
        result[:, row, real] = _rope_positions(tokens[real] == prompting.image_token, prompting.merge, remaining)
    return result


def _rope_positions(image: np.ndarray, merge: int, grids: Iterator[list[int]]) -> np.ndarray:
    """[3, S] for one row; `image` says which of its tokens are image tokens."""
    parts, start, at = [], 0, 0
    while at < len(image):
        if not image[at]:
            parts.append(np.full((3, 1), start))
            start, at = start + 1, at + 1
            continue
        frames, rows, columns = (size // factor for size, factor in zip(next(grids), (1, merge, merge), strict=True))
        parts.append(np.indices((frames, rows, columns)).reshape(3, -1) + start)
        start, at = start + max(rows, columns), at + frames * rows * columns
    return np.concatenate(parts, axis=1)


def empty_cache(runner: Runner, batch_size: int, given: Mapping[str, np.ndarray]) -> Arrays:
    """Keys and values of no tokens, in the shapes that the decoder states; those in `given` are left out."""
    return {
        port.name: np.zeros([_empty(size, batch_size) for size in port.shape], port.dtype)
        for port in runner.inputs(DECODER)
        if port.name.startswith(PAST) and port.name not in given
    }


def _empty(size: int | str, batch_size: int) -> int:
    if isinstance(size, str):
        return batch_size if size == "batch_size" else 0
    return size


def _embed(runner: Runner, ids: np.ndarray) -> np.ndarray:
    return runner.run(EMBED, {"input_ids": ids.astype(np.int64)})["inputs_embeds"]


def _encode(runner: Runner, prompting: Prompting, prompt: Arrays) -> Arrays:
    encoded = runner.run(ENCODER, {name: prompt[name] for name in ("inputs_embeds", "attention_mask")})
    given = {name.replace(PRESENT, PAST): value for name, value in encoded.items() if name.startswith(PRESENT)}
    start = np.full((len(prompt["attention_mask"]), 1), prompting.start)
    return {
        **given,
        "inputs_embeds": _embed(runner, start),
        "encoder_attention_mask": prompt["attention_mask"],
        "position_ids": prompt["position_ids"],
    }


def until_end(row: Sequence[int], end: Sequence[int]) -> list[int]:
    """The tokens of an answer up to and including the one that ends it."""
    found = next((index for index, token in enumerate(row) if token in end), len(row))
    return [int(token) for token in row[: found + 1]]


def token_losses(logits: np.ndarray, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Losses [T] of tokens by their logits [T, V], in nats."""
    return -_log_probabilities(logits)[np.arange(len(tokens)), tokens]


def divergences(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(wanted || found) [T] of the next token's probabilities, by logits [T, V], in nats."""
    expected = _log_probabilities(wanted)
    distances: np.ndarray = (np.exp(expected) * (expected - _log_probabilities(found))).sum(axis=-1)
    return distances


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    logarithms: np.ndarray = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return logarithms
