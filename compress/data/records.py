"""The formats samples come in: JSONL, LLaVA conversation JSON, an image folder with captions, a Hugging Face dataset.

Every format gives the same plain records (dictionaries that name an image and texts); `read_turns` reads the texts.
"""

from __future__ import annotations

import csv
import io
import json
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any  # records are JSON that somebody else wrote

from slimvlm.compress.data.images import SUFFIXES
from slimvlm.compress.errors import LONGEST, MissingDependencyError, SampleError, foreign, one_line

IMAGE_KEYS = ("image", "file_name", "image_path")
PROMPT_KEYS = ("question", "prompt")
ANSWER_KEYS = ("answer", "caption", "text")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
CAPTION_FILES = ("metadata.jsonl", "metadata.csv", "captions.jsonl", "captions.json", "captions.csv", "captions.txt")
LISTS = (".jsonl", ".ndjson", ".json")
PLACEHOLDER = "<image>"
ACCEPTED = "a .jsonl or .json file, a folder of images with captions, or a Hugging Face dataset folder"


class BadRecordError(ValueError):
    """One record cannot be used (no image, empty answer, an unknown form); the message is the reason."""


Row = dict[str, Any] | BadRecordError  # what JSON, a table or a caption file gives, before anything is known of it


@dataclass(frozen=True, slots=True)
class Turn:
    """One question (empty: describe the image) and its accepted answers, repeated as often as annotators gave them."""

    prompt: str
    answers: tuple[str, ...]

    @property
    def target(self) -> str:
        """The answer that is taught: the most frequent one, the first of equals."""
        return Counter(self.answers).most_common(1)[0][0]


@dataclass(frozen=True, slots=True)
class Records:
    """Raw records with their names (`file:line`), and the folder in which their images lie.

    Where a line is no record, the reason stands in its place: it is one bad sample, not the end of the file.
    """

    root: Path
    rows: Sequence[Row]
    names: Sequence[str]


def _first(record: dict[str, Any], keys: Iterable[str]) -> Any:
    return next((record[key] for key in keys if record.get(key) is not None), None)


def image_of(record: dict[str, Any]) -> str | bytes:
    """The image of a record: the name of its file, or the content itself (of a Hugging Face dataset).

    Raises:
        BadRecordError: it names none, or in no known form.
    """
    image = _first(record, IMAGE_KEYS)
    if image is None or image == "":
        raise BadRecordError("has no image")
    if isinstance(image, list):
        raise BadRecordError(f"names {len(image)} images; one image per sample is supported")
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if not isinstance(image, str | bytes):
        raise BadRecordError(f"the image is {_shown(image)}; accepted is the name of a file")
    return image


def sound_text(value: object, what: str) -> str:
    """The text of a record's value, without blanks around it; numbers are texts too.

    Raises:
        BadRecordError: it is none, or holds half a character (a lone surrogate), which no tokenizer takes.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not isinstance(value, str) and not number:
        raise BadRecordError(f"the {what} is {_shown(value)}; accepted is a text")
    text = str(value).strip()
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRecordError(f"the {what} {_shown(text)} holds half a character; accepted is text that UTF-8 can write")
    return text


def printable(text: str) -> str:
    """A text that every terminal and file takes, of at most LONGEST characters."""
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _shown(value: object) -> str:
    """Short, however long or deep it is."""
    return printable(reprlib.repr(value))


def _turn(prompt: str, answers: Iterable[str]) -> Turn:
    kept = tuple(answers)
    if not kept or not all(kept):
        raise BadRecordError("has an empty answer or caption")
    return Turn(prompt, kept)


def _conversation(turns: Sequence[dict[str, Any]]) -> tuple[Turn, ...]:
    """LLaVA's list of {from, value} or the chat form {role, content}: user and assistant in turn."""
    said: list[str] = []
    for entry in turns:
        asked = entry.get("from", entry.get("role"))
        role = ROLES.get(asked) if isinstance(asked, str) else None
        if role != ("user", "assistant")[len(said) % 2]:
            raise BadRecordError(
                f"turn {len(said)} comes from {_shown(asked)}; human (user) and gpt (assistant) must alternate"
            )
        said.append(sound_text(entry.get("value", entry.get("content")), "turn").replace(PLACEHOLDER, "").strip())
    if not said or len(said) % 2:
        raise BadRecordError(f"a conversation needs an answer to every question; it has {len(said)} turns")
    return tuple(_turn(prompt, (answer,)) for prompt, answer in zip(said[::2], said[1::2], strict=True))


def _question(record: dict[str, Any]) -> Turn:
    prompt = sound_text(_first(record, PROMPT_KEYS) or "", "question").replace(PLACEHOLDER, "").strip()
    single, several = _first(record, ANSWER_KEYS), record.get("answers")
    if single is None and several is None:
        keys = ", ".join((*ANSWER_KEYS, "answers", "turns", "conversations"))
        raise BadRecordError(f"has no answer; accepted is one of the keys {keys}. It has: {_shown(sorted(record))}")
    if isinstance(several, str) or not isinstance(several, (list, tuple, type(None))):
        raise BadRecordError(f"'answers' is {_shown(several)}; accepted is a list of texts")
    answers = [sound_text(a["answer"] if isinstance(a, dict) and "answer" in a else a, "answer") for a in several or ()]
    if single is not None and (text := sound_text(single, "answer")) not in answers:
        answers.insert(0, text)
    return _turn(prompt, answers)


def read_turns(record: dict[str, Any]) -> tuple[Turn, ...]:
    """The questions and answers of one record.

    Raises:
        BadRecordError: an answer is empty, or the record has a form that no format allows.
    """
    turns = _first(record, ("conversations", "turns", "messages"))
    if turns is None:
        return (_question(record),)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecordError(f"turns must be a list of objects, not {_shown(turns)}")
    if turns and "from" not in turns[0] and "role" not in turns[0]:
        return tuple(_question(turn) for turn in turns)
    return _conversation(turns)


def _by_line(parsed: Callable[[str], Row], file: Path) -> Records:
    """A record a line, empty lines left out."""
    numbered = [(number, line) for number, line in enumerate(_lines(file), 1) if line.strip()]
    rows = [parsed(line) for _, line in numbered]
    return Records(file.parent, rows, [f"{file.name}:{number}" for number, _ in numbered])


def _parsed(line: str) -> Row:
    try:
        return _record(json.loads(line))
    except (ValueError, RecursionError) as error:
        return BadRecordError(f"is not valid JSON ({one_line(error)}); accepted is one object a line")


def _captioned(line: str) -> Row:
    """Image TAB caption."""
    image, tab, caption = line.partition("\t")
    return {"image": image, "caption": caption} if tab else BadRecordError("has no tab; accepted is: image TAB caption")


def _record(row: object) -> Row:
    return row if isinstance(row, dict) else BadRecordError(f"is {_shown(row)}; accepted is an object")


def _content(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SampleError(f"{file.name} cannot be read ({error}); accepted is a UTF-8 text file.") from error


def _lines(file: Path) -> list[str]:
    return _content(file).split("\n")


def _json(file: Path) -> Records:
    try:
        content = json.loads(_content(file))
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{file.name} is not valid JSON ({error}); accepted is a list of records.") from error
    if isinstance(content, dict) and content and all(isinstance(value, str) for value in content.values()):
        content = [{"image": image, "caption": caption} for image, caption in content.items()]
    if not isinstance(content, list):
        raise SampleError(f"{file.name} must hold a list of records (objects), or one object of image: caption.")
    return Records(file.parent, list(map(_record, content)), [f"{file.name}[{index}]" for index in range(len(content))])


def _csv(file: Path) -> Records:
    """Comma-separated with a header line; values may hold line breaks."""
    reader = csv.reader(io.StringIO(_content(file), newline=""))
    rows: list[Row] = []
    names: list[str] = []
    header: list[str] | None = None
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return Records(file.parent, rows, names)
        except csv.Error as error:
            row, found = [], BadRecordError(f"cannot be read ({error})")
        else:
            if header is None or not row:  # the first line, or an empty one
                header = header or row or None
                continue
            found = BadRecordError(f"has {len(row)} values; the header names {len(header)}")
        rows.append(dict(zip(header, row, strict=True)) if header and len(row) == len(header) else found)
        names.append(f"{file.name}:{reader.line_num}")


_jsonl = partial(_by_line, _parsed)
READERS: Mapping[str, Callable[[Path], Records]] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".txt": partial(_by_line, _captioned)
}  # fmt: skip


def _folder(folder: Path) -> Records:
    for name in CAPTION_FILES:
        if (folder / name).is_file():
            return READERS[(folder / name).suffix](folder / name)
    lists = sorted(path for path in folder.iterdir() if path.suffix in LISTS and path.is_file())
    if len(lists) == 1:
        return READERS[lists[0].suffix](lists[0])
    if lists:
        raise SampleError(
            f"{folder.name} holds several sample files; give one of: {', '.join(path.name for path in lists)}."
        )
    rows, names = [], []
    for image in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        caption = image.with_suffix(".txt")
        name = image.relative_to(folder).as_posix()
        rows.append({"image": name, "caption": "\n".join(_lines(caption)) if caption.is_file() else ""})
        names.append(name)
    if not rows:
        raise SampleError(f"{folder.name} holds no images and no sample file; accepted is {ACCEPTED}.")
    return Records(folder, rows, names)


def _dataset(folder: Path) -> Records:
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        raise SampleError(f"{folder.name} holds several splits; give the folder of one of them: {splits}.")
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            f"{folder.name} is a Hugging Face dataset and needs the package `datasets`: pip install 'slimvlm[data]'"
        ) from None
    with foreign(f"{folder.name} cannot be read as a Hugging Face dataset", "save it again", SampleError):
        table = datasets.load_from_disk(str(folder))
        for column, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(column, datasets.Image(decode=False))
    return Records(folder, table, [f"{folder.name}[{index}]" for index in range(len(table))])


def read_records(data: Path) -> Records:
    """The raw records of a file or folder, in order.

    Raises:
        SampleError: nothing readable is there; the message says what is accepted.
        MissingDependencyError: a Hugging Face dataset folder without the package `datasets`.
    """
    if data.is_file() and data.suffix in READERS:
        return READERS[data.suffix](data)
    if data.is_dir():
        is_dataset = any((data / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
        return _dataset(data) if is_dataset else _folder(data)
    raise SampleError(f"{data} is not a file or folder of samples; accepted is {ACCEPTED}.")
