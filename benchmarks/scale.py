"""What a model of real size takes: seconds, memory and bytes of every stage, with and without streaming.

    python benchmarks/scale.py --shape qwen2.5-vl-7b --stream on --threads 2

Makes a checkpoint of random weights with the shapes of a real model (`real_shapes/`) shard by shard, and takes it
through the job, each stage in a process of its own: the plan (calibration of 8 samples, half of the parameters), the
slice stage (refit where it is asked for, cut, save, both checks) and the export of q4 graphs. Before them, each in a
process too, the pace: a plain forward and backward pass of the same model, weights frozen, and our calibration over all
samples, twice. A run is a line of `results/scale.jsonl`, in the place of an earlier one with the same options on the
same machine; the files are removed afterwards. `--stages make export` is the export of the whole model alone.
`--stages make plain calibrate --samples 32 --results results/pace.jsonl` is the pace alone, of more samples.

    python benchmarks/scale.py --check    what the model of the cost (serve/costing) says of these runs, and its errors
    python benchmarks/scale.py --fit      fits the factors of that model to them first, and says anew in
                                          `results/cost.json` what real models take on known machines
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import psutil
import torch
from real_shapes.fitting import anatomy, cost_model, costs, fit, table
from real_shapes.making import SAMPLES, make
from real_shapes.shapes import DTYPE, SHAPES

from slimvlm.compress.data.collate import collated, collator_of
from slimvlm.compress.data.questions import ask
from slimvlm.compress.data.splits import read_measured
from slimvlm.compress.errors import CheckFailedError
from slimvlm.compress.files.folders import require_room
from slimvlm.compress.files.writing import installed_versions
from slimvlm.compress.models.computing import load_to_compute, undisturbed
from slimvlm.compress.models.groups import count_parameters
from slimvlm.compress.models.streaming.weights import streamed
from slimvlm.compress.options import CompressOptions, ComputeOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.runs import MODEL, PLAN, RunFolder
from slimvlm.compress.stages.plan import planning_of
from slimvlm.compress.stages.slice import slice_stage
from slimvlm.compress.statistics.collect import collect
from slimvlm.compress.statistics.loss import loss
from slimvlm.console.progress import progress
from slimvlm.export.job import export_checkpoint
from slimvlm.export.options import ExportOptions
from slimvlm.pipeline import make_plan
from slimvlm.serve.costing.cost import CostModel
from slimvlm.serve.costing.factors import fitted
from slimvlm.serve.costing.probe import measure_machine

RESULTS, COSTS = (Path(__file__).parent / "results" / name for name in ("scale.jsonl", "cost.json"))
FITTED = Path(__file__).parents[1] / "serve" / "costing" / "fitted.json"
ASKED = ("stream", "threads", "samples", "rounds", "compensation")
VARIANT = "q4"
OTHERS = 0.05  # share of the processors that others may take while a run counts as alone
PACES = ("plain", "calibrate")  # stages that no other one needs
KEPT_AT_ONCE = 1.8  # times the checkpoint: itself, half of it, and graphs
POLL = 0.02  # seconds between two looks at the memory
Facts = dict[str, Any]


def options_of(job: argparse.Namespace) -> CompressOptions:
    """Of the run in the folder of the job."""
    return CompressOptions(
        model=str(job.folder / "model"),
        out=job.folder / "out",
        data=job.folder / "train.jsonl",
        eval_data=job.folder / "val.jsonl",
        ratio=SHAPES[job.shape].ratio,
        rounds=job.rounds,
        compensation=job.compensation,
        batch_size=1,
        recover="none",
        export=(),
        profile=False,
        device="cpu",
        trust_remote_code=True,
        resume=True,
        stream=job.stream,
    )


# ------------------------------------------------------------------ stages, each in a process of its own


def plain(job: argparse.Namespace) -> Facts:
    """Seconds per sample of a forward and a backward pass to the inputs; the model is in memory."""
    options = options_of(job)
    loaded = load_to_compute(ComputeOptions(device="cpu", trust_remote_code=True), options.model)
    model, batches = loaded.model, collated(collator_of(loaded), read_measured(options).calibration, 1)
    seconds, tokens = [], []
    with undisturbed(model):
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda module, given, made: made.requires_grad_())
        for batch in (batches[0], *batches):
            question = ask(model, loaded.family, batch())
            if question is None:
                raise ValueError("a sample of this benchmark has no answer")
            given = {name: value for name, value in question.inputs.items() if isinstance(value, torch.Tensor)}
            pixels = {name: value for name, value in given.items() if value.is_floating_point()}
            for value in pixels.values():
                value.requires_grad_()
            began = time.perf_counter()
            loss(model, question, None)[0].backward()
            seconds.append(time.perf_counter() - began)
            tokens.append([question.tally.image_tokens, question.tally.text_tokens])
    return {
        "per_sample": sum(seconds[1:]) / len(batches),
        "parameters": count_parameters(model),
        "tokens": [max(kind) for kind in zip(*tokens, strict=True)],
        "pixels": {name: list(value.shape) for name, value in pixels.items()},
    }


def calibrate(job: argparse.Namespace) -> Facts:
    """Seconds per sample of the calibration that the default criterion asks for, first and once more."""
    options = options_of(job)
    planning = planning_of(options)
    loaded = load_to_compute(options, options.model, beside=1.0)
    batches = collated(collator_of(loaded), read_measured(options).calibration, 1)
    groups, seconds = planning.groups(loaded.model), []
    for _ in range(2):
        began = time.perf_counter()
        with progress(quiet=False) as tell:
            collect(loaded.model, loaded.family, groups, batches, planning.calibration, tell)
        seconds.append((time.perf_counter() - began) / len(batches))
    by_block = streamed(loaded.model) is not None
    return {"per_sample_first": seconds[0], "per_sample": seconds[1], "by_block": by_block}


def plan(job: argparse.Namespace) -> Facts:
    """The plan stage of a run."""
    with progress(quiet=False) as tell:
        made = make_plan(options_of(job), tell).plan
    return {"parameters_after": made.parameters_after}


def cut(job: argparse.Namespace) -> Facts:
    """The slice stage of the same run: refit, cut, save, both checks."""
    options = options_of(job).resolved()
    run, data = RunFolder(options.out, options.identity(), resume=True), read_measured(options)
    decided = Plan.from_json((options.out / PLAN).read_text(encoding="utf-8"))
    with run.begun(), progress(quiet=False) as tell:
        slice_stage(run, options, decided, data, tell)
    return {name: value for name, value in run.record["stages"]["slice"].items() if name.endswith("difference")}


def export(job: argparse.Namespace) -> Facts:
    """Graphs of the cut model, or of the whole one where none was cut, checked against torch."""
    cut_model, whole = job.folder / "out" / MODEL, job.folder / "model"
    options = ExportOptions(
        variants=(VARIANT,),
        data=job.folder / "val.jsonl",
        samples=1,
        max_new_tokens=2,
        trust_remote_code=True,
        **({"stream": job.stream} if "stream" in {field.name for field in fields(ExportOptions)} else {}),
    )
    failed = ""
    with progress(quiet=False) as tell:
        try:
            export_checkpoint(cut_model if cut_model.is_dir() else whole, job.folder / "export", options, tell)
        except CheckFailedError as error:  # random weights choose among tokens that are as good as equal
            failed = str(error).replace(str(job.folder), "")
    size = sum(file.stat().st_size for file in (job.folder / "export").rglob("*") if file.is_file())
    return {"bytes": size, "check_failed": failed}


def write(job: argparse.Namespace) -> Facts:
    """The checkpoint and its samples."""
    make(SHAPES[job.shape], job.folder, job.samples)
    return {"bytes": sum(file.stat().st_size for file in (job.folder / "model").iterdir())}


STAGES: Mapping[str, Callable[[argparse.Namespace], Facts]] = {
    "make": write, "plain": plain, "calibrate": calibrate, "plan": plan, "slice": cut, "export": export,
}  # fmt: skip


# ------------------------------------------------------------------ what a process took


class Watch:
    """The largest anonymous memory of this process, while inside: what no file on disk stands for."""

    def __enter__(self) -> Watch:
        self.anonymous, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._done.wait(POLL):
            self.anonymous = max(self.anonymous, counted("status")["RssAnon"])


def counted(name: str) -> dict[str, int]:
    """The numbers of a file of /proc/self; sizes in bytes."""
    found = {}
    for line in Path("/proc/self", name).read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        if number.isdigit():
            found[key] = int(number) * (1024 if unit == "kB" else 1)
    return found


def _busy() -> float:
    """Seconds that the processors of this machine have worked, for whomever."""
    spent = psutil.cpu_times()
    return float(spent.user + spent.nice + spent.system)


def run_stage(job: argparse.Namespace) -> None:
    """One stage in this process; what it took goes to `STAGE.json`."""
    torch.set_num_threads(job.threads)
    before, began, used, busy = counted("io"), time.perf_counter(), time.process_time(), _busy()
    with Watch() as watch:
        facts = STAGES[job.stage](job)
    seconds, after = time.perf_counter() - began, counted("io")
    took = {
        "seconds": round(seconds, 2),
        "processor_seconds": round(time.process_time() - used, 2),
        "others_seconds": round(_busy() - busy - (time.process_time() - used), 2),
        "peak_bytes": counted("status")["VmHWM"],
        "peak_anonymous_bytes": watch.anonymous,
        "read_bytes": after["rchar"] - before["rchar"],
        "read_from_disk_bytes": after["read_bytes"] - before["read_bytes"],
        "written_bytes": after["wchar"] - before["wchar"],
    }
    (job.folder / f"{job.stage}.json").write_text(json.dumps({**took, **facts}))


def _lacking(job: argparse.Namespace, stage: str, model: CostModel) -> str:
    """What the stage needs and the machine has not; empty: it has all."""
    if stage == "make":
        return ""
    streamed = job.stream == "on" and stage != "plain"
    needed, free = model.peak("plan" if stage in PACES else stage, streamed), psutil.virtual_memory().available
    return f"needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free" if needed > free else ""


def in_processes(job: argparse.Namespace, model: CostModel) -> dict[str, Facts]:
    """All stages, until one fails; what each took. What will not fit into the memory that is free is not tried."""
    found: dict[str, Facts] = {}
    for stage in job.stages:
        if lacking := _lacking(job, stage, model):
            found[stage] = {"skipped": lacking}
            print(stage, lacking, flush=True)
            if stage in PACES:
                continue
            break
        words = [sys.executable, __file__, *sys.argv[1:], "--stage", stage, "--folder", str(job.folder)]
        threads = {"OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
        done = subprocess.run(words, env={**os.environ, **threads}, check=False)
        if done.returncode:
            found[stage] = {"failed": done.returncode}
            break
        found[stage] = json.loads((job.folder / f"{stage}.json").read_text())
        print(stage, json.dumps(found[stage]), flush=True)
    return found


def read(results: Path) -> list[Facts]:
    """The runs so far."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    return [json.loads(line) for line in lines]


def check(job: argparse.Namespace) -> None:
    """What the model of the cost says of the runs; with `--fit` its factors are fitted to them and written first."""
    rows = read(job.results)
    if job.fit:
        FITTED.write_text(json.dumps(fit(rows), indent=2) + "\n", encoding="utf-8")
        fitted.cache_clear()
        COSTS.write_text(json.dumps(costs(), indent=1) + "\n", encoding="utf-8")
    print(table(rows))


def _identity(row: Facts) -> list[Any]:
    """What makes two runs the same."""
    return [row["shape"], row["machine"]["says"], *(row[name] for name in ASKED)]


def _was_alone(stages: Iterable[Facts]) -> bool:
    """Whether other processes took next to nothing: seconds of a crowded machine say nothing."""
    took = [(stage["others_seconds"], stage["seconds"]) for stage in stages if "seconds" in stage]
    others, seconds = map(sum, zip(*took, strict=True)) if took else (0.0, 0.0)
    return others <= OTHERS * (psutil.cpu_count() or 1) * seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smolvlm-256m")
    parser.add_argument("--stream", choices=("on", "off"), default="off")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the calibration")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--compensation", default="none")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--folder", type=Path, help="where the files go, and stay; default: a temporary one")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="hold the model of the cost against the results")
    parser.add_argument("--fit", action="store_true", help="fit its factors to them")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    job = parser.parse_args()
    if job.stage is not None:
        run_stage(job)
        return
    if job.check or job.fit:
        check(job)
        return
    stays = job.folder is not None
    job.folder = job.folder or Path(tempfile.mkdtemp(prefix="scale-"))
    machine = measure_machine(anatomy(job.shape).dtype, job.folder.parent, job.threads)
    model = cost_model(vars(job), machine)
    try:
        require_room(job.folder, round(KEPT_AT_ONCE * model.stored))
        stages = in_processes(job, model)
    finally:
        if not stays:
            shutil.rmtree(job.folder)
    row = {
        "shape": job.shape,
        "says": SHAPES[job.shape].says,
        "dtype": str(DTYPE).removeprefix("torch."),
        **{name: getattr(job, name) for name in ASKED},
        "machine": asdict(machine),
        "alone": _was_alone(stages.values()),
        "stages": stages,
        "versions": installed_versions(),
    }
    if job.stages != list(STAGES) and job.results == RESULTS:
        return  # a part of a run is shown, and not kept
    kept = [other for other in read(job.results) if _identity(other) != _identity(row)]
    job.results.write_text("".join(json.dumps(one) + "\n" for one in (*kept, row)), encoding="utf-8")


if __name__ == "__main__":
    main()
