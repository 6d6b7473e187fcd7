"""What cuts a model: the whole job, and its stages."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import click

from slimvlm.compress.options import CompressOptions, SparsifyOptions
from slimvlm.console import show
from slimvlm.console.group import command
from slimvlm.console.options.cutting import apply_options, sparsify_options
from slimvlm.console.options.delivering import (
    compress_options,
    demo_options,
    formats_option,
    plan_options,
    quality_limit,
)
from slimvlm.console.options.making import FOLDER, again_options, output_options, stream_option
from slimvlm.console.options.recovering import recover_options
from slimvlm.console.printing import print_warning
from slimvlm.console.progress import progress, show_job
from slimvlm.console.show_foreseen import show_foreseen


@command(
    first=(
        *("--data", "--ratio", "--target", "--recover", "--eval-data", "--export", "--device", "--resume"),
        *("--config", "--dry-run"),
    )
)
@compress_options
def compress(as_json: bool, quiet: bool, dry_run: bool, **values: Any) -> None:
    """Cut MODEL to a smaller dense checkpoint.

    MODEL is a folder or a hub name. Calibrates, plans, cuts, recovers, saves OUT/model, evaluates before
    and after, and exports:

        slimvlm compress ./my-vlm out --data samples.jsonl --ratio 0.5
    """
    from slimvlm import pipeline

    if dry_run:
        with progress(quiet) as report:
            show_foreseen(pipeline.foresee(CompressOptions(**values), report), as_json=as_json)
        return
    job = partial(pipeline.compress, CompressOptions(**values))
    show_job(job, partial(show.show_compression, as_json=as_json), quiet)


@command()
@demo_options
def demo(as_json: bool, quiet: bool, **values: Any) -> None:
    """Compress the packaged model and images.

    On the CPU, in minutes, without a download:

        slimvlm demo out
    """
    # So small a model gains nothing from threads; on a busy machine they wait for each other for minutes.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from slimvlm import pipeline
    from slimvlm.demo import MODEL, SAMPLES

    packaged: dict[str, Any] = {
        "model": str(MODEL),
        "data": SAMPLES / "train.jsonl",
        "eval_data": SAMPLES / "test.jsonl",
        "train_batch_size": 32,
        "variants": ("fp32", "int8", "q4"),
    }
    options = CompressOptions(**packaged, **values, device="cpu")
    show_job(partial(pipeline.compress, options), partial(show.show_compression, as_json=as_json), quiet)


@command(
    first=(
        "--data",
        "--ratio",
        "--criterion",
        "--allocator",
        "--rounds",
        "--samples",
        "--eval-data",
        "--layout",
        "--device",
    )
)
@plan_options
def plan(as_json: bool, quiet: bool, **values: Any) -> None:
    """Decide what to cut, and write it down.

    OUT/plan.json is a small file that can be read, compared, and replayed by `slimvlm apply`. `slimvlm compress` with
    the same options and --resume goes on from here:

        slimvlm plan ./my-vlm out --data samples.jsonl --ratio 0.5
    """
    from slimvlm import pipeline

    with progress(quiet) as report:
        result = pipeline.make_plan(CompressOptions(**values), report)
    show.show_plan(result.plan, result.out / "plan.json", as_json=as_json)
    if not as_json:
        show.print_left_out(result)


@command()
@apply_options
def apply(model: str, plan_file: Path, out: Path, as_json: bool, quiet: bool, **values: Any) -> None:
    """Cut MODEL as a saved PLAN says.

    Without the samples of `slimvlm plan` nothing is refitted; with them OUT is what `compress --recover none` gives:

        slimvlm apply ./my-vlm out/plan.json smaller --data samples.jsonl

    With --ratio only what the plan took first goes, by `order.safetensors` beside it: one plan for all smaller ratios.
    """
    from slimvlm import pipeline

    with progress(quiet) as report:
        plan = pipeline.apply_saved_plan(model, plan_file, out, progress=report, **values)
    if plan.compensation and values["data"] is None:
        name = plan.compensation.name
        print_warning(f"the plan wants a {name}, and nothing was: give the samples of `slimvlm plan` with --data")
    show.show_plan(plan, out, as_json=as_json)


@command(
    first=(
        "--recover",
        "--steps",
        "--train-batch-size",
        "--learning-rate",
        "--recover-data",
        "--teacher",
        "--train",
        "--recover-as",
        "--export",
        "--device",
    )
)
@click.argument("run", type=FOLDER)
@recover_options
@again_options
@stream_option
@quality_limit
@formats_option
@output_options
def recover(run: Path, as_json: bool, quiet: bool, **values: Any) -> None:
    """Train the cut model of RUN again.

    RUN is what `slimvlm compress` wrote. Reads its model and samples, keeps the model as it was cut in RUN/cut, puts
    the recovered one in its place, and continues where an interrupted recovery with the same options stopped:

        slimvlm recover out --recover sft+hidden --steps 500
    """
    from slimvlm import pipeline

    show_job(partial(pipeline.recover_run, run, values), partial(show.show_compression, as_json=as_json), quiet)


@command(first=("--data", "--sparsity", "--ratio", "--rule", "--allocator", "--samples", "--device"))
@sparsify_options
def sparsify(as_json: bool, quiet: bool, **values: Any) -> None:
    """Make single weights of MODEL zero; shapes stay.

    What ECoFLaP, Wanda and SparseGPT do. OUT is a dense checkpoint with zeros, neither smaller nor faster, unless a
    runtime of your own makes something of them:

        slimvlm sparsify ./my-vlm sparse --data samples.jsonl --ratio 0.35 --allocator ecoflap
        slimvlm sparsify ./my-vlm sparse --data samples.jsonl --sparsity 2:4 --rule sparsegpt
    """
    from slimvlm.compress.stages.sparsify import sparsify_model

    options = SparsifyOptions(**values)
    with progress(quiet) as report:
        done = sparsify_model(options, report)
    show.show_sparsified(done, options.out, as_json=as_json)
