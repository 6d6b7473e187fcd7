"""The options of what cuts: samples, what is removed, and how that is ranked; those of `CompressOptions`."""

from __future__ import annotations

import click

from slimvlm.compress.allocate.allocators import ALLOCATORS
from slimvlm.compress.criteria.criterion import CRITERIA, TAYLORS
from slimvlm.compress.options import ATTENTION_UNITS, KINDS, LAYOUTS, RANKED_BY, CompressOptions, SparsifyOptions
from slimvlm.compress.slicing.compensation import COMPENSATIONS
from slimvlm.compress.sparsity.rules import PATTERNS, RULES
from slimvlm.compress.statistics.rows import POOLS
from slimvlm.console.options.making import (
    COUNT,
    DATA,
    FILE,
    FILE_OR_FOLDER,
    FRACTION,
    NAME,
    PATH,
    RANKED,
    RATIO,
    REMOVED,
    SEED,
    TEXT,
    defaulting_to,
    model_options,
    option,
    output_options,
    panel,
    stream_option,
    together,
)
from slimvlm.console.options.values import Share, Size, shares
from slimvlm.serve.fitting.goals import QUANTITIES

cut_option, sparsify_option = map(defaulting_to, (CompressOptions, SparsifyOptions))
sample_options = panel(
    DATA,
    cut_option(
        "--data", type=FILE_OR_FOLDER, required=True, help="JSONL, LLaVA JSON, image folder or dataset directory."
    ),
    cut_option("--batch-size", type=COUNT, help="Samples per batch; squares are per batch in fisher, second and mix."),
    cut_option("--seed", type=SEED, help="Of the choice of samples, and of random scores."),
    cut_option(
        "--max-bad-samples", type=FRACTION, help="Fraction of unreadable samples skipped before data is refused."
    ),
)
split_option = panel(
    DATA,
    cut_option("--prefix-split", is_flag=True, help="Encoder-decoder models: split captions as the paper does."),
)
ratio_option = panel(REMOVED, cut_option("--ratio", type=RATIO, help="Fraction of ALL parameters to remove."))
rounds_option = panel(RANKED, cut_option("--rounds", type=COUNT, help="Calibrations, each on the model as cut so far."))
samples_option = panel(
    RANKED,
    cut_option("--samples", type=COUNT, help="Calibration samples per round; else 512, with --faithful 1000."),
)
attention_option = panel(
    REMOVED,
    cut_option("--attention-unit", type=click.Choice(ATTENTION_UNITS), help="What leaves an attention together."),
)
target_option = panel(
    REMOVED,
    cut_option(
        "--target",
        type=TEXT,
        multiple=True,
        metavar="NAME=AMOUNT",
        help=f"Cut what this needs, at most --ratio: {', '.join(QUANTITIES)}; as size=3MB or tpot=15ms; repeatable.",
    ),
)
removal_options = panel(
    REMOVED,
    cut_option("--tower-ratio", type=Share(), multiple=True, callback=shares, help="For one tower, as vision=0.3."),
    cut_option(
        "--kind-ratio", type=Share(*KINDS), multiple=True, callback=shares, help="For a kind, as attention=0.1."
    ),
    cut_option(
        "--depth-ratio", type=Share(), multiple=True, callback=shares, help="Whole blocks first, as language=0.2."
    ),
    cut_option("--round-channels", type=COUNT, help="MLP widths become multiples of this."),
    attention_option,
    cut_option("--layout", type=click.Choice(LAYOUTS), help="stock loads with the unmodified transformers class."),
    cut_option("--compensation", type=click.Choice(list(COMPENSATIONS)), help="What the weights that stay become."),
    option("--refit", "compensation", flag_value="refit", help="The same as --compensation refit."),
    option("--no-refit", "compensation", flag_value="none", help="The same as --compensation none."),
    cut_option(
        "--compensate-rounds/--no-compensate-rounds",
        help="Compensate between rounds too; each looks at what came of it.",
    ),
    cut_option("--guard", is_flag=True, help="Try a round first; where the loss jumps, give heads back for others."),
)
ranking_options = panel(
    RANKED,
    cut_option(
        "--criterion",
        type=click.Choice(CRITERIA),
        metavar="NAME",
        help=f"What a unit is worth: {', '.join(CRITERIA)}; see docs/methods.md.",
    ),
    cut_option("--faithful", is_flag=True, help="UKMP to the letter: ukmi, allocator paper, one round, no refit."),
    cut_option(
        "--allocator",
        type=click.Choice(list(ALLOCATORS)),
        metavar="NAME",
        help=f"Where units are taken: {', '.join(ALLOCATORS)}.",
    ),
    rounds_option,
    cut_option("--equal-rounds", is_flag=True, help="Of equal shares: for a plan that smaller ratios are cut from."),
    samples_option,
    cut_option("--grad-memory", type=Size(), metavar="SIZE", help="Bound on sums held at once, as 8GB."),
    cut_option("--host-sums", is_flag=True, help="Keep gradient sums in host memory while the model is on a GPU."),
    cut_option(
        "--tokens",
        type=TEXT,
        metavar="POOL",
        help=f"Those that criteria without gradients look at: {', '.join(POOLS)} or 'atv(ALPHA)'; else all.",
    ),
    cut_option(
        "--threshold", type=FRACTION, help="Ablation: fit below this probability counts as poor; 1: all tokens."
    ),
    cut_option("--entropy/--no-entropy", default=None, help="Ablation: weigh by the entropy of output angles."),
    cut_option("--taylor", type=click.Choice(TAYLORS), help="Ablation: variant of the criteria ukmi and taylor."),
)
cost_option = panel(
    RANKED,
    cut_option(
        "--cost", type=click.Choice(RANKED_BY), help="What importance is weighed against; milliseconds: measured."
    ),
)
apply_options = together(
    click.argument("model", type=NAME),
    click.argument("plan_file", metavar="PLAN", type=FILE),
    click.argument("out", type=PATH),
    panel(
        DATA,
        option("--data", type=FILE_OR_FOLDER, help="The samples the plan was made with, to refit what is left."),
        option("--eval-data", type=FILE_OR_FOLDER, help="As given to plan: its images are left out."),
    ),
    model_options,
    stream_option,
    panel(
        REMOVED, option("--ratio", type=RATIO, help="Remove only so much of ALL parameters; else what the plan does.")
    ),
    output_options,
)
sparsify_options = together(
    click.argument("model", type=NAME),
    click.argument("out", type=PATH),
    sample_options,
    model_options,
    stream_option,
    panel(
        REMOVED,
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
    ),
    output_options,
)
