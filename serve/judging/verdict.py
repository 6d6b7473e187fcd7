"""What the measurements mean: what holds a phase back, how much of the cut's gain arrived, and where the rest went.

Rules, stated in the report as well: a phase is overhead-bound where neither moving its bytes nor computing its
operations takes OVERHEAD of the measured time; else it is bound by what takes longer. The ideal speed-up is the ratio
of the two models' roofs (roofline.py); measured / ideal is by definition how much better or worse the slim model uses
the device than the dense one. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

from slimvlm.serve.judging.roofline import ONE_PASS, Shapes, Work, compute_seconds, ideal_seconds, memory_seconds
from slimvlm.serve.profile import FASTER, SAME, SLOWER, TOO_NOISY, Cell, Device, Profile, Ratio, Verdict

OVERHEAD = 1 / 3
UNTOUCHED, WORTH_NAMING = 0.01, 0.05  # a part that lost less than the one, and is more than the other of what is left
LEAST_IDEAL = 1.02  # below it the cut left nothing out that could be gained
WORSE_USED = 0.9
# A matrix unit takes so many values of a row at once; widths in between cost as much as the next multiple.
MULTIPLES = {("cuda", "fp16"): 8, ("cuda", "bf16"): 8, ("cuda", "fp32"): 4, ("cpu", "bf16"): 16}
BOUND_RULE = (
    f"overhead-bound: neither moving the bytes nor computing takes {100 * OVERHEAD:.0f} % of the time; else bound by "
    "what takes longer at the measured rates"
)


@dataclass(frozen=True, slots=True)
class Judged:
    """A model in a cell: its work per phase, and its inner widths."""

    costs: Mapping[str, Work]
    shapes: Shapes


def judge_cell(cell: Cell, models: Mapping[str, Judged], device: Device) -> tuple[Verdict, ...]:
    """A verdict per phase that is one pass and was measured of `dense` and `slim`; the cell must be summarized.

    Args:
        models: `dense` and `slim`; with fewer there are no verdicts.
    """
    if not {"dense", "slim"} <= set(models):
        return ()
    return tuple(
        _judge(cell, phase, models, device)
        for phase in ONE_PASS
        if phase in cell.ratios and all(phase in judged.costs for judged in models.values())
    )


def _judge(cell: Cell, phase: str, models: Mapping[str, Judged], device: Device) -> Verdict:
    ratio = cell.ratios[phase]
    dense, slim = models["dense"].costs[phase], models["slim"].costs[phase]
    roofs = [ideal_seconds(cost, device, cell.dtype) for cost in (dense, slim)]
    ideal = roofs[0] / roofs[1]
    bound = _bound(slim, ratio.slim, device, cell.dtype)
    return Verdict(
        backend=cell.backend,
        phase=phase,
        workload=cell.workload,
        bound=bound,
        ideal=ideal,
        measured=ratio.value,
        reached=None if ideal < LEAST_IDEAL or ratio.verdict == TOO_NOISY else (ratio.value - 1) / (ideal - 1),
        because=(
            _uses(slim, ratio.slim, device, cell.dtype),
            *_too_noisy(ratio),
            *_overhead(bound, slim, dense, device),
            *_left_alone(bound, slim, dense),
            *_odd_widths(bound, models["slim"].shapes, device, cell.dtype),
            *_worse_used(roofs, ratio),
        ),
    )


def _bound(cost: Work, seconds: float, device: Device, dtype: str) -> str:
    memory, compute = memory_seconds(cost, device), compute_seconds(cost, device, dtype) or 0.0
    if max(memory, compute) < OVERHEAD * seconds:
        return "overhead"
    return "memory" if memory >= compute else "compute"


# ------------------------------------------------------------------ sentences


def _uses(cost: Work, seconds: float, device: Device, dtype: str) -> str:
    moved = memory_seconds(cost, device) / seconds
    computed = compute_seconds(cost, device, dtype)
    rate = "is not known for this dtype" if computed is None else _percent(computed / seconds)
    return f"The slim model uses {_percent(moved)} of the measured copy bandwidth; of the measured matmul rate: {rate}."


def _too_noisy(ratio: Ratio) -> Iterator[str]:
    if ratio.verdict == TOO_NOISY:
        yield f"The ratio is too noisy to decide ({ratio.low:.2f} to {ratio.high:.2f}): more rounds are needed."


def _overhead(bound: str, slim: Work, dense: Work, device: Device) -> Iterator[str]:
    if bound != "overhead":
        return
    least = slim.matmuls * device.launch_seconds
    yield (
        "Most of the time goes into neither: into starting operations, waiting, and what is not counted. The phase has "
        f"{slim.matmuls:.0f} matrix products (dense: {dense.matmuls:.0f}), which take {1000 * least:.3g} ms to start "
        "alone; a narrower model starts as many."
    )


def _left_alone(bound: str, slim: Work, dense: Work) -> Iterator[str]:
    """Parts that the cut did not make smaller."""
    what = "operations" if bound == "compute" else "bytes"
    left, before = (cost.flops if bound == "compute" else cost.bytes for cost in (slim, dense))
    total = sum(left.values())
    found = {
        part: value / total
        for part, value in left.items()
        if value >= WORTH_NAMING * total and value >= (1 - UNTOUCHED) * before.get(part, 0.0)
    }
    if found:
        ordered = sorted(found.items(), key=lambda item: -item[1])
        names = ", ".join(f"{part} ({_percent(share)})" for part, share in ordered)
        yield f"Not cut, of the slim model's {what} in this phase: {names}."


def _odd_widths(bound: str, shapes: Shapes, device: Device, dtype: str) -> Iterator[str]:
    multiple = MULTIPLES.get((device.kind, dtype))
    if bound != "compute" or multiple is None:
        return
    odd = sum(width % multiple > 0 for width in shapes.widths)
    if odd:
        yield (
            f"{odd} of {len(shapes.widths)} inner widths are no multiple of {multiple}, which matrix units of this "
            f"device fill badly in {dtype}; round them when the plan is made."
        )


def _worse_used(roofs: list[float], ratio: Ratio) -> Iterator[str]:
    used = [roof / seconds for roof, seconds in zip(roofs, (ratio.dense, ratio.slim), strict=True)]
    if ratio.verdict != TOO_NOISY and used[1] < WORSE_USED * used[0]:
        yield (
            f"The slim model comes to {_percent(used[1])} of its roof, the dense one to {_percent(used[0])} of its "
            "own: what does not shrink with the widths weighs more."
        )


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 else 1}f} %"


def nothing_faster(profile: Profile) -> str | None:
    """The sentence to say when no phase of any cell got faster, with the reason; None if one did or there is no dense
    model to compare with.
    """
    relations = Counter(ratio.verdict for cell in profile.cells for ratio in cell.ratios.values())
    if not relations or relations[FASTER]:
        return None
    counts = ", ".join(f"{relations[name]} {name}" for name in (SLOWER, SAME, TOO_NOISY) if relations[name])
    reason = "Measure on a quiet machine." if 2 * relations[TOO_NOISY] > relations.total() else _reason(profile)
    return f"Nothing got measurably faster: of {relations.total()} phases {counts}. {reason}"


def _reason(profile: Profile) -> str:
    if zeros := profile.models["slim"].zeros:
        return (
            f"{_percent(zeros)} of the slim model's parameters are zeros, which are stored and multiplied as any other "
            "number: no less work is left."
        )
    if not profile.verdicts:
        return "The work of the models is not compared (unknown shapes, or two backends), so the reason is not known."
    ideal = median(verdict.ideal for verdict in profile.verdicts)
    bound, count = Counter(verdict.bound for verdict in profile.verdicts).most_common(1)[0]
    if ideal < 1 + 5 * (LEAST_IDEAL - 1):
        return (
            f"The cut left almost all work of these phases in place: ideally they would be {ideal:.2f} times as fast."
        )
    share = f"{count} of {len(profile.verdicts)} judged phases are {bound}-bound"
    if bound == "overhead":
        return (
            f"The work fell (ideally {ideal:.2f} times as fast), but {share}: the time goes into starting operations, "
            "of which a narrower model has as many. Larger batches, an exported graph or fewer layers would help."
        )
    return f"The work fell (ideally {ideal:.2f} times as fast), but the slim model uses the device worse; {share}."
