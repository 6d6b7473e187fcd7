"""Measure a demo model on saved samples by generation, and write the model card's table.

`python -m slimvlm.demo.evaluate [--model M] [--samples S] [--limit N]` prints one JSON object; with `--markdown FILE`
the table of such an object, as it stands in the card.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from slimvlm.demo import MODEL, SAMPLES
from slimvlm.demo.concepts import TASKS

BATCH = 64
Sample = dict[str, str]
"""One line of a sample file: image, question, answer, task, vendor."""


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--samples", type=Path, default=SAMPLES)
    parser.add_argument("--limit", type=int, default=None, help="only the first questions of every split")
    parser.add_argument("--markdown", type=Path, default=None, help="print the table of this report instead")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text(encoding="utf-8"))))
        return
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    print(json.dumps(report(model, processor, options.samples, options.limit), indent=2))


def report(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Per cent of exact answers per task and their mean: `test`, `blind`, `vendor`, `photos` (and test by vendor)."""
    test = read(folder, "test")[:limit]
    right = exact(model, processor, folder, test)
    table = {"test": by_task(test, right)}
    for vendor in sorted({sample["vendor"] for sample in test}):
        part = [index for index, sample in enumerate(test) if sample["vendor"] == vendor]
        table[f"test {vendor}"] = by_task([test[index] for index in part], [right[index] for index in part])
    table["blind"] = by_task(test, exact(model, processor, folder, blind(test)))
    for split in ("vendor", "photos"):
        samples = read(folder, split)[:limit]
        table[split] = by_task(samples, exact(model, processor, folder, samples))
    return table


def read(folder: Path, split: str) -> list[Sample]:
    """The samples of `split`; their image paths are relative to `folder`."""
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def blind(samples: Sequence[Sample]) -> list[Sample]:
    """The same questions about somebody else's picture: images move half-way round the split."""
    images = list(dict.fromkeys(sample["image"] for sample in samples))
    other = dict(zip(images, images[len(images) // 2 :] + images[: len(images) // 2], strict=True))
    return [{**sample, "image": other[sample["image"]]} for sample in samples]


@torch.no_grad()
def exact(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path, samples: Sequence[Sample]
) -> list[bool]:
    """Whether greedy generation gives exactly the answer, sample by sample."""
    right = []
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        images = [Image.open(folder / sample["image"]).convert("RGB") for sample in part]
        inputs = processor(
            images=images, text=[prompt(processor, s["question"]) for s in part], padding=True, return_tensors="pt"
        )
        # transformers types `self` as a protocol that none of its own models fulfils
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)  # type: ignore[misc]
        answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += [answer.strip() == sample["answer"] for answer, sample in zip(answers, part, strict=True)]
    return right


def prompt(processor: LlavaProcessor, question: str) -> str:
    """The question about one image as the model was taught to read it."""
    message: dict[str, Any] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return processor.apply_chat_template([message], add_generation_prompt=True)


def by_task(samples: Sequence[Sample], right: Sequence[bool]) -> dict[str, float]:
    """Per cent right for every task, their mean, and how many questions and images that was."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for sample, answer in zip(samples, right, strict=True):
        hits[sample["task"]].append(answer)
    scores = {task: round(100 * sum(values) / len(values), 1) for task, values in sorted(hits.items())}
    mean = round(sum(100 * sum(values) / len(values) for values in hits.values()) / len(hits), 1)
    return {"mean": mean, **scores, "questions": len(samples), "images": len({s["image"] for s in samples})}


def markdown(table: dict[str, dict[str, float]]) -> str:
    """One row per split, one column per task."""
    columns = ["mean", *TASKS, "questions", "images"]
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *(str(row.get(column, "")) for column in columns)] for name, row in table.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
