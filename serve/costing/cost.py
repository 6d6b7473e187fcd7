"""What a compression takes, by the shapes of a model alone: seconds, memory and disk of every stage, on a machine.

A stage is a list of ideal times: the matrix products at the machine's rate, the weights moved through its memory, as
many operations launched, bytes of files digested, read, streamed and written. What it takes is their sum, each times
a factor (`fitted.json`) that was fitted to real runs by `benchmarks/scale.py --fit`. One at a time, nothing overlaps:
that is what two cores do; on a GPU it is cautious.

A calibration computes a forward pass and the backward pass of the activations, which costs as much, and the attention
twice. Streamed, the blocks' forward is computed once more on the way back (Chen et al., 2016), and their weights are
read twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from slimvlm.compress.evaluation.equality import CHECKED_SAMPLES
from slimvlm.compress.models.streaming.weights import HELD
from slimvlm.compress.rounds import Planning, round_share
from slimvlm.compress.streaming.pages import KEPT
from slimvlm.compress.streaming.room import BESIDE, TAUGHT
from slimvlm.export.variants import VARIANTS
from slimvlm.serve.costing.anatomy import Anatomy, BlockKind
from slimvlm.serve.costing.asked import Asked
from slimvlm.serve.costing.factors import RESOURCES, Factors, Ideal, fitted
from slimvlm.serve.costing.machines import Machine
from slimvlm.serve.judging.roofline import ATTENTION, Sizes, Work, count_costs, image_features

TABLE_READINGS = 5  # of the table of embeddings and of the head by an export
EXPORT_READINGS = 4  # of all weights: two by torch's forward passes, one to write them, one to look at what was rounded
SHARD = 10**9  # bytes of a file of weights that is written at once
LEAST, MOST = 128 * 2**20, 4 * 2**30  # of the refit's sums held at once, as slicing/refit.py has it
TRAINED = 1000  # samples that a recovery is told for


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a stage takes. Of bytes of files `read` counts every time, `scratch` what lies there meanwhile.

    Attributes:
        seconds, peak_bytes: with the whole model in memory; `streamed_...`: block by block, None where it cannot be.
    """

    name: str
    does: str
    seconds: float
    peak_bytes: int
    streamed_seconds: float | None
    streamed_peak_bytes: int | None
    read_bytes: int
    streamed_read_bytes: int | None
    written_bytes: int
    scratch_bytes: int


@dataclass(frozen=True, slots=True)
class PartCost:
    """A block of a tower, per token: operations forward, backward, and of the recomputation when streamed."""

    tower: str
    blocks: int
    parameters: int
    stored_bytes: int
    tokens: int
    forward_flops: float
    backward_flops: float
    recomputed_flops: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What a compression takes on a machine; `runs`: what the factors were fitted to."""

    machine: str
    measured: bool
    runs: tuple[str, ...]
    memory_bytes: int
    parts: tuple[PartCost, ...]
    stages: tuple[StageCost, ...]

    @property
    def disk_bytes(self) -> int:
        """Free space that is needed at once: all that is written (of both recoveries one checkpoint), and the largest
        scratch folder.
        """
        written = sum(stage.written_bytes for stage in self.stages if stage.name != "blockwise")
        return written + max(stage.scratch_bytes for stage in self.stages)


def cost_of(anatomy: Anatomy, asked: Asked, machine: Machine) -> Cost:
    """What the stages of a compression take."""
    model = CostModel(anatomy, asked, machine)
    return Cost(
        machine=machine.says,
        measured=machine.measured,
        runs=tuple(fitted()["runs"]),
        memory_bytes=machine.memory_bytes,
        parts=tuple(model.part(kind) for kind in anatomy.blocks),
        stages=tuple(model.stages()),
    )


class CostModel:
    """The stages of a compression as sums of ideal times, and their bytes."""

    def __init__(self, anatomy: Anatomy, asked: Asked, machine: Machine, factors: Factors | None = None) -> None:
        self.anatomy, self.asked, self.machine, self.factors = anatomy, asked, machine, factors or fitted()
        pixels = (1, 3, anatomy.side, anatomy.side)
        dual = anatomy.shapes.kind == "dual-encoder"
        self.text = asked.text_tokens + (0 if dual else image_features(anatomy.shapes, pixels))
        height, width = (anatomy.side // side for side in anatomy.shapes.patch)
        self.tokens = {"patch": height * width + anatomy.shapes.class_tokens, "text": self.text}
        self.stored = anatomy.parameters * anatomy.itemsize
        self.resident = (anatomy.parameters - anatomy.in_blocks) * anatomy.itemsize
        self.block = max(kind.parameters for kind in anatomy.blocks) * anatomy.itemsize

    @property
    def batch(self) -> int:
        """Samples at once: as many as the machine takes, if memory holds them beside the whole model; one at least."""
        room = self.machine.memory_bytes - self._peak(self.stored)
        return max(1, min(self.machine.batch_size, int(room / self._kept())))

    # -------------------------------------------------------------- ideal times

    def passes(self, samples: float, forward: float, backward: float, dtype: str | None = None) -> Ideal:
        """So many forward and backward passes over samples, which the devices divide among them."""
        dtype = dtype or self.anatomy.dtype
        batch = min(self.batch, max(1, math.ceil(samples)))
        work, batches = self._work(batch, dtype), samples / batch / self.machine.devices
        attention = work.flops.get(ATTENTION, 0.0)
        flops = forward * work.total_flops + backward * (work.total_flops + attention)
        return Ideal(
            compute=batches * flops / self._rate(dtype),
            traffic=batches * (forward + backward) * work.total_bytes / self._bandwidth,
            launch=batches * (forward + backward) * work.matmuls * self.machine.launch_seconds,
        )

    def calibration(self, samples: float, streamed: bool) -> Ideal:
        """One reading of the samples by the default criterion."""
        return self.passes(samples, 2 if streamed else 1, 1) + (self._streaming(2) if streamed else Ideal())

    def refit(self, left: float, streamed: bool) -> Ideal:
        """Sums of x x^T, and the systems solved with them, of the output projections of a model of that size."""
        flops, sums = 0.0, 0.0
        for one in self.anatomy.projections:
            inner, kept = left * one.inner, left * (1 - self.asked.ratio) * one.inner
            lost = inner - kept
            solved = 2 / 3 * kept**3 + 2 * kept * one.width * (kept + lost)
            checked = 2 * one.width * (2 * inner**2 + lost**2)
            flops += 2 * self.asked.samples / self.machine.devices * self.tokens[one.sees] * inner**2 + solved + checked
            sums += 4 * inner**2
        readings = 1 if streamed else max(1, math.ceil(sums / self._sums_held()))
        seconds = Ideal(compute=flops / self._rate("fp32"), traffic=4 * sums / self._bandwidth)
        return (
            seconds
            + self.passes(readings * self.asked.samples, 1, 0).times(left)
            + (self._streaming(1) if streamed else Ideal())
        )

    def loading(self, size: float, streamed: bool) -> Ideal:
        """A checkpoint of so many bytes is checked and read; streamed, only what stays in memory is read."""
        share = self.resident / self.stored if streamed else 1
        return Ideal(digest=size / self.machine.digest_bytes_per_second, read=share * size / self._file_rate)

    def _streaming(self, times: float) -> Ideal:
        return Ideal(stream=times * self.anatomy.in_blocks * self.anatomy.itemsize / self._file_rate)

    @property
    def _file_rate(self) -> float:
        """Bytes of files per second: from the disk, or from the system's cache at the rate of the memory."""
        return self.machine.bytes_per_second if self.asked.cached else self.machine.read_bytes_per_second

    def _writing(self, size: float) -> Ideal:
        return Ideal(
            write=size / self.machine.write_bytes_per_second, digest=size / self.machine.digest_bytes_per_second
        )

    def _work(self, batch: int, dtype: str) -> Work:
        pixels = (batch, 3, self.anatomy.side, self.anatomy.side)
        phases = count_costs(self.anatomy.shapes, Sizes(batch, pixels, self.text, 1, self.asked.answer_tokens), dtype)
        return phases["ttft"] if "ttft" in phases else phases["vision"].plus(phases["text"])

    def _rate(self, dtype: str) -> float:
        return self.machine.efficiency * self.machine.flops_per_second[dtype]

    @property
    def _bandwidth(self) -> float:
        return self.machine.efficiency * self.machine.bytes_per_second

    def _sums_held(self) -> float:
        return min(MOST, max(LEAST, self.anatomy.parameters))

    # -------------------------------------------------------------- bytes

    def _kept(self) -> float:
        """What a forward pass over one sample keeps for its backward pass."""
        values = sum(
            kind.blocks * self.tokens[kind.sees] * (kind.width + kind.attention + kind.macs / max(kind.width, 1) / 3)
            for kind in self.anatomy.blocks
        )
        return self.factors["bytes"]["kept"] * values * self.anatomy.itemsize

    @property
    def _depth(self) -> int:
        return sum(kind.blocks for kind in self.anatomy.blocks)

    def _inputs(self, samples: int) -> float:
        """Inputs of all blocks for samples."""
        states = sum(kind.blocks * self.tokens[kind.sees] * kind.width for kind in self.anatomy.blocks)
        return samples * states * self.anatomy.itemsize

    def _taught(self) -> float:
        """What the samples of a recovery hold on their way through a streamed teacher: so many of them go as fit."""
        state = max(self.tokens[kind.sees] * kind.width for kind in self.anatomy.blocks) * self.anatomy.itemsize
        return min(TRAINED * (1 + BESIDE) * state, TAUGHT)

    def _largest_sums(self, streamed: bool) -> float:
        """Of the refit, with what is solved beside it."""
        if not self.asked.refit:
            return 0
        largest = max((4 * one.inner**2 for one in self.anatomy.projections), default=0)
        return 2 * largest if streamed else max(self._sums_held(), largest) + largest

    def _peak(self, model: float, besides: float = 0) -> int:
        return round(self.factors["bytes"]["base"] + model + besides)

    # -------------------------------------------------------------- stages

    def ideal(self, stage: str, streamed: bool) -> Ideal:
        """The stage as ideal times, by resource."""
        asked, left, stored = self.asked, self.asked.left, self.stored
        checks = self.passes(2 * CHECKED_SAMPLES, 1, 0, "fp32") + self.passes(2 * CHECKED_SAMPLES, 1, 0).times(left)
        tried = self.passes(1, 1, 0) + (self._streaming(1) if streamed else Ideal())  # one sample, whether it computes
        if stage == "plan":
            found = self.loading(stored, streamed) + tried
            for number, share in enumerate(_shares(asked), start=1):
                found += self.calibration(asked.samples, streamed).times(share)
                if asked.refit and number < asked.rounds:
                    found += self.refit(share, streamed)
            return found
        if stage == "slice":
            fitted_to = self.refit(1.0, streamed) if asked.refit else Ideal()
            # Of the masked model, the cut one twice, and when it is saved; and of the new one.
            read = self._streaming(4) + self._streaming(left) if streamed else Ideal()
            saved = self._writing(left * stored) + self.loading(left * stored, streamed)
            return self.loading(stored, streamed) + tried + fitted_to + checks + read + saved
        if stage == "recover":
            student = self.passes(TRAINED, 1, 1).times(left)
            return self.loading(stored, False) + student + self.passes(TRAINED, 1, 0)
        if stage == "blockwise":
            # All batches go through the dense blocks together; where these are streamed, once more as they are learnt.
            student, taught = self.passes(TRAINED, 1, 1).times(left), self.passes(TRAINED, 2 if streamed else 1, 0)
            read = self._streaming(1 + left) if streamed else Ideal()
            return self.loading((1 + left) * stored, streamed) + student + taught + read + self._writing(left * stored)
        if stage == "evaluate":
            return self.loading((1 + left) * stored, False) + self.passes(asked.samples, 1, 0).times(2 + left)
        packed = 4 * left * self.anatomy.parameters  # export
        matmuls = self._work(1, self.anatomy.dtype).matmuls
        traced = Ideal(trace=matmuls * self.machine.launch_seconds, pack=packed / self.machine.bytes_per_second)
        tables = Ideal(stream=TABLE_READINGS * self.resident / self._file_rate)
        read = self._streaming(EXPORT_READINGS * left) + tables if streamed else Ideal()
        return self.loading(left * stored, streamed) + traced + read + self._writing(self._exported())

    def _exported(self) -> float:
        return self.asked.left * self.anatomy.parameters * VARIANTS[self.asked.variant].weight_bytes

    def peak(self, stage: str, streamed: bool) -> int:
        """Largest resident set of a process that does the stage."""
        stored, left = self.stored, self.asked.left
        if streamed:
            moving, largest = self.resident + 2 * self.block, 4 * self.anatomy.largest
            if stage == "export":  # a table as it is stored and in fp32, and the block that is read meanwhile
                table, block = self.anatomy.itemsize * self.anatomy.largest, 4 * self.block / self.anatomy.itemsize
                return self._peak(table + largest + block, self.factors["bytes"]["graphs"])
            kept = self.batch * self._kept() / self._depth
            # A shard is written, or a weight is in fp32 where the cut is checked.
            saved = max(min(SHARD, left * stored), largest - self.block)
            # Of a block's inputs there are those it read, and what stands for them where the one before gave them.
            more = {
                "plan": min(2 * self._inputs(self.asked.samples), KEPT) + kept,
                "slice": self._largest_sums(True) + saved,
                # The cut model's too, of which one block is there.
                "blockwise": self.resident + left * self.block + min(self._taught(), KEPT) + kept,
            }
            return self._peak(moving, more.get(stage, 0))
        between = self._largest_sums(False) if self.asked.rounds > 1 else 0
        model, besides = {
            "plan": (stored, max(self.batch * self._kept(), between)),
            # Cut in place, then held against what was saved; checked in fp32.
            "slice": (max(1, 2 * left) * stored, self._largest_sums(False) + 8 * self.anatomy.largest),
            "recover": ((1 + left) * stored, 2 * self.batch * self._kept()),
            # What blocks are given and are to give, and what one keeps.
            "blockwise": ((1 + left) * stored, self.batch * (2 * self._inputs(1) + self._kept() / self._depth)),
            "evaluate": (stored, self.batch * self._kept() / 10),
            "export": (8 * left * self.anatomy.parameters, self.factors["bytes"]["graphs"]),
        }[stage]
        return self._peak(model, besides)

    def stages(self) -> Iterator[StageCost]:
        """All of them, in their order."""
        asked, left = self.asked, self.asked.left
        refitted = sum(one.inner * one.width for one in self.anatomy.projections) * self.anatomy.itemsize * asked.refit
        put_away = max(0, refitted - HELD)
        scratch = {"plan": max(0, round(self._inputs(self.asked.samples) - KEPT)) + put_away, "slice": put_away}
        scratch["blockwise"] = max(0, round(self._taught() - KEPT))
        does = {
            "plan": f"{asked.rounds} rounds of {asked.samples} samples",
            "slice": "refit, cut, saved and checked" if asked.refit else "cut, saved and checked",
            "recover": f"for every {TRAINED:,} samples trained on",
            "blockwise": "the same of a recovery block by block, in its place or before it",
            "evaluate": f"{asked.samples} questions, dense, with the images shuffled, and slim",
            "export": f"ONNX graphs, {asked.variant}",
        }
        written = dict.fromkeys(("slice", "recover", "blockwise"), left * self.stored) | {"export": self._exported()}
        for name, said in does.items():
            streams = name not in ("recover", "evaluate")
            yield StageCost(
                name=name,
                does=said,
                seconds=self.seconds(name, False),
                peak_bytes=self.peak(name, False),
                streamed_seconds=self.seconds(name, True) if streams else None,
                streamed_peak_bytes=self.peak(name, True) if streams else None,
                read_bytes=round(self.read(name, False)),
                streamed_read_bytes=round(self.read(name, True)) if streams else None,
                written_bytes=round(written.get(name, 0)),
                scratch_bytes=scratch.get(name, 0),
            )

    def seconds(self, stage: str, streamed: bool) -> float:
        """What the stage takes."""
        return self.sum(self.ideal(stage, streamed))

    def sum(self, ideal: Ideal) -> float:
        """Seconds that it takes really."""
        return math.fsum(self.factors["seconds"][name] * getattr(ideal, name) for name in RESOURCES)

    def read(self, stage: str, streamed: bool) -> float:
        """Bytes of files that the stage reads, a digest's included."""
        ideal = self.ideal(stage, streamed)
        digested = ideal.digest * self.machine.digest_bytes_per_second
        return digested + self._file_rate * (ideal.read + ideal.stream)

    def part(self, kind: BlockKind) -> PartCost:
        """A block of a tower, per token."""
        tokens = self.tokens[kind.sees]
        attention = 4.0 * kind.attention * tokens
        forward = 2.0 * kind.macs + attention
        return PartCost(
            tower=kind.tower,
            blocks=kind.blocks,
            parameters=kind.parameters,
            stored_bytes=kind.parameters * self.anatomy.itemsize,
            tokens=tokens,
            forward_flops=forward,
            backward_flops=forward + attention,
            recomputed_flops=forward,
        )


def _shares(asked: Asked) -> list[float]:
    """Share of the parameters that each round looks at: the model as it is cut so far."""
    removed = (round_share(done, asked.rounds, Planning.power) if done else 0.0 for done in range(asked.rounds))
    return [1 - asked.ratio * share for share in removed]
