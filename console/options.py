"""The options that commands share, in groups; their names and defaults are those of `CompressOptions`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from slimvlm.compress.allocate.allocators import ALLOCATORS
from slimvlm.compress.criteria.criterion import CRITERIA, TAYLORS
from slimvlm.compress.options import (
    ATTENTION_UNITS,
    KINDS,
    LAYOUTS,
    PRECISIONS,
    RANKED_BY,
    SCHEDULES,
    TRAINED,
    CompressOptions,
    SparsifyOptions,
)
from slimvlm.compress.recovery.distillation.recipe import LOSSES, PROGRESSIONS
from slimvlm.compress.slicing.compensation import COMPENSATIONS
from slimvlm.compress.sparsity.rules import PATTERNS, RULES
from slimvlm.compress.statistics.rows import POOLS
from slimvlm.console.values import (
    MOST,
    Count,
    Device,
    ImageSize,
    Listed,
    Location,
    Name,
    Names,
    Number,
    Share,
    Size,
    Text,
    shares,
)
from slimvlm.export.options import DTYPES as EXPORTED_DTYPES
from slimvlm.export.options import EXPORTERS, FUSIONS, ExportOptions
from slimvlm.export.variants import QUANTIZED
from slimvlm.serve.fitting.goals import QUANTITIES
from slimvlm.serve.frontier.options import FrontierOptions
from slimvlm.serve.options import BACKENDS, DTYPES, PROVIDERS, ProfileOptions


def defaulting_to(options: type[Any]) -> Callable[..., Callable[[Any], Any]]:
    """As `click.option`, with the defaults of the library's `options`."""
    defaults = {field.name: field.default for field in fields(options)}

    def option(flag: str, **settings: Any) -> Callable[[Any], Any]:
        default = defaults.get(flag.split("/")[0].removeprefix("--").replace("-", "_"))
        if isinstance(default, str | int | float | tuple):
            settings.setdefault("default", default)
        return click.option(flag, **settings)

    return option


option, export_option, profile_option, frontier_option, sparsify_option = map(
    defaulting_to, (CompressOptions, ExportOptions, ProfileOptions, FrontierOptions, SparsifyOptions)
)


def together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, shown in this order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


PATH = Location()
FILE = Location(exists=True, dir_okay=False)
FILE_OR_FOLDER = Location(exists=True)
FOLDER = Location(exists=True, file_okay=False)
NAME = Name()
TEXT = Text()
COUNT = Count()
SEED = Count(0, 2**32 - 1)
FRACTION = Number(0, 1)
RATIO = Number(0, 1, min_open=True, max_open=True)
RATIO_OR_ALL = Number(0, 1, min_open=True)
POSITIVE = Number(0, min_open=True)
RECIPES = f"{', '.join(PROGRESSIONS)}, a sum of {', '.join(LOSSES)} as sft+0.5*kl, or none."

remote_code = option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings.")
model_options = together(
    option("--device", type=Device(), metavar="DEVICE", help="auto, cpu, cuda or cuda:N."),
    option("--dtype", type=click.Choice(DTYPES), help="Type of the weights; auto is the checkpoint's own."),
    remote_code,
)
sample_options = together(
    option("--data", type=FILE_OR_FOLDER, required=True, help="JSONL, LLaVA JSON, image folder or dataset directory."),
    option("--batch-size", type=COUNT, help="Samples per batch; squares are per batch in fisher, second and mix."),
    option("--seed", type=SEED, help="Of the choice of samples, and of random scores."),
    option("--max-bad-samples", type=FRACTION, help="Fraction of unreadable samples skipped before data is refused."),
)
rounds_option = option("--rounds", type=COUNT, help="Calibrations, each on the model as cut so far.")
samples_option = option("--samples", type=COUNT, help="Calibration samples per round; else 512, with --faithful 1000.")
plan_options = together(
    option("--ratio", type=RATIO, help="Fraction of ALL parameters to remove."),
    option("--criterion", type=click.Choice(CRITERIA), help="What a unit is worth."),
    option("--faithful", is_flag=True, help="UKMP to the letter: ukmi, allocator paper, one round, no refit."),
    option("--allocator", type=click.Choice(list(ALLOCATORS)), help="Where units are taken."),
    rounds_option,
    option("--equal-rounds", is_flag=True, help="Of equal shares: for a plan that smaller ratios are cut from."),
    option("--tower-ratio", type=Share(), multiple=True, callback=shares, help="For one tower, as vision=0.3."),
    option("--kind-ratio", type=Share(*KINDS), multiple=True, callback=shares, help="For a kind, as attention=0.1."),
    option("--depth-ratio", type=Share(), multiple=True, callback=shares, help="Whole blocks first, as language=0.2."),
    option("--round-channels", type=COUNT, help="MLP widths become multiples of this."),
    option("--attention-unit", type=click.Choice(ATTENTION_UNITS), help="What leaves an attention together."),
    option("--layout", type=click.Choice(LAYOUTS), help="stock loads with the unmodified transformers class."),
    option("--compensation", type=click.Choice(list(COMPENSATIONS)), help="What the weights that stay become."),
    click.option("--refit", "compensation", flag_value="refit", help="The same as --compensation refit."),
    click.option("--no-refit", "compensation", flag_value="none", help="The same as --compensation none."),
    option("--compensate-rounds", is_flag=True, help="Compensate between rounds, too; each looks at what came of it."),
    samples_option,
    option("--grad-memory", type=Size(), metavar="SIZE", help="Bound on sums held at once, as 8GB."),
    option("--host-sums", is_flag=True, help="Keep gradient sums in host memory while the model is on a GPU."),
    option("--prefix-split", is_flag=True, help="Encoder-decoder models: split captions as the paper does."),
    option(
        "--tokens",
        type=TEXT,
        metavar="POOL",
        help=f"Those that criteria without gradients look at: {', '.join(POOLS)} or 'atv(ALPHA)'; else all.",
    ),
    option("--threshold", type=FRACTION, help="Ablation: fit below this probability counts as poor; 1: all tokens."),
    option("--entropy/--no-entropy", default=None, help="Ablation: weigh by the entropy of output angles."),
    option("--taylor", type=click.Choice(TAYLORS), help="Ablation: variant of the criteria ukmi and taylor."),
)
recover_option = option("--recover", type=TEXT, metavar="RECIPE", help=RECIPES)
steps_option = option("--steps", type=COUNT, help="Optimiser steps of the recovery; else what --epochs needs.")
train_batch_option = option(
    "--train-batch-size", type=COUNT, help="Samples per step, over all processes; else 16 or the paper's."
)
recover_options = together(
    recover_option,
    option("--recover-data", type=FILE_OR_FOLDER, help="Samples to train on; else those of --data not evaluated."),
    option("--data-fraction", type=RATIO_OR_ALL, help="Train on this share of them, drawn by --seed."),
    option("--validation-samples", type=COUNT, help="Held out, by image, to keep the best state; else by the steps."),
    option("--teacher", type=NAME, metavar="MODEL", help="Learn from this checkpoint; else from the dense model."),
    option("--train", type=click.Choice(TRAINED), help="What is trained."),
    option("--recover-as", type=TEXT, metavar="VARIANT", help="Train for the weights of this export: q8, q4 or q2."),
    option("--rank", type=COUNT, help="Of the low-rank update."),
    option("--recall-rank", type=COUNT, help="Of the branch through the pruned weights."),
    option("--alpha", type=POSITIVE, help="Updates are scaled by alpha / rank."),
    option("--dropout", type=Number(0, 1, max_open=True), help="On the input of the low-rank update."),
    option("--targets", type=TEXT, multiple=True, metavar="NAME", help="Adapt linears of these names; repeatable."),
    option("--recall/--no-recall", default=True, help="Recall the pruned weights."),
    option("--staged/--not-staged", default=True, help="lpd: supervise ever more blocks, or all of them at once."),
    option("--feature-share", type=RATIO, help="lpd: samples for the stages before the answers; else a fifth."),
    option("--temperature", type=POSITIVE, help="Of the losses kl and rkl."),
    option(
        "--hidden-states",
        type=Count(-MOST),
        multiple=True,
        metavar="INDEX",
        help="Compared by the loss hidden: -1 is the last, 0 the embeddings; repeatable.",
    ),
    option("--epochs", type=POSITIVE, help="Passes over the samples."),
    steps_option,
    train_batch_option,
    option("--accumulate", type=COUNT, help="Compute a batch in so many parts."),
    option("--learning-rate", type=POSITIVE, help="Else by what is trained, falling with the model's width."),
    option("--schedule", type=click.Choice(SCHEDULES), help="Of the learning rate; else cosine or the paper's."),
    option("--warmup", type=Count(0), help="Steps of linear warm-up; else 10 or the paper's."),
    option("--weight-decay", type=Number(min=0), help="Of matrices."),
    option("--clip", type=Number(0), help="Largest norm of the gradient, 0 for any; else 1 or the paper's 0."),
    option("--reset-optimizer/--keep-optimizer", default=None, help="Begin each stage with a fresh optimiser."),
    option("--precision", type=click.Choice(("auto", *PRECISIONS)), help="Of matrix products in training."),
    option("--gradient-checkpointing", is_flag=True, help="Less memory for more time."),
    option("--checkpoint-every", type=COUNT, help="Steps between states that --resume continues from."),
    option("--validate-every", type=COUNT, help="Steps between validations; else at least an eighth of all."),
    option("--patience", type=COUNT, help="Stop after so many validations without improvement."),
    option("--teacher-cache", type=Size(), metavar="SIZE", help="Keep so much of the teacher's outputs on disk."),
)
again_options = together(  # what a run does not remember
    option("--device", type=Device(), metavar="DEVICE", help="auto, cpu, cuda or cuda:N."),
    remote_code,
)
evaluation_options = together(
    option(
        "--eval-data",
        type=FILE_OR_FOLDER,
        help="Samples for before and after, kept out of all else; else a part of --data.",
    ),
    option("--eval-samples", type=COUNT, help="At most so many of them."),
)
quality_limit = option(
    "--max-quality-drop",
    type=Number(min=0),
    metavar="POINTS",
    help="Exit with 4 if quality falls by more.",
)
formats_option = option(
    "--export", type=Names(), metavar="NAMES", help="Of onnx, torchscript, pt2, or none; else what is installed."
)
target_options = together(
    option(
        "--target",
        type=TEXT,
        multiple=True,
        metavar="NAME=AMOUNT",
        help=f"Cut what this needs, at most --ratio: {', '.join(QUANTITIES)}; as size=3MB or tpot=15ms; repeatable.",
    ),
    option("--cost", type=click.Choice(RANKED_BY), help="What importance is weighed against; milliseconds: measured."),
    option("--variants", type=Names(), metavar="NAMES", default=(), help="Precisions to choose among, or to export."),
    option("--backend", type=click.Choice(BACKENDS), help="What the targets are measured with."),
)
profile_stage_option = option("--profile/--no-profile", default=True, help="Measure latency and memory at the end.")
folder_options = together(
    option("--resume", is_flag=True, help="Continue an interrupted run after its last finished stage."),
    option("--overwrite", is_flag=True, help="Replace an earlier run."),
)
export_options = together(
    click.option("--format", "formats", type=Names(), metavar="NAMES", default="onnx", help="onnx, torchscript, pt2."),
    export_option("--dtype", type=click.Choice(EXPORTED_DTYPES), help="Of weights and cache."),
    export_option("--quantize", type=click.Choice(QUANTIZED), help="A second set of ONNX graphs, with such weights."),
    export_option("--variants", type=Names(), metavar="NAMES", help="All to write, as fp32,int8,q4."),
    export_option("--opset", type=Count(), help="Of the ONNX graphs."),
    export_option("--exporter", type=click.Choice(EXPORTERS), help="auto falls back to torchscript."),
    export_option("--fuse", type=click.Choice(FUSIONS), help="ONNX Runtime's fused operators for this device."),
    export_option("--image-size", type=ImageSize(), metavar="HxW", help="Of families with one fixed grid."),
    export_option("--data", type=FILE_OR_FOLDER, help="Samples to check with; else generated images."),
    export_option("--samples", type=COUNT, help="So many of them are generated for."),
    export_option("--max-new-tokens", type=COUNT, help="Longest generation in these checks."),
    export_option("--aoti", is_flag=True, help="Compile the torch.export programs (needs a C++ compiler)."),
    export_option("--bundle", is_flag=True, help="Add a README, and the folder as OUT.tar."),
    export_option("--seed", type=SEED, help="Of the choice of samples."),
    export_option("--overwrite", is_flag=True, help="Replace an earlier export."),
    remote_code,
)
profile_options = together(
    profile_option("--against", type=NAME, metavar="MODEL", help="The dense model; else SLIM is measured alone."),
    profile_option(
        "--backend", type=Names(), metavar="NAMES", help="torch, onnx, torchscript; a variant as onnx:int8, torch:int4."
    ),
    profile_option("--device", type=Device(), metavar="DEVICE", help="auto, cpu, cuda or cuda:N."),
    profile_option("--provider", type=click.Choice(PROVIDERS), help="Of ONNX Runtime; auto is the device's own."),
    profile_option("--threads", type=COUNT, help="On the CPU; else as many as physical cores."),
    profile_option("--dtype", type=click.Choice(DTYPES), help="Of the torch models; auto is the checkpoint's own."),
    profile_option("--batch-sizes", type=Listed(COUNT), metavar="N,N", help="Images and prompts at once."),
    profile_option("--image-sizes", type=Listed(ImageSize()), metavar="HxW,HxW", help="Else the processor's own."),
    profile_option(
        "--prompt-tokens", type=Listed(COUNT), metavar="N,N", help="With the image; else a short question's."
    ),
    profile_option("--new-tokens", type=Listed(COUNT), metavar="N,N", help="Tokens of an answer, whatever it says."),
    profile_option("--decoder-tests/--no-decoder-tests", help="Also pp512 and tg128, as llama-bench names them."),
    profile_option("--starts", type=COUNT, help="Of both processes per cell, at least; fewer than 3 decide nothing."),
    profile_option("--rounds", type=COUNT, help="At most so many turns of each model per cell."),
    profile_option("--cell-seconds", type=POSITIVE, help="No new start of a cell after so long."),
    profile_option("--data", type=FILE_OR_FOLDER, help="Images and questions to use; else noise."),
    profile_option("--seed", type=SEED, help="Of generated inputs."),
    profile_option("--max-ttft-ms", type=POSITIVE, help="Exit with 4 if the slim model's first token takes longer."),
    profile_option("--max-tpot-ms", type=POSITIVE, help="Exit with 4 if a later token takes longer."),
    profile_option("--max-memory", type=Size(), metavar="SIZE", help="Exit with 4 if the slim model takes more."),
    profile_option("--out", type=PATH, help="Written anew after every cell."),
    remote_code,
)
output_options = together(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
    click.option("--quiet", "-q", is_flag=True, help="No progress on stderr."),
)
apply_options = together(
    click.argument("model", type=NAME),
    click.argument("plan_file", metavar="PLAN", type=FILE),
    click.argument("out", type=PATH),
    click.option("--ratio", type=RATIO, help="Remove only so much of ALL parameters; else what the plan does."),
    click.option("--data", type=FILE_OR_FOLDER, help="The samples the plan was made with, to refit what is left."),
    click.option("--eval-data", type=FILE_OR_FOLDER, help="As given to plan: its images are left out."),
    model_options,
    output_options,
)
sparsify_options = together(
    click.argument("model", type=NAME),
    click.argument("out", type=PATH),
    sample_options,
    sparsify_option("--sparsity", type=click.Choice(list(PATTERNS)), help="Where zeros may be."),
    sparsify_option("--ratio", type=RATIO, help="Fraction of ALL parameters that become zero; else 0.35."),
    sparsify_option("--rule", type=click.Choice(list(RULES)), help="Which weights of a matrix become zero."),
    sparsify_option(
        "--allocator",
        type=click.Choice([name for name, row in ALLOCATORS.items() if name == "local" or row.asks]),
        help="How many of each attention and MLP.",
    ),
    sparsify_option("--samples", type=COUNT, help="Calibration samples."),
    sparsify_option("--tokens", type=TEXT, metavar="POOL", help=f"That count: {', '.join(POOLS)} or 'atv(ALPHA)'."),
    model_options,
    output_options,
)
frontier_options = together(
    click.argument("model", type=NAME),
    click.argument("out", type=PATH),
    frontier_option(
        "--ratios",
        type=Listed(Number(0, 1, max_open=True)),
        metavar="R,R",
        help="Fractions of ALL parameters to remove; the dense model is always measured.",
    ),
    frontier_option("--variants", type=Names(), metavar="NAMES", help="Precisions of every cut."),
    frontier_option("--exporter", type=click.Choice(EXPORTERS), help="As of export; torchscript is the faster one."),
    frontier_option("--times/--no-times", help="Without: sizes and quality; --resume takes the times."),
    frontier_option("--minutes", type=POSITIVE, help="Begin no cut that would end later; the most telling come first."),
    frontier_option("--target", multiple=True, type=TEXT, metavar="NAME=AMOUNT", help="Name the best under it."),
    frontier_option("--threads", type=COUNT, help="On the CPU; else as many as physical cores."),
    sample_options,
    samples_option,
    rounds_option,
    recover_option,
    steps_option,
    train_batch_option,
    evaluation_options,
    model_options,
    folder_options,
    output_options,
)
demo_options = together(
    click.argument("out", type=PATH),
    option("--ratio", type=RATIO, help="Fraction of ALL parameters to remove."),
    option("--seed", type=SEED, help="Of the choice of samples."),
    recover_option,
    steps_option,
    quality_limit,
    formats_option,
    profile_stage_option,
    folder_options,
    output_options,
)
