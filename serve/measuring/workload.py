"""What is measured with: the grid of workloads, and inputs of exactly the asked size that the dense and the slim model
share. Every row of a batch has the same length, so no padding is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from slimvlm.compress.data.collate import PER_TOKEN, Collator
from slimvlm.compress.data.images import as_png
from slimvlm.compress.data.records import Turn
from slimvlm.compress.data.samples import Sample, load_samples, open_image
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.export.checks.reference import image_size
from slimvlm.export.options import ExportOptions
from slimvlm.export.running.generation import Arrays
from slimvlm.serve.options import ProfileOptions

QUESTION = "What is in the image?"
READ, WRITTEN = 512, 128  # tokens of llama-bench's pp512 and tg128
NOISE = 448  # side of generated images


@dataclass(frozen=True, slots=True)
class Workload:
    """One cell of the grid; `image_size` None: the processor's own; `prompt_tokens` None: a short question's."""

    batch_size: int
    image_size: tuple[int, int] | None
    prompt_tokens: int | None
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arrays for `Backend.place`, and what they are: `prompt_tokens` counts image features in."""

    arrays: Arrays
    image_size: tuple[int, int] | None
    prompt_tokens: int
    new_tokens: int

    @property
    def rows(self) -> int:
        """B."""
        return len(self.arrays["input_ids"])

    @property
    def pixels(self) -> tuple[int, ...] | None:
        """Shape of `pixel_values`."""
        return self.arrays["pixel_values"].shape if "pixel_values" in self.arrays else None


def grid(options: ProfileOptions) -> list[Workload]:
    """Every combination that was asked for."""
    sizes = options.image_sizes or (None,)
    prompts = options.prompt_tokens or (None,)
    return [Workload(*one) for one in product(options.batch_sizes, sizes, prompts, options.new_tokens)]


class InputMaker:
    """Makes the inputs of workloads with the processor of a model.

    Args:
        size: height and width that images are brought to where none is asked for; None: as the processor likes.

    Raises:
        SampleError: the data cannot be read.
    """

    def __init__(self, collator: Collator, options: ProfileOptions, size: tuple[int, int] | None = None) -> None:
        self.collator, self.seed = collator, options.seed
        self.kind, self._config = collator.family.kind, collator.config
        self.size = size or _own_size(collator)
        self._samples: list[Sample] = []
        if options.data is not None:
            read = load_samples(options.data, limit=max(options.batch_sizes), seed=options.seed).samples
            self._samples = [replace(sample, turns=sample.turns[:1]) for sample in read]

    def make(self, workload: Workload) -> Inputs:
        """The inputs of one cell.

        Raises:
            UnsuitableOptionError: more or fewer prompt tokens than the model and its image permit, or an image size
                that the processor does not keep.
        """
        if workload.image_size is not None:
            self._refuse_lost_size(workload.image_size)
        size = workload.image_size or self.size
        samples = [self._sample(index, size) for index in range(workload.batch_size)]
        batch = self._batch(samples)
        length = self._length(batch, workload)
        return Inputs(self._lengthened(batch, length), size, length, workload.new_tokens)

    def read_test(self) -> Inputs:
        """`pp512`: text alone; shorter where the model takes less."""
        return self._text(min(READ, self.collator.max_text_tokens), 1)

    def write_test(self) -> Inputs:
        """`tg128`: new tokens on an empty context; the first of them comes from reading one token and is not timed."""
        return self._text(1, min(WRITTEN, self.collator.max_text_tokens - 1) + 1)

    def _text(self, length: int, new_tokens: int) -> Inputs:
        ids = self._random().choice(self._plain_ids(), (1, length))
        return Inputs({"input_ids": ids, "attention_mask": np.ones_like(ids)}, None, length, new_tokens)

    def _batch(self, samples: Sequence[Sample]) -> Arrays:
        batch = self.collator.training(samples) if self.kind == "dual-encoder" else self.collator.prompts(samples)
        return {name: tensor.numpy() for name, tensor in batch.items() if name != "return_loss"}

    def _sample(self, index: int, size: tuple[int, int] | None) -> Sample:
        if self._samples:
            sample = self._samples[index % len(self._samples)]
            return sample if size is None else replace(sample, content=as_png(open_image(sample).resize(size[::-1])))
        height, width = size or (NOISE, NOISE)
        noise = np.random.default_rng((self.seed, index)).integers(0, 256, (height, width, 3), dtype=np.uint8)
        name = f"noise {index}, {height}x{width}"
        return Sample(Path(name), (Turn(QUESTION, ("",)),), name, content=as_png(Image.fromarray(noise)))

    def _refuse_lost_size(self, size: tuple[int, int]) -> None:
        """An image size is a workload of its own only where the model sees it."""
        shape, other = (
            self._batch([self._sample(0, one)])["pixel_values"].shape for one in (size, (2 * size[0], 3 * size[1]))
        )
        if shape == other and shape[-2:] != size:
            raise UnsuitableOptionError(
                f"--image-sizes {size[0]}x{size[1]}: this processor brings every image to {shape[-2]}x{shape[-1]}; "
                "leave the option out"
            )

    def _length(self, batch: Arrays, workload: Workload) -> int:
        """Tokens of every row: as many as asked for, or as the longest row has."""
        masked = "attention_mask" in batch
        longest = int(batch["attention_mask"].sum(1).max()) if masked else batch["input_ids"].shape[1]
        wanted = workload.prompt_tokens or longest
        if wanted < longest:
            raise UnsuitableOptionError(
                f"--prompt-tokens {wanted}: a question with its image takes {longest} tokens here; ask for no less"
            )
        more = workload.new_tokens if self.kind == "decoder" else 0
        if wanted + more > self.collator.max_text_tokens:
            raise UnsuitableOptionError(
                f"{wanted} prompt tokens and {more} new ones are more than the {self.collator.max_text_tokens} this "
                "model takes; lower --prompt-tokens or --new-tokens"
            )
        return wanted

    def _lengthened(self, batch: Arrays, length: int) -> Arrays:
        """Rows of real tokens only, with random ones before the last: `length` each."""
        if "attention_mask" not in batch:  # every text has its full length already
            return batch
        random, plain = self._random(), self._plain_ids()
        rows: dict[str, list[np.ndarray]] = {}
        for index, mask in enumerate(batch["attention_mask"].astype(bool)):
            missing = length - int(mask.sum())
            fill = {"input_ids": random.choice(plain, missing), "attention_mask": np.ones(missing, np.int64)}
            for name in ("input_ids", "attention_mask", *PER_TOKEN):
                if name in batch:
                    row = batch[name][index][mask]
                    added = fill.get(name, np.zeros(missing, row.dtype))
                    rows.setdefault(name, []).append(np.concatenate([row[:-1], added, row[-1:]]))
        return {**batch, **{name: np.stack(found) for name, found in rows.items()}}

    def _random(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def _plain_ids(self) -> np.ndarray:
        """Ids in the vocabulary that stand for text, not for an image or an end."""
        tokenizer, text = self.collator.tokenizer, getattr(self._config, "text_config", self._config)
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values(), self.collator.image_token_id}
        return np.array(sorted(set(range(min(len(tokenizer), text.vocab_size))) - special))


def _own_size(collator: Collator) -> tuple[int, int] | None:
    """Where the image decides how much there is to see: a size that the family's processor keeps as it is."""
    size = image_size(collator, collator.config, ExportOptions())
    return size or ((NOISE, NOISE) if collator.family.export.vision == "masked_tiles" else None)
