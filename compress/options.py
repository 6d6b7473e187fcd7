"""Everything `slimvlm compress` can be told, as data: the options of every stage, and all of them together.

No torch: the command line reads its defaults from here.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from slimvlm.compress.files.decoding import decode_fields

TRUST_DISCOVERED = "SLIMVLM_TRUST_DISCOVERED"  # of the environment: --trust-discovered, for all processes of a run
STAGES = ("plan", "fit", "slice", "recover", "evaluate", "export", "profile", "frontier")
READ = ("model", "data", "eval_data", "recover_data", "teacher")  # options that name what is not in the run folder
ATTENTION_UNITS = ("auto", "kv-group", "query-slot")
KINDS = ("attention", "mlp")
LAYOUTS = ("per-layer", "stock")
RANKED_BY = ("parameters", "milliseconds")
TRAINED = ("lora", "projector", "lora+projector", "full")
SCHEDULES = ("cosine", "constant")
STREAM = ("auto", "on", "off")  # auto: where a model would not fit into the memory that is free
PRECISIONS = ("no", "bf16", "fp16")  # or auto
ROUNDED = {"q8": 8, "q4": 4, "q2": 2}  # variants that only round weights -> bits of one: what can be trained for
BLOCK = 32  # weights of a row that share a scale there
# How torchao holds weights of a checkpoint -> the dtype they compute in, where there is only one.
IN_TORCH: Mapping[str, str | None] = {"int8": None, "int4": "bfloat16"}
NOT_IDENTITY = (  # not what the model is made of
    "out", "device", "resume", "overwrite", "max_quality_drop", "export", "variants", "profile", "trust_remote_code",
    "target", "backend", "push_to_hub", "private", "stream",
)  # fmt: skip
# Any in this file: values of options of all types, as JSON has them.
NOT_GIVEN: Any = None  # an option that was not given has the value of one of these, by `faithful`
OURS: Mapping[str, Any] = {
    "samples": 512, "schedule": "cosine", "warmup": 10, "train_batch_size": 16, "clip": 1.0
}  # fmt: skip
PAPER: Mapping[str, Any] = {  # UKMP's 50 % script; it bounds no gradient
    "samples": 1000, "schedule": "constant", "warmup": 50, "train_batch_size": 20, "clip": 0.0, "learning_rate": 2e-5,
    "reset_optimizer": True,
}  # fmt: skip
PAPER_LITTLE = {**PAPER, "warmup": 100, "train_batch_size": 10, "learning_rate": 1e-5}  # its 20 % script
LITTLE_RATIO = 0.2


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """What a model is computed with: device, type of its weights, whether code it brings is run, and whether its blocks
    are read one after the other, by the stages that can (one of STREAM).
    """

    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    stream: str = "auto"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ComputeOptions):
    """A model, and the samples it is asked about.

    Attributes:
        model: checkpoint folder, or a hub name.
        data: samples; of a run those it calibrates on.
        eval_samples: at most so many are evaluated with.
        max_bad_samples: fraction of unreadable ones that is skipped.
        prefix_split: split captions as the paper does (encoder-decoder models).
    """

    model: str
    data: Path
    eval_samples: int | None = None
    batch_size: int = 16
    seed: int = 0
    max_bad_samples: float = 0.01
    prefix_split: bool = False


@dataclass(frozen=True, kw_only=True)
class SparsifyOptions(EvaluateOptions):
    """Which single weights become zero, in a model of the same shapes.

    Attributes:
        out: the checkpoint that is written.
        sparsity: `unstructured`, or `2:4`: two of every four neighbours in a row.
        ratio: fraction of ALL parameters that become zero, 0.35 where none is given; of 2:4 it is half of what the
            attentions and MLPs hold, and none can be given.
        rule: which weights of a matrix: `wanda` or `sparsegpt`.
        allocator: how many of each group: `local`, the same share of all, `ecoflap` or `ecoflap-first`.
        samples: to calibrate on.
        tokens: of the text model's, those that count: `all`, `text`, `image`, `atv` or `atv(ALPHA)`.
    """

    out: Path
    sparsity: str = "unstructured"
    ratio: float | None = None
    rule: str = "wanda"
    allocator: str = "local"
    samples: int = 128
    tokens: str = "all"


@dataclass(frozen=True, kw_only=True)
class PlanOptions(EvaluateOptions):
    """What is cut, how that is decided, and how what is left is fitted.

    Attributes:
        eval_data: samples for the before/after comparison; default: those of `data` that were not calibrated on.
        ratio: fraction of ALL parameters to remove.
        faithful: the paper's method to the letter: its rows (criterion `ukmi`, allocator `paper`, recipe `lpd-paper`),
            one round, no refit, and its schedule in the recovery. Give it when the options are made: what is asked of
            the training besides it stays, also where it is our default. It is spelled out by `resolved`, and nobody
            else reads it.
        rounds: re-calibrations on the partly cut model while the ratio grows.
        equal_rounds: each takes the same share; else the first ones take more. For a plan that is to serve smaller
            ratios too: see docs/choosing.md.
        compensate_rounds: what the compensation can do between rounds is done there too; each looks at what came of it.
        guard: a round is tried, refitted, on some of the samples; attentions with which the loss jumps are left alone.
        samples: calibration samples per round; 512, or with `faithful` the paper's 1000.
        grad_memory: bound in bytes on the sums held at once, of gradients or of the refit; None: none, or
            (refit) a quarter of the fp32 weights.
        host_sums: keep gradient sums in host memory while the model is on a GPU.
        tokens: of the text model's, those that a criterion without gradients looks at: `all`, `text`, `image`, `atv`
            or `atv(ALPHA)`; None: what the criterion says.
        threshold, entropy, taylor: ablations; None: what the criterion says. A threshold of 1 selects all tokens.
        depth_ratio: tower -> fraction of its parameters that leaves as whole blocks, by their influence, before the
            widths of the others are chosen, which make up for the rest of `ratio`. None given: of the layout `stock` as
            the loss of cuts that are tried says.
        cost: what importance is weighed against: `parameters`, or the `milliseconds` a target of time speaks of.
        compensation: what the weights that stay become; `refit` fits the kept columns of output projections to the
            dense outputs, by least squares, `none` leaves them as they are.
    """

    eval_data: Path | None = None
    ratio: float = 0.5
    criterion: str = "gate"
    faithful: bool = False
    allocator: str = "global"
    rounds: int = 4
    equal_rounds: bool = False
    tower_ratio: Mapping[str, float] = field(default_factory=dict)
    kind_ratio: Mapping[str, float] = field(default_factory=dict)
    depth_ratio: Mapping[str, float] = field(default_factory=dict)
    round_channels: int = 1
    attention_unit: str = "auto"
    layout: str = "per-layer"
    cost: str = "parameters"
    compensation: str = "refit"
    compensate_rounds: bool = True
    guard: bool = False
    samples: int = NOT_GIVEN
    grad_memory: int | None = None
    host_sums: bool = False
    tokens: str | None = None
    threshold: float | None = None
    entropy: bool | None = None
    taylor: str | None = None

    def __post_init__(self) -> None:
        paper = PAPER_LITTLE if self.ratio <= LITTLE_RATIO else PAPER
        for name, value in (paper if self.faithful else OURS).items():
            if getattr(self, name, value) is NOT_GIVEN:
                object.__setattr__(self, name, value)

    @property
    def angles(self) -> str:
        """The statistic of angles that UKMI weighs by."""
        return "paper-angles" if self.faithful else "angles"


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The low-rank layers of a recovery.

    Attributes:
        rank: of the plain branch.
        recall_rank: of the recall branch; a layer that lost fewer rows (columns) than this takes their number.
        alpha: what both branches give is multiplied by alpha / rank.
        dropout: on the input of the plain branch only.
        recall: add the branch through the pruned weights ("weight recalling").
        targets: endings of module paths (`q_proj`, `mlp.fc1`); empty: every linear that can be cut.
    """

    rank: int = 8
    recall_rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    recall: bool = True
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a student is trained. What is not given here the recovery chooses by the model, the data and the recipe.

    Attributes:
        steps: optimiser steps, over all stages; not given: what `epochs` passes over the data are.
        train_batch_size: samples per optimiser step, over all processes; 16, or with `faithful` the paper's.
        accumulate: parts a process computes its share of a batch in: less memory, same result but for feature losses,
            which are one cosine per part.
        learning_rate: after the warm-up; not given: by what is trained and the model's width, or the paper's.
        schedule, warmup: of the learning rate (`constant`, or `cosine` down to 0), and its linear warm-up in steps;
            cosine and 10, or the paper's.
        weight_decay: of AdamW; vectors (biases, norms) do not decay.
        clip: largest norm of a gradient, 0 for any; 1, or the paper's 0.
        reset_optimizer: start every stage with a fresh optimiser, warm-up and schedule; not given: where there are
            stages.
        precision: dtype of the matrix products: `no` (that of the weights), `bf16`, `fp16`; auto: bf16 where the device
            has it.
        gradient_checkpointing: compute activations again in the backward pass: less memory, more time, same result.
        checkpoint_every: steps between two checkpoints, from which a killed training goes on.
        validate_every: steps between two validations.
        patience: stop after so many validations of the last stage without improvement.
    """

    steps: int = NOT_GIVEN
    train_batch_size: int = NOT_GIVEN
    accumulate: int = 1
    learning_rate: float = NOT_GIVEN
    schedule: str = NOT_GIVEN
    warmup: int = NOT_GIVEN
    weight_decay: float = 0.05
    clip: float = NOT_GIVEN
    reset_optimizer: bool = NOT_GIVEN
    precision: str = "auto"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 100
    validate_every: int = NOT_GIVEN
    patience: int | None = None


@dataclass(frozen=True, kw_only=True)
class RecoverOptions(LowRank, TrainOptions):
    """Options of the recovery; the names are the command line's.

    Attributes:
        recover: `lpd` (progressive distillation), `lpd-paper`, a sum of losses (`sft+0.5*kl`), `blockwise` alone or
            before one of these, or `none`.
        recover_data: samples to train on; default: those of `data` that are not evaluated with.
        data_fraction: seeded share of them that is used.
        validation_samples: so many are held out, by image, to choose the best state; None: at most 256, and so few that
            validations read at most 15 % of what the training reads.
        teacher: checkpoint to learn from; default: the dense model.
        train: `lora`, `projector`, `lora+projector` or `full`.
        frozen: form (of IN_TORCH) in which the teacher, and the weights under low-rank layers, are held while these are
            trained; None: as they are.
        staged: let the set of supervised blocks grow; False: all losses all the time.
        block_share: of the steps, for `blockwise` before another recipe; None: the recipe's own.
        feature_share: of the samples, for the stages in which it grows; None: the recipe's own.
        temperature: of the kl and rkl losses.
        hidden_states: which states of the language model the hidden loss compares, -1 the last, 0 the embeddings; in
            a student that lacks blocks, what its blocks give that follow those of the dense model.
        epochs: passes over the data, where no steps are given.
        teacher_cache: bytes on disk to keep the teacher's outputs in.
        recover_as: variant of the export whose rounding of weights the student is trained with; None: none.
    """

    recover: str = "lpd"
    recover_as: str | None = None
    recover_data: Path | None = None
    data_fraction: float = 1.0
    validation_samples: int | None = None
    teacher: str | None = None
    train: str = "lora"
    frozen: str | None = None
    staged: bool = True
    block_share: float | None = None
    feature_share: float | None = None
    temperature: float = 1.0
    hidden_states: tuple[int, ...] = (-1,)
    epochs: float = 1.0
    teacher_cache: int | None = None

    def recovery_identity(self) -> dict[str, Any]:
        """What makes two recoveries of one run the same."""
        names = {field.name for field in fields(RecoverOptions)} - {"teacher_cache"}
        return {name: value for name, value in _plain(self).items() if name in names}


@dataclass(frozen=True, kw_only=True)
class LearnOptions(EvaluateOptions, RecoverOptions):
    """A recovery with the model and the samples it is for."""


@dataclass(frozen=True, kw_only=True)
class CutOptions(PlanOptions, LearnOptions):
    """What is cut and how it is trained afterwards, and the folder `out` that both go to."""

    out: Path
    resume: bool = False
    overwrite: bool = False

    def resolved(self) -> Self:
        """The same options with the rows and settings that `faithful` stands for."""
        if not self.faithful:
            return self
        plan: dict[str, Any] = {"criterion": "ukmi", "allocator": "paper", "rounds": 1, "attention_unit": "kv-group"}
        terms = ("lpd-paper" if term.strip() == "lpd" else term for term in self.recover.split("+"))
        return replace(
            self, **plan, round_channels=1, compensation="none", compensate_rounds=False, recover="+".join(terms)
        )

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run; the recovery is apart, a finished run can be recovered again otherwise."""
        apart = {*NOT_IDENTITY, *(field.name for field in fields(RecoverOptions))}
        return {name: value for name, value in _plain(self).items() if name not in apart}


@dataclass(frozen=True, kw_only=True)
class DeliverOptions(EvaluateOptions):
    """What is made of the slim model at the end.

    Attributes:
        export: formats to export it in; none where it is empty; None: TorchScript, and ONNX where its packages are
            installed.
        variants: precisions of the ONNX graphs; none: fp32. With a target one of them is chosen.
        profile: measure latency and memory of the dense and the slim model.
        max_quality_drop: largest accepted loss in points of the mean metric; crossing it is a failed check.
        push_to_hub: repository on the Hub that the checkpoint goes to, if no check failed; None: none.
        private: it is made as a private one.
    """

    export: tuple[str, ...] | None = None
    variants: tuple[str, ...] = ()
    profile: bool = True
    max_quality_drop: float | None = None
    push_to_hub: str | None = None
    private: bool = False


@dataclass(frozen=True, kw_only=True)
class FitOptions(PlanOptions, DeliverOptions):
    """What the device allows: the cut is as small as meets it, and `ratio` the most that may be removed.

    Attributes:
        target: `NAME=AMOUNT`, at most one of a name.
        backend: what runs the slim model: `torch`, `onnx` or `torchscript`.
    """

    target: tuple[str, ...] = ()
    backend: str = "onnx"


@dataclass(frozen=True, kw_only=True)
class CompressOptions(CutOptions, FitOptions):
    """Options of the one-shot job: those of its stages; the names are the command line's."""

    @classmethod
    def of_run(cls, out: Path, identity: Mapping[str, Any], **changes: Any) -> CompressOptions:
        """The options of an earlier run, from its `identity`, with `changes`.

        Raises:
            ValueError: the field that is unknown, missing or of another type.
        """
        apart = {*NOT_IDENTITY, *(field.name for field in fields(RecoverOptions))}
        known = {name: hint for name, hint in typing.get_type_hints(cls).items() if name not in apart}
        return cls(**{**decode_fields(identity, known, "options"), "out": out, "resume": True, **changes})


def _plain(options: RecoverOptions) -> dict[str, Any]:
    """The fields as JSON types."""
    convert = {Path: str, tuple: list}
    return {
        name: next((convert[kind](value) for kind in convert if isinstance(value, kind)), value)
        for name, value in asdict(options).items()
    }
