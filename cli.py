"""The commands: parse, one library call, print. Nothing heavy is imported before a command runs.

Exit codes: 0 done, 1 a bug (traceback), 2 usage, 3 refused, 4 a check failed (files are kept), 130 interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from slimvlm import console
from slimvlm.compress.errors import CheckFailedError, SlimvlmError
from slimvlm.compress.options import CompressOptions
from slimvlm.console import Device, Share, Size, shares
from slimvlm.serve.runtimes import installed_runtimes, runtime_conflict

# Names the library knows, repeated because importing them imports torch; a test compares.
CRITERIA = ("ukmi", "taylor", "fisher", "gate", "magnitude", "random")
TAYLORS = ("first", "vectorized", "second", "mix")
ALLOCATORS = ("balanced", "global", "local")
ATTENTION_UNITS = ("auto", "kv-group", "query-slot")
LAYOUTS = ("per-layer", "stock")
KINDS = ("attention", "mlp")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TRAINED = ("lora", "projector", "lora+projector", "full")
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("auto", "no", "bf16", "fp16")

DEFAULTS = {field.name: field.default for field in fields(CompressOptions)}


class Refused(click.ClickException):
    """An expected failure of the library, with the library's exit code."""

    def __init__(self, error: SlimvlmError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code


class Interrupted(click.ClickException):
    """Ctrl-C; what was finished stays."""

    exit_code = 130


class Commands(click.Group):
    """Commands in the order of this file; what the library refuses becomes a message and an exit code in each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, the most wanted first."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SlimvlmError as error:
            raise Refused(error) from error
        except KeyboardInterrupt:
            raise Interrupted("interrupted; --resume continues after the last finished stage") from None


def _option(flag: str, **settings: Any) -> Callable[[Any], Any]:
    """An option whose default is the library's."""
    default = DEFAULTS.get(flag.split("/")[0].removeprefix("--").replace("-", "_"))
    if not settings.get("multiple") and isinstance(default, str | int | float):
        settings.setdefault("default", default)
    return click.option(flag, **settings)


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


PATH = click.Path(path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FILE_OR_FOLDER = click.Path(exists=True, path_type=Path)
COUNT = click.IntRange(min=1)
FRACTION = click.FloatRange(0, 1)
RATIO = click.FloatRange(0, 1, min_open=True, max_open=True)
RATIO_OR_ALL = click.FloatRange(0, 1, min_open=True)
POSITIVE = click.FloatRange(0, min_open=True)
RECIPES = "lpd, a sum of sft, kl, rkl and hidden as sft+0.5*kl, or none."

remote_code = _option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings.")
model_options = _options(
    _option("--device", type=Device(), metavar="DEVICE", help="auto, cpu, cuda or cuda:N."),
    _option("--dtype", type=click.Choice(DTYPES), help="Type of the weights; auto is the checkpoint's own."),
    remote_code,
)
sample_options = _options(
    _option("--data", type=FILE_OR_FOLDER, required=True, help="JSONL, LLaVA JSON, image folder or dataset directory."),
    _option("--batch-size", type=COUNT, help="Samples per batch; squares are per batch in fisher, second and mix."),
    _option("--seed", type=int, help="Of the choice of samples, and of random scores."),
    _option("--max-bad-samples", type=FRACTION, help="Fraction of unreadable samples skipped before data is refused."),
)
plan_options = _options(
    _option("--ratio", type=RATIO, help="Fraction of ALL parameters to remove."),
    _option("--criterion", type=click.Choice(CRITERIA), help="What a unit is worth."),
    _option("--faithful", is_flag=True, help="The paper's method to the letter: UKMI, balanced, one round, no floors."),
    _option("--allocator", type=click.Choice(ALLOCATORS), help="Where units are taken."),
    _option("--rounds", type=COUNT, help="Calibrations, each on the model as cut so far."),
    _option("--tower-ratio", type=Share(), multiple=True, callback=shares, help="For one tower, as vision=0.3."),
    _option("--kind-ratio", type=Share(*KINDS), multiple=True, callback=shares, help="For a kind, as attention=0.1."),
    _option("--round-channels", type=COUNT, help="MLP widths become multiples of this."),
    _option("--attention-unit", type=click.Choice(ATTENTION_UNITS), help="What leaves an attention together."),
    _option("--layout", type=click.Choice(LAYOUTS), help="stock loads with the unmodified transformers class."),
    _option("--refit/--no-refit", default=True, help="Fit what is left of each output to the dense one."),
    _option("--samples", type=COUNT, help="Calibration samples per round."),
    _option("--grad-memory", type=Size(), metavar="SIZE", help="Bound on sums held at once, as 8GB."),
    _option("--host-sums", is_flag=True, help="Keep gradient sums in host memory while the model is on a GPU."),
    _option("--prefix-split", is_flag=True, help="Encoder-decoder models: split captions as the paper does."),
    _option("--threshold", type=FRACTION, help="Ablation: fit below this probability counts as poor; 1: all tokens."),
    _option("--entropy/--no-entropy", default=None, help="Ablation: weigh by the entropy of output angles."),
    _option("--taylor", type=click.Choice(TAYLORS), help="Ablation: variant of the criteria ukmi and taylor."),
)
recover_option = _option("--recover", metavar="RECIPE", help=RECIPES)
steps_option = _option("--steps", type=COUNT, help="Optimiser steps of the recovery; else what --epochs needs.")
recover_options = _options(
    recover_option,
    _option("--recover-data", type=FILE_OR_FOLDER, help="Samples to train on; else those of --data not evaluated."),
    _option("--data-fraction", type=RATIO_OR_ALL, help="Train on this share of them, drawn by --seed."),
    _option("--validation-samples", type=COUNT, help="Held out, by image, to keep the best state."),
    _option("--teacher", metavar="MODEL", help="Learn from this checkpoint; else from the dense model."),
    _option("--train", type=click.Choice(TRAINED), help="What is trained."),
    _option("--rank", type=COUNT, help="Of the low-rank update."),
    _option("--recall-rank", type=COUNT, help="Of the branch through the pruned weights."),
    _option("--alpha", type=POSITIVE, help="Updates are scaled by alpha / rank."),
    _option("--dropout", type=click.FloatRange(0, 1, max_open=True), help="On the input of the low-rank update."),
    _option("--targets", multiple=True, metavar="NAME", help="Adapt linears of these names only; repeatable."),
    _option("--recall/--no-recall", default=True, help="Recall the pruned weights."),
    _option("--staged/--not-staged", default=True, help="lpd: supervise ever more blocks, or all of them at once."),
    _option("--temperature", type=POSITIVE, help="Of the losses kl and rkl."),
    _option("--epochs", type=POSITIVE, help="Passes over the samples."),
    steps_option,
    _option("--train-batch-size", type=COUNT, help="Samples per step, over all processes."),
    _option("--accumulate", type=COUNT, help="Compute a batch in so many parts."),
    _option("--learning-rate", type=POSITIVE, help="Else by what is trained, falling with the model's width."),
    _option("--schedule", type=click.Choice(SCHEDULES), help="Of the learning rate after the warm-up."),
    _option("--warmup", type=click.IntRange(min=0), help="Steps of linear warm-up."),
    _option("--weight-decay", type=click.FloatRange(min=0), help="Of matrices."),
    _option("--clip", type=POSITIVE, help="Largest norm of the gradient."),
    _option("--reset-optimizer/--keep-optimizer", default=None, help="Begin each stage with a fresh optimiser."),
    _option("--precision", type=click.Choice(PRECISIONS), help="Of matrix products in training."),
    _option("--gradient-checkpointing", is_flag=True, help="Less memory for more time."),
    _option("--checkpoint-every", type=COUNT, help="Steps between states that --resume continues from."),
    _option("--validate-every", type=COUNT, help="Steps between validations; else an eighth of all."),
    _option("--patience", type=COUNT, help="Stop after so many validations without improvement."),
    _option("--teacher-cache", type=Size(), metavar="SIZE", help="Keep so much of the teacher's outputs on disk."),
)
evaluation_options = _options(
    _option("--eval-data", type=FILE_OR_FOLDER, help="Samples for before and after; else those of --data left over."),
    _option("--eval-samples", type=COUNT, help="At most so many of them."),
)
quality_limit = _option(
    "--max-quality-drop",
    type=click.FloatRange(min=0),
    metavar="POINTS",
    help="Exit with 4 if quality falls by more.",
)
folder_options = _options(
    _option("--resume", is_flag=True, help="Continue an interrupted run after its last finished stage."),
    _option("--overwrite", is_flag=True, help="Replace an earlier run."),
)
output_options = _options(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
    click.option("--quiet", "-q", is_flag=True, help="No progress on stderr."),
)


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
    if conflict := runtime_conflict(installed_runtimes()):
        console.print_warning(conflict)


@main.command()
@click.argument("model")
@click.argument("out", type=PATH)
@sample_options
@plan_options
@recover_options
@evaluation_options
@quality_limit
@model_options
@folder_options
@output_options
def compress(as_json: bool, quiet: bool, **values: Any) -> None:
    """Cut MODEL to a smaller dense checkpoint.

    MODEL is a folder or a hub name. Calibrates, plans, cuts, recovers, saves OUT/model, and evaluates before and after:

        slimvlm compress ./my-vlm out --data samples.jsonl --ratio 0.5
    """
    _compress(CompressOptions(**values), as_json=as_json, quiet=quiet)


@main.command()
@click.argument("out", type=PATH)
@_option("--ratio", type=RATIO, help="Fraction of ALL parameters to remove.")
@_option("--seed", type=int, help="Of the choice of samples.")
@recover_option
@steps_option
@quality_limit
@folder_options
@output_options
def demo(as_json: bool, quiet: bool, **values: Any) -> None:
    """Compress the packaged model and images.

    On the CPU, in minutes, without a download:

        slimvlm demo out
    """
    # So small a model gains nothing from threads; on a busy machine they wait for each other for minutes.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from slimvlm.demo import MODEL, SAMPLES

    packaged: dict[str, Any] = {
        "model": str(MODEL),
        "data": SAMPLES / "train.jsonl",
        "eval_data": SAMPLES / "test.jsonl",
        "train_batch_size": 32,
    }
    _compress(CompressOptions(**packaged, **values, device="cpu"), as_json=as_json, quiet=quiet)


def _compress(options: CompressOptions, *, as_json: bool, quiet: bool) -> None:
    from slimvlm import pipeline

    with console.progress(quiet) as progress:
        try:
            result = pipeline.compress(options, progress)
        except CheckFailedError as failed:
            if isinstance(failed.result, pipeline.Result):
                console.show_compression(failed.result, as_json=as_json)
            raise
    console.show_compression(result, as_json=as_json)


@main.command()
@click.argument("model")
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

    with console.progress(quiet) as progress:
        result = pipeline.make_plan(CompressOptions(**values), progress)
    console.show_plan(result.plan, result.out / "plan.json", as_json=as_json)


@main.command()
@click.argument("model")
@click.argument("plan_file", metavar="PLAN", type=FILE)
@click.argument("out", type=PATH)
@remote_code
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def apply(model: str, plan_file: Path, out: Path, trust_remote_code: bool, as_json: bool) -> None:
    """Cut MODEL as a saved PLAN says.

    Needs no samples; writes the checkpoint folder OUT:

        slimvlm apply ./my-vlm out/plan.json smaller
    """
    from slimvlm import pipeline

    plan = pipeline.apply_saved_plan(model, plan_file, out, trust_remote_code)
    console.show_plan(plan, out, as_json=as_json)


@main.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@recover_options
@_option("--device", type=Device(), metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
@quality_limit
@output_options
def recover(run: Path, as_json: bool, quiet: bool, **values: Any) -> None:
    """Train the cut model of RUN again.

    RUN is what `slimvlm compress` wrote. Reads its model and samples, keeps the model as it was cut in RUN/cut, puts
    the recovered one in its place, and continues where an interrupted recovery with the same options stopped:

        slimvlm recover out --recover sft+hidden --steps 500
    """
    from slimvlm import pipeline

    with console.progress(quiet) as progress:
        result = pipeline.recover_run(run, values, progress)
    console.show_compression(result, as_json=as_json)


@main.command()
@click.argument("model")
@sample_options
@_option("--eval-samples", type=COUNT, help="At most so many samples.")
@click.option("--against", metavar="MODEL", help="Compare with this checkpoint on the same samples.")
@model_options
@output_options
def evaluate(against: str | None, as_json: bool, quiet: bool, **values: Any) -> None:
    """Measure how well MODEL answers.

    Share of right answers per task, and the loss of the right answers' tokens:

        slimvlm evaluate out/model --data test.jsonl --against ./my-vlm
    """
    from slimvlm import pipeline

    with console.progress(quiet) as progress:
        options = CompressOptions(out=Path(), **values)
        quality, comparison = pipeline.evaluate_checkpoint(options, against, progress)
    console.show_quality(quality, comparison, as_json=as_json)


@main.command()
@click.argument("model")
@_option("--attention-unit", type=click.Choice(ATTENTION_UNITS), help="What leaves an attention together.")
@remote_code
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def inspect(model: str, attention_unit: str, trust_remote_code: bool, as_json: bool) -> None:
    """Show what can be removed from MODEL.

    Reads its config, no weights:

        slimvlm inspect ./my-vlm
    """
    from slimvlm.compress.inspection import inspect_model

    console.show_inspection(inspect_model(model, attention_unit, trust_remote_code), as_json=as_json)


if __name__ == "__main__":
    main()
