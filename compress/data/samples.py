"""Image-text samples: read, checked, counted, and identified by a digest that does not depend on where they lie."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any  # as in records.py

from PIL import Image

from slimvlm.compress.data.images import BadImageError, as_png, check_image, decode_image, read_content, resolve_image
from slimvlm.compress.data.records import (
    BadRecordError,
    Records,
    Turn,
    image_of,
    printable,
    read_records,
    read_turns,
    sound_text,
)
from slimvlm.compress.errors import SampleError

REPORTED = 5
Checked = dict[str, tuple[Path, str] | BadImageError]  # image name -> its file and digest, or why it is none


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its turns of question and answer.

    Attributes:
        image: the file, or a name when the bytes are in `content` (samples of a Hugging Face dataset).
        turns: at least one; an empty prompt asks for a caption.
        identity: where the sample stands (`file:line`), for messages and for pairing two evaluations.
        task: what kind of question it is; qualities are averaged per task, then over tasks.
        vendor: where the image comes from; reported apart.
        digest: sha256 of the image's bytes, where the sample was read by `load_samples`.
    """

    image: Path
    turns: tuple[Turn, ...]
    identity: str
    task: str | None = None
    vendor: str | None = None
    content: bytes | None = field(default=None, repr=False)
    digest: str = ""

    @property
    def image_key(self) -> Hashable:
        """Samples with the same key show the same image, also where it lies in two files."""
        return self.digest or (self.image, self.content)

    def showing(self, other: Sample) -> Sample:
        """This sample with the image of another."""
        return replace(self, image=other.image, content=other.content, digest=other.digest)


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that was left out: its name (with the image's) and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class SampleSet:
    """What was read: usable samples in file order, their digest (texts and image bytes), and what was left out."""

    samples: tuple[Sample, ...]
    digest: str
    bad: tuple[BadSample, ...]
    source: str


def open_image(sample: Sample) -> Image.Image:
    """The RGB image of a sample.

    Raises:
        SampleError: the file changed since it was checked and is no image any more.
    """
    try:
        return decode_image(sample.content if sample.content is not None else read_content(sample.image))
    except BadImageError as error:
        raise SampleError(f"{sample.identity}: {sample.image.name} {error}. Was the file changed?") from error


def resized(sample: Sample, size: tuple[int, int]) -> Sample:
    """The sample with its image brought to height and width `size`.

    Raises:
        SampleError: as `open_image`.
    """
    image = open_image(sample).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return replace(sample, content=as_png(image), digest="")


def load_samples(
    data: Path, *, limit: int | None = None, seed: int = 0, max_bad: float = 0.01, split_prefix: bool = False
) -> SampleSet:
    """Read and check samples; every image used is decoded once.

    Args:
        data: JSONL file, LLaVA conversation JSON, image folder with captions, or Hugging Face dataset folder.
        limit: use this many samples, drawn by `seed`; file order is kept.
        max_bad: largest fraction of unusable samples that is tolerated, 0 to 1.
        split_prefix: turn captions into (first words -> rest), see `split_caption`.

    Raises:
        SampleError: unreadable data, or more bad samples than tolerated; names and reasons are in the message.
        MissingDependencyError: a Hugging Face dataset without the package `datasets`.
        ValueError: `limit` below 1 or `max_bad` outside 0..1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; accepted is 1 or more")
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad is {max_bad}; accepted is a fraction from 0 to 1")
    data = Path(data)
    records = read_records(data)
    chosen: Sequence[int] = range(len(records.rows))
    if limit is not None and limit < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, limit))
    samples, bad = [], []
    checked: Checked = {}
    for index in chosen:
        try:
            sample = _read_sample(records, index, checked)
        except (BadRecordError, BadImageError) as error:
            bad.append(_bad_sample(records, index, error))
            continue
        samples.append(split_caption(sample, seed) if split_prefix else sample)
    _refuse_too_many(bad, len(chosen), max_bad, data.name)
    return SampleSet(tuple(samples), digest_of(samples), tuple(bad), data.name)


def _read_sample(records: Records, index: int, checked: Checked) -> Sample:
    record, name = records.rows[index], records.names[index]
    if isinstance(record, BadRecordError):
        raise record
    turns, image = read_turns(record), image_of(record)
    if isinstance(image, bytes):
        path, digest = Path(name), check_image(image)
    else:
        path, digest = _check_once(records.root, image, checked)
    task, tag, vendor = (_label(record, key) for key in ("task", "tag", "vendor"))
    return Sample(path, turns, name, task or tag, vendor, image if isinstance(image, bytes) else None, digest)


def _label(record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    return None if value is None else sound_text(str(value) if isinstance(value, bool) else value, key)


def _check_once(root: Path, name: str, checked: Checked) -> tuple[Path, str]:
    """(file, digest) of an image. Several questions share one: it is found and decoded for the first of them only."""
    if name not in checked:
        try:
            path = resolve_image(root, name)
            checked[name] = path, check_image(read_content(path))
        except BadImageError as error:
            checked[name] = error
    result = checked[name]
    if isinstance(result, BadImageError):
        raise result
    return result


def _bad_sample(records: Records, index: int, error: Exception) -> BadSample:
    record, name = records.rows[index], records.names[index]
    try:
        image = name if isinstance(record, BadRecordError) else image_of(record)
    except BadRecordError:
        image = name
    named = f"{name} ({image})" if isinstance(image, str) and image != name else name
    return BadSample(printable(named), printable(str(error)))


def _refuse_too_many(bad: list[BadSample], total: int, max_bad: float, source: str) -> None:
    if total and len(bad) <= max_bad * total and len(bad) < total:
        return
    if not total:
        raise SampleError(f"{source} holds no samples.")
    listed = "; ".join(f"{one.name}: {one.reason}" for one in bad[:REPORTED])
    more = f"; and {len(bad) - REPORTED} more" if len(bad) > REPORTED else ""
    raise SampleError(
        f"{source}: {len(bad)} of {total} samples cannot be used, at most the fraction {max_bad:.4g} may be bad "
        f"({listed}{more}). Mend them or raise --max-bad-samples."
    )


def digest_of(samples: Sequence[Sample]) -> str:
    """sha256 of what was read: texts and image bytes, not where they lie."""
    total = hashlib.sha256()
    for sample in samples:
        turns = [[turn.prompt, list(turn.answers)] for turn in sample.turns]
        line = json.dumps([sample.digest, turns, sample.task, sample.vendor], ensure_ascii=True, separators=(",", ":"))
        total.update(line.encode() + b"\n")
    return total.hexdigest()


def split_caption(sample: Sample, seed: int) -> Sample:
    """Prefix language modelling: of n caption words the first c ~ UniformInt[1, n // 2] are given, the rest is asked.

    UKMP's calibration and recovery format for BLIP-2. Drawn from `seed` and the sample alone, so order and batch size
    do not matter. A caption of one word keeps an empty prompt; turns with a question are left as they are.
    """
    draw = random.Random(f"{seed}:{sample.identity}")
    turns = []
    for turn in sample.turns:
        words = turn.target.split()
        if turn.prompt or len(words) < 2:
            turns.append(turn)
            continue
        cut = draw.randint(1, len(words) // 2)
        turns.append(Turn(" ".join(words[:cut]), (" ".join(words[cut:]),)))
    return replace(sample, turns=tuple(turns))


def batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Consecutive batches; the order is kept and the last one may be smaller.

    Raises:
        ValueError: `batch_size` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; accepted is 1 or more")
    return iter([list(samples[start : start + batch_size]) for start in range(0, len(samples), batch_size)])
