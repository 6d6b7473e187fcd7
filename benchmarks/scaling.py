"""Seconds of what several processes share, by 1, 2 and 4 of one thread each, on a CPU.

    python benchmarks/scaling.py [--counts 1 2 4] [--steps 20] [--output benchmarks/results/scaling.json]

The same work for all (strong scaling): the calibration of the default criterion with the model in memory and block by
block, the refit, block-wise recovery and a training of the whole, as `slimvlm compress` would do them, with the model
of `memory.py`: LLaVA with 157 M random weights, 32 samples, batches of 8 to train on. More processes than cores cannot
be faster; how many cores there are stands in the result. Every number is the first process's, from where all begin to
where all are done; `read_bytes` is what it asked the system for during the calibration block by block.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from memory import build

from slimvlm.compress import processes
from slimvlm.compress.allocate.budget import Budget, plan_units
from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.data.collate import collated, collator_of
from slimvlm.compress.data.samples import Sample, load_samples
from slimvlm.compress.files.writing import installed_versions
from slimvlm.compress.models.checkpoint import Loaded, load_model, stream_model
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.options import LowRank, TrainOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.recovery.adapters.recall import attach
from slimvlm.compress.recovery.blockwise.blocks import Course, learn_blocks
from slimvlm.compress.recovery.blockwise.lessons import WholeTeacher, lessons_of
from slimvlm.compress.recovery.distillation.distiller import Distiller
from slimvlm.compress.recovery.distillation.recipe import make_stages, parse_recipe
from slimvlm.compress.recovery.training.stepping import Task
from slimvlm.compress.recovery.training.trainer import train
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.compensation import COMPENSATIONS
from slimvlm.compress.statistics.collect import collect
from slimvlm.demo import SAMPLES

COUNTS, STEPS, BLOCK_STEPS = (1, 2, 4), 20, 8
CALIBRATED, BATCH, TRAINED_AT_ONCE = 32, 2, 8  # samples
Seconds = dict[str, float]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    cores = psutil.cpu_count(logical=False)
    setting = {"cores": cores, "load_before": os.getloadavg()[0], "steps": asked.steps, "samples": CALIBRATED}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder) / "model", torch.float32)
        for count in asked.counts:
            seconds = together(Path(folder), count, asked.steps)
            rows.append({"processes": count, "read_bytes": seconds.pop("read_bytes"), "seconds": seconds})
            said = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
            print(f"{count} processes of 1 thread on {cores} cores: {said}", flush=True)
    result = {"setting": setting, "versions": installed_versions(), "rows": rows}
    if asked.output:
        asked.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(setting))


def together(folder: Path, count: int, steps: int) -> Seconds:
    """What the first of so many processes measures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo"}
    words = [sys.executable, __file__, "--worker", str(folder), str(count), str(steps)]
    with ExitStack() as running:
        workers = [
            running.enter_context(subprocess.Popen(words, env={**shared, "RANK": rank, "LOCAL_RANK": rank}))
            for rank in map(str, range(count))
        ]
        if any([worker.wait() for worker in workers]):
            raise SystemExit(f"{count} processes failed; see what they said")
    seconds: Seconds = json.loads((folder / f"{count}.json").read_text())
    return seconds


def work(folder: Path, count: int, steps: int) -> None:
    """The share of one process."""
    torch.set_num_threads(1)
    seconds: Seconds = {}
    with processes.joined():
        before = _read_bytes()
        _calibrate(stream_model(folder / "model"), "calibration, block by block", seconds)
        seconds["read_bytes"] = _read_bytes() - before
        plan = _calibrate(load_model(folder / "model"), "calibration", seconds)
        student = load_model(folder / "model")
        _refit(student, plan, seconds)
        options = TrainOptions(
            steps=steps, train_batch_size=TRAINED_AT_ONCE, learning_rate=1e-4, schedule="constant", warmup=0, clip=1.0,
            reset_optimizer=False, precision="no", validate_every=steps,
        )  # fmt: skip
        _teach_blocks(folder, student, plan, replace(options, steps=BLOCK_STEPS), seconds)
        recipe = parse_recipe("sft")
        attach(student.model, plan, None, LowRank(recall=False, dropout=0.0))
        distiller = Distiller(student.model, None, student.family, recipe)
        collator, samples = collator_of(student), _samples()
        task = Task(
            make_stages(student.family, distiller.depths, recipe),
            lambda indices: distiller.located(collator.training([samples[index] for index in indices])),
            len(samples),
        )
        history = train(distiller, task, options, folder / f"training-{count}")
        seconds[f"{steps} steps"] = history.stepping_seconds
        if processes.rank() == 0:
            (folder / f"{count}.json").write_text(json.dumps(seconds))


def _samples() -> Sequence[Sample]:
    return load_samples(SAMPLES / "train.jsonl", limit=CALIBRATED, seed=0).samples


def _calibrate(loaded: Loaded, name: str, seconds: Seconds) -> Plan:
    groups, batches = find_groups(loaded.model, loaded.family), collated(collator_of(loaded), _samples(), BATCH)
    with timed(name, seconds):
        seen = collect(loaded.model, loaded.family, groups, batches, CRITERIA["gate"].calibration())
    scores = score_groups(groups, CRITERIA["gate"], seen, loaded.model)
    return plan_units(groups, scores, Budget(0.3), facts_of(loaded.model, groups))


def _refit(loaded: Loaded, plan: Plan, seconds: Seconds) -> None:
    groups, batches = find_groups(loaded.model, loaded.family), collated(collator_of(loaded), _samples(), BATCH)
    with timed("refit", seconds):
        fitted = COMPENSATIONS["refit"](loaded.model, loaded.family, groups, plan.keep, batches)
    assert fitted is not None
    fitted.put_into(apply_plan(loaded.model, plan))


def _teach_blocks(folder: Path, student: Loaded, plan: Plan, options: TrainOptions, seconds: Seconds) -> None:
    dense, batches = load_model(folder / "model"), collated(collator_of(student), _samples(), TRAINED_AT_ONCE)
    student.model.requires_grad_(True)
    lessons = lessons_of(student.model, dense.model, student.family, plan.blocks)
    teacher = WholeTeacher(dense.model, student.family, batches)
    course = Course(lessons, teacher, [step % len(batches) for step in range(options.steps)], [0])
    with timed(f"{options.steps} steps of every block", seconds):
        learn_blocks(student.model, course, options, folder / f"blocks-{processes.count()}")


def _read_bytes() -> int:
    """What this process has asked the system to read, from wherever that came."""
    return int(Path("/proc/self/io").read_text(encoding="utf-8").split()[1])


@contextmanager
def timed(name: str, seconds: Seconds) -> Iterator[None]:
    """From where all processes begin to where all are done."""
    processes.wait_for_all()
    began = time.perf_counter()
    yield
    processes.wait_for_all()
    seconds[name] = time.perf_counter() - began


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
