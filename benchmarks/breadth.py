"""How far the job comes with every model type that transformers maps to image-text-to-text, on tiny random models.

    python benchmarks/breadth.py                 the types without a record; Ctrl-C and go on later
    python benchmarks/breadth.py llava fuyu      these anew
    python benchmarks/breadth.py --again         all anew (some minutes)

Each type runs in a process of its own, with bounds on time and memory: build, forward, inspect, cut a third (masked =
cut), reload in three ways, evaluate, export to ONNX (tokens equal). The records are results/types.json, which
docs/families.md shows. One thread.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_types.job import work
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TYPES

RESULTS = Path(__file__).parent / "results" / "types.json"
SECONDS, BYTES = 120, 6 * 2**30
Records = dict[str, dict[str, Any]]


def attempt(model_type: str) -> dict[str, Any]:
    """The record of a type, made in a process of its own."""
    fork = multiprocessing.get_context("fork")  # everything is imported, and no thread runs
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=_work, args=(model_type, there))
    process.start()
    there.close()
    record: dict[str, Any] = {"type": model_type, "class": TYPES[model_type], "stages": {}}
    try:
        if here.poll(SECONDS):
            return here.recv()
        record["stages"]["build"] = f"it takes longer than {SECONDS} s"
    except EOFError:
        record["stages"]["build"] = "its process ended without a word (memory?)"
    finally:
        process.kill()
        process.join()
    return record


def _work(model_type: str, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    answer.send(work(model_type))


def line(record: dict[str, Any]) -> str:
    """The last stage, and why it is the last."""
    stage, said = list(record["stages"].items())[-1]
    return f"{record['type']:24} {stage:9} {said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", choices=[[], *TYPES])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    records: Records = json.loads(asked.results.read_text(encoding="utf-8")) if asked.results.exists() else {}
    for model_type in asked.types or TYPES:
        if asked.types or asked.again or model_type not in records:
            records[model_type] = attempt(model_type)
            print(line(records[model_type]), flush=True)
            ordered = {name: records[name] for name in sorted(records)}
            asked.results.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
