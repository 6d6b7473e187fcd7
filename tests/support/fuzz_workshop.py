"""Sound files the cases begin from: made once, copied for every case."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from tiny_models import tiny_model
from tiny_processors import tiny_image, tiny_processor

FAMILIES = (
    *("llava", "llava_next", "smolvlm", "idefics3", "paligemma", "blip2_opt", "blip2_t5", "clip", "siglip"),
    *("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_dinov2"),
)
WHOLE = ("llava", "blip2_t5", "clip")  # of these there is an export and a run
RECORDS = (
    {"question": "what is it", "answer": "red fox", "task": "kind"},
    {"question": "how many", "answers": ["two", "two", "three"], "task": "count", "vendor": "a"},
    {"caption": "a red house with tree"},
    {"question": "what color is it", "answer": "blue"},
)
SHORT = shlex.split(
    "--rounds 1 --samples 4 --eval-samples 4 --ratio 0.3 --batch-size 4 --no-profile --device cpu --quiet"
)
TRAINING = shlex.split("--steps 2 --train-batch-size 2 --validation-samples 2 --rank 2 --recall-rank 2")


def build(base: Path, families: Sequence[str] = FAMILIES) -> Path:
    """Models of `families`, samples in every form, a finished run and an export of the WHOLE ones among them."""
    (base / "models").mkdir(parents=True)
    _write_data(base / "data")
    for family in families:
        _write_model(base / "models" / family, family)
    for family in (name for name in WHOLE if name in families):
        _write_run(base, family)
    return base


def lay_out(base: Path, folder: Path, family: str, parts: Sequence[str]) -> None:
    """What one case finds in its folder: `model`, `data`, and of `run`, `exported`, `plan.json` those in `parts`."""
    shutil.copytree(base / "models" / family, folder / "model")
    shutil.copytree(base / "data", folder / "data")
    for part in parts:
        source = base / part / family
        if source.is_dir():
            shutil.copytree(source, folder / part)
        elif source.with_suffix(".json").is_file():
            shutil.copyfile(source.with_suffix(".json"), folder / f"{part}.json")
    for name in ("empty", "folder.json"):
        (folder / name).mkdir()
    for name in ("empty.json", "notes.txt", os.fsdecode(b"\xff.jsonl")):
        (folder / name).write_text("" if name == "empty.json" else "mine\n")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nothing")
    (folder / "link").symlink_to("model")
    os.mkfifo(folder / "pipe")


def _write_model(folder: Path, family: str) -> None:
    tiny_model(family).model.save_pretrained(folder)
    processor = tiny_processor(family)
    try:
        processor.save_pretrained(folder)
    except AttributeError:  # the video part that needs torchvision is not there to be saved
        for part in (processor.tokenizer, processor.image_processor):
            part.save_pretrained(folder)


def _write_data(folder: Path) -> None:
    folder.mkdir()
    lines = []
    for number in range(16):
        image = f"{number % 8}.png"
        if number < 8:
            tiny_image(seed=number).save(folder / image)
        lines.append({"image": image, **RECORDS[number % len(RECORDS)]})
    texts = [json.dumps(line) + "\n" for line in lines]
    (folder / "samples.jsonl").write_text("".join(texts))
    (folder / "samples.json").write_text(json.dumps(lines))
    (folder / "talks.json").write_text(json.dumps([_talk(line["image"]) for line in lines]))
    (folder / "samples.csv").write_text("image,caption\n" + "".join(f"{line['image']},a red fox\n" for line in lines))
    (folder / "images").mkdir()
    for number in range(4):
        tiny_image(seed=number).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text("a red fox")


def _talk(image: str) -> dict[str, object]:
    said = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": "red"}]
    return {"image": image, "conversations": said}


def _write_run(base: Path, family: str) -> None:
    from slimvlm.cli import main

    dual = family == "clip"
    model, data = str(base / "models" / family), str(base / "data" / "samples.jsonl")
    recovery = ["--recover", "none"] if dual else ["--recover", "sft", *TRAINING]
    words = ["compress", model, str(base / "run" / family), "--data", data, *SHORT, *recovery, "--export", "none"]
    main.main(words, standalone_mode=False)
    (base / "plan").mkdir(exist_ok=True)
    shutil.copyfile(base / "run" / family / "plan.json", base / "plan" / f"{family}.json")
    graphs = shlex.split("--exporter torchscript --samples 1 --max-new-tokens 2 --format onnx,torchscript --quiet")
    main.main(["export", model, str(base / "exported" / family), *graphs], standalone_mode=False)
