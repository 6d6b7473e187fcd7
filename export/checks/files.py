"""The checks of an export: every file is opened once, runs its cases and, with the other graphs, whole answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from slimvlm.compress.progress import Progress
from slimvlm.export.checks.parity import Case, Difference, measure
from slimvlm.export.checks.reference import Reference, check_tokens, graph_ports, port_of
from slimvlm.export.graphs.graph import Graph
from slimvlm.export.graphs.sizes import is_streamed
from slimvlm.export.running.generation import Runner
from slimvlm.export.running.manifest import Artifact, Manifest
from slimvlm.export.running.runners import Opened, runner_of
from slimvlm.export.variants import VARIANTS
from slimvlm.export.writers.rounding import WITHIN
from slimvlm.export.writers.tracing import first_line


def check_graphs(
    folder: Path,
    artifacts: Sequence[Artifact],
    graphs: Sequence[Graph],
    reference: Reference,
    manifest: Manifest,
    progress: Progress,
) -> None:
    """Checks the files of these graphs, each format and variant, and notes in `manifest` what was found."""
    manifest.generation = reference.prompting
    sets: dict[str, list[Artifact]] = {}
    open_runner = _parted if any(is_streamed(graph.module) for graph in graphs) else runner_of
    for artifact in artifacts:
        _note_ports(artifact, next(graph for graph in graphs if graph.name == artifact.graph), reference)
        sets.setdefault(artifact.backend, []).append(artifact)
    for done, together in enumerate(sets.values()):
        progress("check", done, len(sets))
        _check_set(partial(open_runner, folder, together), together, reference, manifest)
    progress("check", len(sets), len(sets))


def _note_ports(artifact: Artifact, graph: Graph, reference: Reference) -> None:
    """Inputs, and outputs as the first case shows them; varying axes by name."""
    artifact.inputs = list(graph_ports(graph))
    seen = next(case.outputs for case in reference.cases if case.graph == graph.name)
    artifact.outputs = [port_of(name, seen[name], axes) for name, axes in graph.outputs.items()]


def _parted(folder: Path, artifacts: Sequence[Artifact]) -> Opened:
    """Of graphs of a model that is not in memory."""
    from slimvlm.export.running.parts import PartedRunner

    return PartedRunner({artifact.graph: folder / artifact.file for artifact in artifacts})


def _check_set(
    open_runner: Callable[[], Opened], artifacts: list[Artifact], reference: Reference, manifest: Manifest
) -> None:
    """One format and variant: all its graphs alone, then together."""
    form, variant = artifacts[0].format, artifacts[0].variant
    judged = asdict(VARIANTS[variant].tolerance)
    if _decided_by_answers(variant, reference):
        judged = {name: value for name, value in judged.items() if name not in ("relative", "cosine")}
    manifest.tolerances[variant] = judged
    try:
        runner = open_runner()
    except Exception as error:  # a runtime that cannot load its own file: that is what is checked here
        for artifact in artifacts:
            artifact.ok = False
        manifest.failures.append(f"{form} {variant} cannot be loaded ({first_line(error)})")
        return
    _check_outputs(runner, artifacts, reference, manifest)
    if reference.prompting is not None and all(artifact.ok for artifact in artifacts):
        _check_generation(runner, (form, variant), reference, manifest)


def _decided_by_answers(variant: str, reference: Reference) -> bool:
    """Whether outputs of single graphs are noted without a verdict: weights are rounded, in a model that answers."""
    return VARIANTS[variant].is_rounded and reference.prompting is not None


def _check_outputs(runner: Opened, artifacts: list[Artifact], reference: Reference, manifest: Manifest) -> None:
    """All graphs of a variant on all cases."""
    cases = [case for artifact in artifacts for case in reference.cases if case.graph == artifact.graph]
    found = runner.together([partial(_run, runner, case) for case in cases])
    for artifact in artifacts:
        mine = [(case.what, one) for case, one in zip(cases, found, strict=True) if case.graph == artifact.graph]
        _check_graph(artifact, mine, reference, manifest)


def _run(runner: Runner, case: Case) -> Difference | str:
    """How far a graph is from torch, or why it does not run."""
    try:
        return measure(case, runner.run(case.graph, case.feeds))
    except Exception as error:  # as above
        return first_line(error)


def _check_graph(
    artifact: Artifact, found: Sequence[tuple[str, Difference | str]], reference: Reference, manifest: Manifest
) -> None:
    """Its weights, and what was found in every case."""
    variant = VARIANTS[artifact.variant]
    if artifact.steps is not None and not artifact.steps <= WITHIN:
        artifact.ok = False
        manifest.failures.append(f"{artifact.file} has weights {artifact.steps:.3g} steps of rounding from the model's")
    by_answers = _decided_by_answers(artifact.variant, reference)
    for what, difference in found:
        if isinstance(difference, str):
            artifact.ok = False
            manifest.failures.append(f"{artifact.file} does not run on {what} ({difference})")
            continue
        artifact.parity.append(asdict(difference))
        accepted = math.isfinite(difference.max_relative) if by_answers else difference.within(variant.tolerance)
        if not accepted:
            artifact.ok = False
            manifest.failures.append(
                f"{artifact.file} differs from torch on {what}: relative error {difference.max_relative:.1e}, "
                f"cosine {difference.cosine:.6f}"
            )


def _check_generation(runner: Opened, kind: tuple[str, str], reference: Reference, manifest: Manifest) -> None:
    form, variant = kind
    check = check_tokens(runner, reference)
    wrong = check.wrong(VARIANTS[variant])
    manifest.checks.append({"format": form, "variant": variant, "ok": wrong is None, **asdict(check)})
    if wrong is not None:
        manifest.failures.append(f"{form} {variant}: {wrong}")
