"""The commands: parse, one library call, print. Nothing heavy is imported before a command runs.

Exit codes: 0 done, 1 a bug (traceback), 2 usage, 3 refused, 4 a check failed (files are kept), 130 interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from slimvlm.compress.errors import CheckFailedError
from slimvlm.compress.options import ATTENTION_UNITS, CompressOptions, CutOptions, EvaluateOptions
from slimvlm.compress.progress import Progress
from slimvlm.console import show, show_frontier, show_profile, show_selfcheck
from slimvlm.console.commands import Commands, Interrupted
from slimvlm.console.options import (
    COUNT,
    FOLDER,
    NAME,
    PATH,
    TEXT,
    again_options,
    apply_options,
    demo_options,
    evaluation_options,
    export_options,
    folder_options,
    formats_option,
    frontier_options,
    model_options,
    option,
    output_options,
    plan_options,
    profile_options,
    profile_stage_option,
    quality_limit,
    recover_options,
    remote_code,
    sample_options,
    target_options,
)
from slimvlm.console.printing import print_warning, typed_lines
from slimvlm.console.progress import print_anything, progress
from slimvlm.console.values import Device
from slimvlm.export.running.runtimes import installed_runtimes, runtime_conflict
from slimvlm.serve.frontier.options import FrontierOptions
from slimvlm.serve.options import ProfileOptions


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 120},
)
@click.version_option(package_name="slimvlm")
def main() -> None:
    """Turn a vision-language model into a smaller dense one."""
    # transformers' own bars and notes would run into ours; its errors still show.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    print_anything()
    if conflict := runtime_conflict(installed_runtimes()):
        print_warning(conflict)


@main.command()
@click.argument("model", type=NAME)
@click.argument("out", type=PATH)
@sample_options
@plan_options
@recover_options
@evaluation_options
@quality_limit
@target_options
@formats_option
@profile_stage_option
@model_options
@folder_options
@output_options
def compress(as_json: bool, quiet: bool, **values: Any) -> None:
    """Cut MODEL to a smaller dense checkpoint.

    MODEL is a folder or a hub name. Calibrates, plans, cuts, recovers, saves OUT/model, evaluates before
    and after, and exports:

        slimvlm compress ./my-vlm out --data samples.jsonl --ratio 0.5
    """
    from slimvlm import pipeline

    job = partial(pipeline.compress, CompressOptions(**values))
    _show_job(job, partial(show.show_compression, as_json=as_json), quiet)


@main.command()
@frontier_options
def frontier(as_json: bool, quiet: bool, **values: Any) -> None:
    """Measure what MODEL can do, over its size and its time, cut and quantised in many ways.

    One calibration for all cuts; each, in each precision, is evaluated and timed on this device:

        slimvlm frontier ./my-vlm out --data samples.jsonl --ratios 0.2,0.35,0.5 --target size=3MB
    """
    from slimvlm.serve.frontier.job import measure_frontier
    from slimvlm.serve.report import write_frontier_report

    own = {name: values.pop(name) for name in ("ratios", "variants", "exporter", "minutes", "target", "threads")}
    options = FrontierOptions(cut=CutOptions(**values), **own)
    with progress(quiet) as report:
        found = measure_frontier(options, report)
    show_frontier.show_frontier(found, write_frontier_report(options.out), as_json=as_json)


@main.command()
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
    _show_job(partial(pipeline.compress, options), partial(show.show_compression, as_json=as_json), quiet)


def _show_job(job: Callable[[Progress], Any], shown: Callable[[Any], None], quiet: bool) -> None:
    """Show what a job gave, also when a check on it failed."""
    with progress(quiet) as report:
        try:
            result = job(report)
        except CheckFailedError as failed:
            if failed.result is not None:
                shown(failed.result)
            raise
    shown(result)


@main.command()
@click.argument("model", type=NAME)
@click.argument("out", type=PATH)
@sample_options
@plan_options
@evaluation_options
@model_options
@folder_options
@output_options
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


@main.command()
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


@main.command()
@click.argument("run", type=FOLDER)
@recover_options
@again_options
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

    _show_job(partial(pipeline.recover_run, run, values), partial(show.show_compression, as_json=as_json), quiet)


@main.command()
@click.argument("model", type=NAME)
@sample_options
@option("--eval-samples", type=COUNT, help="At most so many samples.")
@click.option("--against", type=NAME, metavar="MODEL", help="Compare with this one on the same samples.")
@model_options
@output_options
def evaluate(against: str | None, as_json: bool, quiet: bool, **values: Any) -> None:
    """Measure how well MODEL answers.

    Share of right answers per task, the loss of the right answers' tokens, and what is right with the images shuffled.
    MODEL is a checkpoint or an export, FOLDER[:BACKEND[:VARIANT]]:

        slimvlm evaluate exported:onnx:int8 --data test.jsonl --against ./my-vlm
    """
    from slimvlm import pipeline

    with progress(quiet) as report:
        options = EvaluateOptions(**values)
        evaluation = pipeline.evaluate_named(options, against, report)
    show.show_quality(evaluation, options.seed, as_json=as_json)


@main.command()
@click.argument("model", type=NAME)
@option("--attention-unit", type=click.Choice(ATTENTION_UNITS), help="What leaves an attention together.")
@remote_code
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def inspect(model: str, attention_unit: str, trust_remote_code: bool, as_json: bool) -> None:
    """Show what can be removed from MODEL.

    Reads its config, no weights:

        slimvlm inspect ./my-vlm
    """
    from slimvlm.compress.models.inspection import inspect_model

    show.show_inspection(inspect_model(model, attention_unit, trust_remote_code), as_json=as_json)


@main.command()
@click.argument("model", type=NAME)
@click.argument("out", type=PATH, required=False)
@export_options
@click.option("--verify", is_flag=True, help="Check the exported folder MODEL on this machine instead.")
@output_options
def export(model: str, out: Path | None, verify: bool, as_json: bool, quiet: bool, **values: Any) -> None:
    """Write MODEL as graphs that run without torch.

    ONNX in the layout transformers.js loads, TorchScript, torch.export; each is held against torch on real samples:

        slimvlm export out/model exported --format onnx --data test.jsonl
    """
    from slimvlm import export as exports

    if verify:
        show.show_verification(exports.verify(model), as_json=as_json)
        return
    if out is None:
        raise click.UsageError("Missing argument 'OUT'.")
    job = partial(exports.export_checkpoint, model, out, exports.ExportOptions(**values))
    _show_job(job, partial(show.show_export, as_json=as_json), quiet)


@main.command()
@click.argument("slim", type=NAME)
@profile_options
@output_options
def profile(as_json: bool, quiet: bool, **values: Any) -> None:
    """Measure what SLIM costs to run, next to a dense model.

    SLIM is a checkpoint, what `slimvlm compress` wrote, or an export; FOLDER:BACKEND[:VARIANT] runs on that alone, and
    so does --against. Both models take turns in processes of their own:

        slimvlm profile out --against ./my-vlm --backend torch,onnx
        slimvlm profile out:onnx:int8 --against ./my-vlm:onnx:int8
    """
    from slimvlm.serve.profiling import profile_models

    options = ProfileOptions(**values)
    shown = partial(show_profile.show_profile, written=options.written, as_json=as_json)
    _show_job(partial(profile_models, options), shown, quiet)


@main.command()
@click.argument("folder", type=NAME)
@click.argument("image", type=PATH)
@click.argument("question", type=TEXT, required=False)
@click.option("--against", type=NAME, metavar="MODEL", help="Show the answers of this checkpoint or export too.")
@click.option(
    "--backend", type=TEXT, metavar="NAME", help="Of an export: onnx, onnx:int8, torchscript; else its first."
)
@click.option("--max-new-tokens", type=COUNT, default=64, help="Longest answer.")
@again_options
@click.option("--quiet", "-q", is_flag=True, help="No speed on stderr.")
def chat(
    folder: str, image: Path, question: str | None, against: str | None, max_new_tokens: int, quiet: bool, **values: Any
) -> None:
    """Ask FOLDER about an IMAGE.

    FOLDER is a checkpoint or an export, FOLDER[:BACKEND[:VARIANT]]. The answer is shown as it comes; without QUESTION a
    line of stdin is one, until one is empty, each asked on its own, and `/image PATH` changes the image:

        slimvlm chat out/model photo.jpg "What is in the image?"
    """
    from slimvlm.serve.chat import answer, converse, open_chat, open_image

    picture = open_image(image)
    backend = values.pop("backend")
    chats = [open_chat(folder, backend=backend, **values)]
    if against is not None:
        chats.append(open_chat(against, **values))
    tell = partial(click.echo, nl=False)
    note = (lambda line: None) if quiet else partial(click.echo, err=True)
    try:
        if question is None:
            converse(chats, picture, typed_lines(), max_new_tokens, tell, note)
        else:
            answer(chats, picture, question, max_new_tokens, tell, note)
    except KeyboardInterrupt:
        raise Interrupted("interrupted") from None


@main.command()
@click.argument("run", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def report(run: Path, as_json: bool) -> None:
    """Write report.html and report.md of a RUN.

    RUN is what `slimvlm compress` wrote, which does this at its end; after a later recovery or export:

        slimvlm report out
    """
    from slimvlm.serve.report import write_report

    show.show_written(write_report(run), as_json=as_json)


@main.command()
@option("--device", type=Device(), metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
@output_options
def kernels(device: str, as_json: bool, quiet: bool) -> None:
    """Check and time the kernels on this device.

    Against plain torch, on matrices of real models; nothing is timed if a result is wrong:

        slimvlm kernels --device cuda
    """
    from slimvlm.compress.processes import pick_device
    from slimvlm.kernels.bench import BenchOptions, describe, run

    with progress(quiet) as tell:
        found = run(BenchOptions(device=str(pick_device(device))), tell)
    show.show_kernels(found, describe(found), as_json=as_json)
    if found.failures:
        raise CheckFailedError(f"{len(found.failures)} of {len(found.checks)} checks failed; nothing was timed")


@main.command()
@option("--device", type=Device(), metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def selfcheck(device: str, as_json: bool) -> None:
    """Try everything on this device, once.

    Kernels, calibration, cut, recovery, export, profile and counters, on the packaged model; the last line is for a bug
    report. The first thing to run on a new machine:

        slimvlm selfcheck --device cuda:0
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as for the demo: it is the same small model
    from slimvlm.selfcheck.run import selfcheck as run_all

    report = run_all(device, None if as_json else show_selfcheck.show_outcome)
    show_selfcheck.show_selfcheck(report, as_json=as_json)
    if failed := report.named("FAIL"):
        raise CheckFailedError(f"{len(failed)} of {len(report.outcomes)} checks failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
