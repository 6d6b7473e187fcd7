"""What a value is replaced by: in a JSON document, on the command line, in the environment."""

from __future__ import annotations

import shlex
from random import Random
from typing import Any

DEEP = 3000  # levels: more than the interpreter's stack


def nested(levels: int, opening: str = "[", closing: str = "]") -> str:
    """JSON text of so many lists or objects in one another."""
    return opening * levels + closing * levels


# Of JSON; text, because nobody's writer would write some of these.
JSON_TEXTS = (
    *("null", "true", "false", "0", "1", "-1", "2", "3", "7", "0.5", "-0.0", "1e-30", "1e308", "NaN", "Infinity"),
    *("-Infinity", str(2**31), str(-(2**31)), str(2**63), str(2**64), "1" * 5000, "1e999"),
    *('""', '" "', '"x"', '"0"', '"nan"', '"\\ud800"', '"\\u0000"', '"../../x"', '"/"', '"."', '"' + "y" * 70000 + '"'),
    *('"auto"', '"float32"', '"torch.float64"', '"<image>"', '"llava"', '"<script>"', '"{{ 1/0 }}"'),
    *("[]", "{}", "[[]]", "[null]", "[1]", "[-1]", '["x"]', "[1,2,3,4]", '{"a":1}', '{"":null}', "[NaN]"),
    *(nested(50), nested(DEEP), nested(DEEP, '{"a":', "}").replace(":}", ":0}")),
)

WORDS = (
    *("", " ", "0", "1", "2", "-1", "-0", "0.0", "0.5", "1.0", "nan", "NaN", "-nan", "inf", "-inf", "1e400", "1e-400"),
    *("1e30", "-1e30", str(2**31 - 1), str(2**31), str(2**32), str(2**63), str(2**64), "1" * 5000, "0x10", "1_0"),
    *(
        "\u0661",
        "½",
        "1,5",
        "None",
        "none",
        "null",
        "true",
        "auto",
        "x",
        "X" * 300,
        "Y" * 100_000,
        "\x01",
        "\udcff",
        "é",
    ),
    *("=", "a=", "=1", "vision=nan", "vision=0.3", "language=1e-400", "attention=0.1", "mlp=inf", "x=0.5"),
    *(",", ",,", "1,", "1,1", "1,-1", "1,nan", "onnx", "onnx,", "torch", "torch,onnx", "pt2,torchscript", "onnx:int8"),
    *("onnx:", ":", "torch:int8", "0x0", "1x1", "16x16", "99999x99999", "1x" + "9" * 5000, "8GB", "0GB", "1e3GB"),
    *("nanGB", "1B", "9" * 400 + "TB", "1YB", "cuda", "cuda:0", "cuda:3", "cuda:" + "9" * 30, "cpu", "cpu:1", "meta"),
    *("sft", "lpd", "kl", "sft+hidden", "0.5*sft", "nan*sft", "inf*kl", "sft+sft", "1e308*sft", "-1*kl", "*sft", "+"),
    *("lpd+sft", "0*sft", "--", "-", "-x", "--json", "@file", "$HOME", "%s", "{0}", "\n", "a\nb", "ukmi", "full"),
)
# With these a sound command runs for hours: asked for, not a hang.
LONG = frozenset(("1e30", str(2**31 - 1), str(2**31), str(2**32), str(2**63), str(2**64), "1e308"))
LASTING = frozenset(
    shlex.split(
        "--steps --epochs --rounds --accumulate --samples --max-new-tokens --new-tokens --prompt-tokens --batch-sizes "
        "--cell-seconds --validation-samples --teacher-cache"
    )
)

ENVIRONMENT = {
    "WORLD_SIZE": ("x", "", "-1", "0", "2", "1.5", "nan", "9" * 30),
    "RANK": ("x", "", "-1", "7", "9" * 30),
    "LOCAL_RANK": ("x", "", "-1", "99", "9" * 30),
    "MASTER_PORT": ("x", "-1", "99999999"),
    "OMP_NUM_THREADS": ("x", "", "-1", "0", "9" * 30),
    "COLUMNS": ("x", "0", "-5", "9" * 30),
    "TMPDIR": ("/nonexistent", "/dev/null", "\udcff"),
    "HOME": ("", "/nonexistent", "\udcff"),
    "TERM": ("", "\udcff"),
    "ACCELERATE_USE_FSDP": ("x", "true"),
    "TRANSFORMERS_VERBOSITY": ("x",),
    "SLIMVLM_KERNELS": ("x", ""),
}

PATHS = (
    *(
        "",
        " ",
        ".",
        "..",
        "./.",
        "/",
        "-",
        "~",
        "~nobody/x",
        "nothing",
        "nothing/here",
        "no such/../thing",
        "/dev/null",
    ),
    *("/dev/null/x", "a" * 300, "a/" * 3000, "\udcff", "\udcff/x", "x\udcffy.json", "\n", "é ü", "owner/model"),
    *("owner/../model", "a/b/c", "hf://a/b", "https://example.org/a/b", "C:\\x", "-x", "--data", "loop", "dangling"),
    *("pipe", "empty", "empty.json", "folder.json", "notes.txt", "notes.txt/x", "empty/new", "\udcff.jsonl", "link"),
)


def scalar(random: Random) -> str:
    """JSON text of any value."""
    return random.choice(JSON_TEXTS)


def word(random: Random, flag: str, own: list[str]) -> str:
    """A value for the option `flag`; `own`: what its type knows."""
    while True:
        value = random.choice(own) if own and random.random() < 0.3 else random.choice(WORDS)
        if not (flag in LASTING and value in LONG):
            return value


def change(document: Any, random: Random) -> str:
    """JSON text of `document` with one or two values replaced, taken away, doubled or renamed."""
    marks: dict[str, str] = {}
    for number in range(random.choice((1, 1, 1, 2))):
        document = _change_once(document, random, f"@{number}@", marks)
    from json import dumps

    text = dumps(document)
    for mark, put in marks.items():
        text = text.replace(f'"{mark}"', put)
    return text


def _change_once(document: Any, random: Random, mark: str, marks: dict[str, str]) -> Any:
    """A copy; what only text can say stands in it as `mark`."""
    places = list(_places(document))
    if not places or random.random() < 0.03:
        marks[mark] = scalar(random)
        return mark
    place = random.choice(places)
    return _replace(document, list(place), random, mark, marks)


def _places(document: Any, before: tuple[Any, ...] = ()) -> Any:
    items = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list) and len(document) < 50
        else ()
    )
    for key, value in items:
        yield (*before, key)
        yield from _places(value, (*before, key))


def _replace(document: Any, place: list[Any], random: Random, mark: str, marks: dict[str, str]) -> Any:
    copied = dict(document) if isinstance(document, dict) else list(document)
    key = place.pop(0)
    if place:
        copied[key] = _replace(copied[key], place, random, mark, marks)
        return copied
    how = random.random()
    if how < 0.25:
        del copied[key]
    elif how < 0.32 and isinstance(copied[key], int | float) and not isinstance(copied[key], bool):
        copied[key] = copied[key] * random.choice((-1, 2, 3, 0.5, 1000))
    elif how < 0.38 and isinstance(copied, dict):
        copied[key + "_"] = copied.pop(key)
    elif how < 0.42:
        others = list(copied.values()) if isinstance(copied, dict) else copied
        copied[key] = random.choice(others)
    else:
        copied[key], marks[mark] = mark, scalar(random)
    return copied
