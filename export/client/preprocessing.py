"""What a client has to do to an image and a question before the graphs, as data: `run` in manifest.json.

It is read off the processor, and then held against the processor on real samples; where `run_onnx.py` with this recipe
does not give the processor's tokens and pixels, the folder is shipped without it and says why.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.data.records import Turn
from slimvlm.compress.data.samples import Sample, open_image
from slimvlm.export.graphs.graph import Model
from slimvlm.export.running.generation import Arrays
from slimvlm.export.running.manifest import Document

QUESTION = "{question}"
CHECKED = 4  # samples
PIXEL_ERROR = 0.05  # mean, of values that are about 1: libraries resize a little differently


EXAMPLE = "run_onnx.py"


class NoRecipeError(ValueError):
    """This processor does what the recipe cannot say; the message names it."""


def write_example(folder: Path, collator: Collator, samples: list[Sample], size: tuple[int, int] | None) -> Document:
    """Writes `run_onnx.py`, if its recipe gives what the processor gives.

    Args:
        size: that all images are brought to first, if any.

    Returns:
        Of `run` in manifest.json: `prompt` and `image`, maybe with a `note`; else `why_not`.
    """
    try:
        with one_tile(collator) as plain:
            alone = single_batches(plain, samples)
            recipe = make_recipe(plain, samples[0], alone[0], size)
            check_recipe(plain, recipe, samples[: len(alone)], alone)
    except NoRecipeError as error:
        return {"why_not": str(error)}
    if plain is not collator:
        recipe["note"] = f"{EXAMPLE} gives the model the whole image only; its processor also cuts it into tiles"
    shutil.copyfile(Path(__file__).with_name(EXAMPLE), folder / EXAMPLE)
    return recipe


def make_recipe(collator: Collator, sample: Sample, batch: Arrays, size: tuple[int, int] | None) -> Document:
    """`prompt` and `image` for run_onnx.py.

    Args:
        sample: a real one; `batch` is what the collator makes of it.
        size: that all images are brought to first, if any.

    Raises:
        NoRecipeError: the processor does something else.
    """
    prompt, image = _prompt(collator, sample, batch), _image(collator, batch, size)
    if "grids" in image:  # image_ids are those of one tile
        ids, token = prompt["image_ids"], prompt["image_token"]
        at, count = ids.index(token), ids.count(token)
        prompt["image_ids"] = ids[:at] + [token] * (count // len(batch["pixel_values"])) + ids[at + count :]
    return {"prompt": prompt, "image": image}


def check_recipe(collator: Collator, recipe: Document, samples: list[Sample], batches: list[Arrays]) -> None:
    """Raises NoRecipeError where the recipe's token ids or pixels are not the processor's."""
    from tokenizers import Tokenizer

    from slimvlm.export.client.run_onnx import pixels, prompt_ids

    tokenizer = Tokenizer.from_str(collator.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for sample, batch in zip(samples, batches, strict=True):
        found, wanted = pixels(open_image(sample), recipe["image"]), batch["pixel_values"]
        tiles = len(found) if "grids" in recipe["image"] else 1
        ids = prompt_ids(tokenizer, sample.turns[-1].prompt, recipe["prompt"], tiles)
        if not np.array_equal(ids, batch["input_ids"]):
            raise NoRecipeError(f"the prompt of {sample.identity} is put together differently by its processor")
        if found.shape != wanted.shape or np.abs(found - wanted).mean() > PIXEL_ERROR:
            raise NoRecipeError(f"the image of {sample.identity} is prepared differently by its processor")


@contextmanager
def one_tile(collator: Collator) -> Iterator[Collator]:
    """A collator whose processor does not cut images into tiles, where that is a switch: the example shows one tile."""
    images = collator.processor.image_processor
    if not getattr(images, "do_image_splitting", False):
        yield collator
        return
    images.do_image_splitting = False
    try:
        yield Collator(collator.processor, collator.family, collator.config)
    finally:
        images.do_image_splitting = True


def single_batches(collator: Collator, samples: list[Sample]) -> list[Arrays]:
    """Each sample alone, as the processor makes it."""
    return [
        {name: tensor.numpy() for name, tensor in collator.prompts([sample]).items()} for sample in samples[:CHECKED]
    ]


def _prompt(collator: Collator, sample: Sample, batch: Arrays) -> Document:
    marked = Sample(sample.image, (Turn(QUESTION, ("",)),), "recipe", content=sample.content)
    text, special = collator.prompt_text(marked)
    if text.count(QUESTION) != 1:
        raise NoRecipeError("its chat template does not hold the question as it is")
    written, special_here = collator.prompt_text(sample)
    ids = collator.tokenizer(written, add_special_tokens=special_here, return_token_type_ids=False)["input_ids"]
    token, whole = int(collator.image_token_id), batch["input_ids"][0].tolist()
    placeholder = int(collator.placeholder_id)
    at = ids.index(placeholder) if placeholder in ids else 0
    rest = len(ids) - at - (placeholder in ids)
    image_ids = whole[at : len(whole) - rest]
    return {
        "text": text,
        "special": special,
        "image_token": token,
        "placeholder": placeholder,
        "image_ids": image_ids,
        "image_first": placeholder not in ids,
    }


def _image(collator: Collator, batch: Arrays, size: tuple[int, int] | None) -> Document:
    images = collator.processor.image_processor
    shape = list(batch["pixel_values"].shape)
    recipe: Document = {
        "resize_first": None if size is None else list(size),
        "resample": int(images.resample),
        "scale": images.rescale_factor if images.do_rescale else 1.0,
        "mean": list(images.image_mean) if images.do_normalize else [0.0] * 3,
        "std": list(images.image_std) if images.do_normalize else [1.0] * 3,
        "repeat": 1,
        "split": shape,
        "order": list(range(len(shape))),
        "shape": shape,
    }
    return {**recipe, **LAYOUTS[collator.family.export.vision](collator, batch, size)}


def _plain(collator: Collator, batch: Arrays, size: tuple[int, int] | None) -> Document:
    """One image of one size."""
    images = collator.processor.image_processor
    side = dict(images.size)
    *tiles, _, height, width = batch["pixel_values"].shape
    if getattr(images, "max_patches", 1) > 1:
        return _grids(images, [-1, 3, height, width])
    if (count := math.prod(tiles)) != 1:
        raise NoRecipeError(f"its processor cuts an image into as many as {count} tiles, by the shape of the image")
    if "shortest_edge" in side and getattr(images, "do_center_crop", False):
        return {"views": [{"shortest_edge": side["shortest_edge"], "box": [height, width]}]}
    return {"views": [{"size": [height, width]}]}


def _twice(collator: Collator, batch: Arrays, size: tuple[int, int] | None) -> Document:
    """First to one longest side, then to a square: two steps lose more of an image than one (Idefics3)."""
    layout, images = _plain(collator, batch, size), collator.processor.image_processor
    longest = dict(images.size).get("longest_edge") if images.do_resize else None
    return layout if longest is None else {**layout, "longest_edge": longest}


def _grids(images: Model, shape: list[int]) -> Document:
    """As many tiles as the shape of the image asks for, by columns within equal numbers, then the whole (InternVL)."""
    counts = range(1, images.max_patches + 1)
    grids = [[rows, columns] for columns in counts for rows in counts]
    grids = [grid for grid in grids if images.min_patches <= math.prod(grid) <= images.max_patches]
    order = list(range(len(shape)))
    return {"grids": sorted(grids, key=math.prod), "tile": shape[-2:], "split": shape, "order": order, "shape": shape}


def _tiles(collator: Collator, batch: Arrays, size: tuple[int, int] | None) -> Document:
    """The whole image, then its tiles; the image is one of the sizes that need no padding."""
    side = batch["pixel_values"].shape[-1]
    height, width = size if size is not None else (side, side)
    rows, columns = get_anyres_image_grid_shape((height, width), collator.config.image_grid_pinpoints, side)
    if (height, width) != (rows * side, columns * side):
        raise NoRecipeError(f"images of {height}x{width} are padded before they are tiled; use --image-size of tiles")
    corners = [[row * side, column * side] for row in range(rows) for column in range(columns)]
    tiles = [{"size": [height, width], "box": [*corner, side, side]} for corner in corners]
    return {"views": [{"size": [side, side]}, *tiles]}


def _patches(collator: Collator, batch: Arrays, size: tuple[int, int] | None) -> Document:
    """Patches of one image in blocks that are merged to one token, every image repeated in time (Qwen VL)."""
    images = collator.processor.image_processor
    frames, rows, columns = batch["image_grid_thw"][0].tolist()
    patch, merge, time = images.patch_size, images.merge_size, images.temporal_patch_size
    return {
        "views": [{"size": [rows * patch, columns * patch]}],
        "repeat": time,
        "split": [frames, time, 3, rows // merge, merge, patch, columns // merge, merge, patch],
        "order": [0, 3, 6, 4, 7, 2, 1, 5, 8],
        "grid": [frames, rows, columns],
    }


def _one(collator: Collator, batch: Arrays, size: tuple[int, int] | None) -> Document:
    """What a processor makes of one image for a graph of one image differs from family to family."""
    raise NoRecipeError("its graph takes one image in the form that only its own processor gives it")


LAYOUTS = {
    "single": _one,
    "pooled": _plain,
    "select": _plain,
    "masked_tiles": _twice,
    "tiles": _tiles,
    "patches": _patches,
}
