"""The formats samples come in: JSONL, LLaVA conversation JSON, an image folder with captions, a Hugging Face dataset.

Every format gives the same plain records (dictionaries that name an image and texts); `read_turns` reads the texts.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimvlm.compress.errors import MissingDependencyError, SampleError
from slimvlm.compress.images import SUFFIXES

IMAGE_KEYS = ("image", "file_name", "image_path")
PROMPT_KEYS = ("question", "prompt")
ANSWER_KEYS = ("answer", "caption", "text")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
CAPTION_FILES = ("metadata.jsonl", "metadata.csv", "captions.jsonl", "captions.json", "captions.csv", "captions.txt")
PLACEHOLDER = "<image>"
ACCEPTED = "a .jsonl or .json file, a folder of images with captions, or a Hugging Face dataset folder"


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
    """Raw records with their names (`file:line`), and the folder in which their images lie."""

    root: Path
    rows: Sequence[dict[str, Any]]
    names: Sequence[str]


class BadRecordError(ValueError):
    """One record cannot be used (no image, empty answer); the message is the reason."""


def _first(record: dict[str, Any], keys: Iterable[str]) -> Any:
    return next((record[key] for key in keys if record.get(key) is not None), None)


def image_of(record: dict[str, Any]) -> Any:
    """The image entry of a record.

    Raises:
        BadRecordError: it names none.
    """
    image = _first(record, IMAGE_KEYS)
    if image is None or image == "":
        raise BadRecordError("has no image")
    if isinstance(image, list):
        raise BadRecordError(f"names {len(image)} images; one image per sample is supported")
    return image


def _text(value: Any, name: str, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise SampleError(f"{name}: the {what} is {value!r}; accepted is a text. Correct the record.")
    return str(value).strip()


def _turn(prompt: str, answers: Iterable[str]) -> Turn:
    kept = tuple(answers)
    if not kept or not all(kept):
        raise BadRecordError("has an empty answer or caption")
    return Turn(prompt, kept)


def _conversation(turns: Any, name: str) -> tuple[Turn, ...]:
    """LLaVA's list of {from, value} or the chat form {role, content}: user and assistant in turn."""
    said: list[str] = []
    for entry in turns:
        role = ROLES.get(entry.get("from", entry.get("role")))
        if role != ("user", "assistant")[len(said) % 2]:
            asked = entry.get("from", entry.get("role"))
            raise SampleError(
                f"{name}: turn {len(said)} comes from {asked!r}; human (user) and gpt (assistant) must alternate."
            )
        said.append(_text(entry.get("value", entry.get("content")), name, "turn").replace(PLACEHOLDER, "").strip())
    if not said or len(said) % 2:
        raise SampleError(f"{name}: a conversation needs an answer to every question; it has {len(said)} turns.")
    return tuple(_turn(prompt, (answer,)) for prompt, answer in zip(said[::2], said[1::2], strict=True))


def _question(record: dict[str, Any], name: str) -> Turn:
    prompt = _text(_first(record, PROMPT_KEYS) or "", name, "question").replace(PLACEHOLDER, "").strip()
    single, several = _first(record, ANSWER_KEYS), record.get("answers")
    if single is None and several is None:
        keys = ", ".join((*ANSWER_KEYS, "answers", "turns", "conversations"))
        raise SampleError(
            f"{name}: no answer; accepted is one of the keys {keys}. It has: {', '.join(sorted(record))}."
        )
    if isinstance(several, str) or not isinstance(several, (list, tuple, type(None))):
        raise SampleError(f"{name}: 'answers' is {several!r}; accepted is a list of texts. Correct the record.")
    answers = [
        _text(a["answer"] if isinstance(a, dict) and "answer" in a else a, name, "answer") for a in several or ()
    ]
    if single is not None and (text := _text(single, name, "answer")) not in answers:
        answers.insert(0, text)
    return _turn(prompt, answers)


def read_turns(record: dict[str, Any], name: str) -> tuple[Turn, ...]:
    """The questions and answers of one record.

    Raises:
        SampleError: the record has a form that no format allows; the message names it.
        BadRecordError: an answer is empty.
    """
    turns = _first(record, ("conversations", "turns", "messages"))
    if turns is None:
        return (_question(record, name),)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise SampleError(f"{name}: turns must be a list of objects, not {turns!r}. Correct the record.")
    if turns and "from" not in turns[0] and "role" not in turns[0]:
        return tuple(_question(turn, f"{name}, turn {index}") for index, turn in enumerate(turns))
    return _conversation(turns, name)


def _jsonl(file: Path) -> Records:
    rows, names = [], []
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        name = f"{file.name}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SampleError(f"{name} is not valid JSON ({error}); accepted is one object a line.") from error
        if not isinstance(row, dict):
            raise SampleError(f"{name} holds {type(row).__name__}; accepted is one object a line.")
        rows.append(row)
        names.append(name)
    return Records(file.parent, rows, names)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SampleError(f"{file.name} cannot be read ({error}); accepted is a UTF-8 text file.") from error


def _json(file: Path) -> Records:
    try:
        content = json.loads("\n".join(_lines(file)))
    except ValueError as error:
        raise SampleError(f"{file.name} is not valid JSON ({error}); accepted is a list of records.") from error
    if isinstance(content, dict) and content and all(isinstance(value, str) for value in content.values()):
        content = [{"image": image, "caption": caption} for image, caption in content.items()]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise SampleError(f"{file.name} must hold a list of records (objects), or one object of image: caption.")
    return Records(file.parent, content, [f"{file.name}[{index}]" for index in range(len(content))])


def _table(file: Path) -> Records:
    """Comma-separated with a header line, or image TAB caption without one (.txt)."""
    lines = _lines(file)
    if file.suffix == ".csv":
        rows = [dict(row) for row in csv.DictReader(lines)]
        return Records(file.parent, rows, [f"{file.name}:{number}" for number in range(2, len(rows) + 2)])
    rows, names = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        image, tab, caption = line.partition("\t")
        if not tab:
            raise SampleError(f"{file.name}:{number} has no tab; accepted is: image TAB caption.")
        rows.append({"image": image, "caption": caption})
        names.append(f"{file.name}:{number}")
    return Records(file.parent, rows, names)


READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _table, ".txt": _table}


def _folder(folder: Path) -> Records:
    for name in CAPTION_FILES:
        if (folder / name).is_file():
            return READERS[(folder / name).suffix](folder / name)
    lists = sorted(path for path in folder.iterdir() if path.suffix in (".jsonl", ".ndjson", ".json"))
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
