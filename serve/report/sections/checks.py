"""Whether the files are what they claim to be, and how to make them again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator

from slimvlm.compress.evaluation.quality import FORCED
from slimvlm.compress.options import STAGES
from slimvlm.export.running.manifest import Manifest
from slimvlm.serve.report.document import Code, Finding, Said, Table, figure, percent, shown, whole
from slimvlm.serve.report.files import MANIFEST, Facts, RunFiles

CHECKED = (  # stage, field, what it says
    ("slice", "masked_difference", "cut model against the dense model with the same units masked, relative"),
    ("slice", "reload_difference", "saved checkpoint against the cut model in memory, relative"),
    ("recover", "merged_difference", "merged weights against the adapted model, relative norm"),
    ("recover", "reload_difference", "saved recovered checkpoint against the model in memory, relative"),
)


def parity_section(files: RunFiles) -> Iterator[Said]:
    """Differences between what must be equal: of the checkpoints, and of every exported graph."""
    rows = [
        (text, figure(files.stage(stage)[field]))
        for stage, field, text in CHECKED
        if files.stage(stage).get(field) is not None
    ]
    yield "A run stops at the first of these checks that fails, so a finished stage has passed its own."
    yield Table("Checkpoint", ("compared", "difference"), rows, "run.json: stages.slice, stages.recover")
    manifest = files.manifest
    if manifest is None:
        yield "The model was not exported: there is no export/manifest.json."
        if refused := files.stage("export").get("refused"):
            yield Finding(shown(f"Not exported: {refused}"), "run.json: stages.export.refused", bad=True)
        return
    yield _graph_table(manifest)
    if any(check.get("forced") for check in manifest.checks):
        yield f"Answers are not torch's own: {FORCED}. Choices are compared."
    if manifest.checks:
        yield _token_table(manifest)
    if any("loss" in check for check in manifest.checks):
        yield _logit_table(manifest)
    yield from (Finding(shown(text), f"{MANIFEST}: failures", bad=True) for text in manifest.failures)
    if not manifest.failures:
        count = whole(len(manifest.artifacts))
        yield Finding(f"All {count} exported graphs are within their tolerances.", f"{MANIFEST}: ok")


def _graph_table(manifest: Manifest) -> Table:
    """The worst case of every graph."""
    rows = []
    for artifact in manifest.artifacts:
        cases = artifact.parity
        tolerance = manifest.tolerances.get(artifact.variant, {})
        worst = {name: _worst(cases, name, max) for name in ("max_absolute", "max_relative")}
        cosine = _worst(cases, "cosine", min)
        rows.append(
            (
                *(artifact.file, artifact.exporter, "yes" if artifact.ok else "NO", whole(len(cases))),
                *(figure(worst["max_absolute"]), figure(worst["max_relative"]), figure(tolerance.get("relative"))),
                *("none" if cosine is None else f"{cosine:.6f}", figure(tolerance.get("cosine"))),
            )
        )
    columns = ("file", "exporter", "passed", "cases", "absolute", "relative", "accepted", "cosine", "wanted")
    title = "Exported graphs against torch, worst case each"
    return Table(title, columns, rows, f"{MANIFEST}: artifacts[].parity, tolerances", texts=3)


def _worst(cases: list[Facts], name: str, worse: Callable[[list[float]], float]) -> float | None:
    """None where there is no case, or one that gave no finite number."""
    values = [case[name] for case in cases]
    return worse(values) if values and None not in values else None


def _token_table(manifest: Manifest) -> Table:
    rows = [
        (
            *(check["format"], check["variant"], "yes" if check["ok"] else "NO", whole(check["samples"])),
            *(whole(check["equal"]), percent(check["token_share"])),
            *("none" if check[name] is None else percent(check[name]) for name in ("accuracy", "torch_accuracy")),
        )
        for check in manifest.checks
    ]
    columns = ("format", "variant", "passed", "samples", "equal", "equal tokens", "right", "right in torch")
    return Table("Greedy answers against torch", columns, rows, f"{MANIFEST}: checks", texts=3)


def _logit_table(manifest: Manifest) -> Table:
    """What torch's answers cost in the graphs, which says how near two models are also where their tokens differ."""
    rows = []
    for check in manifest.checks:
        if "loss" in check:
            tolerance = manifest.tolerances.get(check["variant"], {})
            rows.append(
                (
                    *(check["format"], check["variant"], figure(check["loss"]), figure(check["torch_loss"])),
                    *(figure(check.get("divergence")), figure(tolerance.get("divergence"))),
                    *(figure(check["max_relative"]), figure(tolerance.get("relative")), whole(check["long_prompt"])),
                )
            )
    columns = ("format", "variant", "loss", "in torch", "KL", "accepted", "logits", "accepted", "longest prompt")
    title = "Torch's answers: nats a token, and the largest relative difference of a logit"
    return Table(title, columns, rows, f"{MANIFEST}: checks, tolerances", texts=2)


# ------------------------------------------------------------------ repeat


def repeat_section(files: RunFiles) -> Iterator[Said]:
    """Command, options, versions, seeds and digests."""
    record = files.record
    yield (
        "The paths are as they were given; a digest says whether a model or data are the same without a path. "
        "run.json is not among the digests: every later command adds to it."
    )
    yield Code("Command", shlex.join(map(str, record["command"])))
    yield _pairs("Versions", record["versions"], "run.json: versions")
    yield Table("Seeds", ("", "value"), list(_seeds(files)), "run.json, plan.json, quality.json: the fields named")
    yield Table("Digests (sha256)", ("", "value", "bytes"), list(_digests(files)), "run.json; the files", texts=2)
    yield Table("Stages", ("stage", "status", "seconds"), list(_stages(record)), "run.json: stages", texts=2)
    yield _pairs("Options", record["options"], "run.json: options")
    if options := files.stage("recover").get("options"):
        yield _pairs("Options of the recovery", options, "run.json: stages.recover.options")
    if bad := files.stage("plan").get("bad_samples"):
        yield Table(
            "Samples left out", ("sample: reason",), [(one,) for one in bad], "run.json: stages.plan.bad_samples"
        )


def _pairs(title: str, values: Facts, source: str) -> Table:
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in sorted(values.items())]
    return Table(title, ("", "value"), rows, source, texts=2)


def _seeds(files: RunFiles) -> Iterator[tuple[str, str]]:
    yield "samples, recovery (run.json: options.seed)", str(files.record["options"]["seed"])
    if files.plan is not None:
        yield "plan (plan.json: seed)", str(files.plan.seed)
    if files.quality is not None:
        yield "intervals (quality.json: comparison.seed)", str(files.quality.comparison.seed)


def _digests(files: RunFiles) -> Iterator[tuple[str, str, str]]:
    recorded = (
        ("dense model", "plan", "model_digest"),
        ("calibration data", "plan", "data_digest"),
        ("recovery data", "recover", "data_digest"),
    )
    for name, stage, field in recorded:
        if digest := files.stage(stage).get(field):
            yield f"{name} (run.json: stages.{stage}.{field})", digest, ""
    for name, (digest, size) in sorted(files.digests.items()):
        yield name, digest, whole(size)


def _stages(record: Facts) -> Iterator[tuple[str, str, str]]:
    for name in sorted(record["stages"], key=lambda name: (name not in STAGES, (*STAGES, name).index(name))):
        stage = record["stages"][name]
        seconds = stage.get("seconds")
        yield name, str(stage.get("status")), "" if seconds is None else f"{seconds:.1f}"
