"""Is an exported folder whole, and does this machine give torch's answers for its stored sample?

ONNX graphs are checked without torch.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from slimvlm.compress.errors import CheckFailedError, CheckpointError, MissingDependencyError, SlimvlmError
from slimvlm.export.checks.parity import Case, measure
from slimvlm.export.checks.sample import read_sample
from slimvlm.export.running.generation import Arrays, Runner, steps, token_losses, until_end
from slimvlm.export.running.manifest import Artifact, Document, Manifest, check_files, inside
from slimvlm.export.running.names import DECODER
from slimvlm.export.running.runners import runner_of
from slimvlm.export.running.sessions import UnreadableGraphError
from slimvlm.export.variants import VARIANTS


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked: number of files, one entry per format and variant; `skipped`: no runtime is here for them."""

    folder: Path
    files: int
    checks: tuple[Document, ...]
    skipped: tuple[str, ...]

    def to_dict(self) -> Document:
        """For `--json`."""
        return {**asdict(self), "folder": str(self.folder)}


def verify(folder: str | os.PathLike[str]) -> Verification:
    """Checks an exported folder here: hashes of all files, and the stored sample through every runtime present.

    It runs what is in the folder; a program compiled ahead of time (`.aoti.pt2`) is native code of whoever made it.

    Raises:
        CheckpointError: no export, or one whose manifest names files outside it.
        CheckFailedError: a file changed, or this machine's answers are not torch's.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if wrong := check_files(folder, manifest.files):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckFailedError(f"{folder}: {wrong[0]}{more}; copy the export again")
    for artifact in manifest.artifacts:
        inside(folder, artifact.file)
    checks, skipped, failures = [], [], list(manifest.failures)
    given, expected = read_sample(folder)
    for artifacts in manifest.graphs.values():
        form, variant = artifacts[0].format, artifacts[0].variant
        runtime = "onnxruntime" if form == "onnx" else "torch"
        if importlib.util.find_spec(runtime) is None:
            skipped.append(f"{form} {variant}: {runtime} is not installed")
            continue
        try:
            check = check_sample(runner_of(folder, artifacts), manifest, variant, given, expected)
        except KeyError as missing:
            raise CheckpointError(f"{folder} holds no {missing} for {form} {variant}; copy the export again") from None
        except Exception as error:  # a runtime on files and a sample of others
            if isinstance(error, SlimvlmError) and not isinstance(error, UnreadableGraphError):
                raise
            line = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            failures.append(f"{form} {variant} does not run here ({line})")
            continue
        checks.append({"format": form, "variant": variant, **check})
        if not check["ok"]:
            failures.append(f"{form} {variant} differs from torch here: {_shown(check)}")
    if not checks and not failures:
        raise MissingDependencyError(f"nothing here can run this export ({skipped[0]}): pip install onnxruntime")
    result = Verification(folder, len(manifest.files), tuple(checks), tuple(skipped))
    if failures:
        raise CheckFailedError(f"{folder}: {failures[0]}", result)
    return result


def check_sample(runner: Runner, manifest: Manifest, variant: str, given: Arrays, expected: Arrays) -> Document:
    """The stored sample through a runtime, held against torch's answer: whether it is within the tolerance, as `ok`.

    Args:
        given, expected: as `read_sample` has them.
    """
    row = VARIANTS[variant]
    prompting = manifest.generation
    if prompting is None:
        return _check_embeddings(runner, manifest.artifacts, variant, given, expected)
    told = list(steps(runner, prompting, given, expected["tokens"].shape[1], follow=expected["tokens"]))
    case = Case(DECODER, "sample", {}, {"first_logits": expected["first_logits"]})
    difference = measure(case, {"first_logits": told[0][1]})
    tokens = until_end(expected["tokens"][0], prompting.end)
    logits = np.stack([logits[0] for _, logits in told])[: len(tokens)]
    loss, torch_loss = float(token_losses(logits, tokens).mean()), float(expected["losses"].mean())
    ok = (row.is_rounded or difference.within(row.tolerance)) and loss - torch_loss <= row.tolerance.divergence
    chosen = expected.get("chosen", expected["tokens"])[0, : len(tokens)]  # by torch, where tokens were given to it
    share = float(np.mean(logits.argmax(-1) == chosen))
    found = {"max_relative": difference.max_relative, "cosine": difference.cosine, "token_share": share}
    return {"ok": bool(ok), **found, "loss": loss, "torch_loss": torch_loss}


def _check_embeddings(
    runner: Runner, artifacts: Sequence[Artifact], variant: str, given: Arrays, expected: Arrays
) -> Document:
    relative, cosine, ok = 0.0, 1.0, True
    for graph in dict.fromkeys(artifact.graph for artifact in artifacts):
        feeds = {port.name: given[port.name] for port in runner.inputs(graph)}
        wanted = {name.split(".", 1)[1]: array for name, array in expected.items() if name.startswith(f"{graph}.")}
        difference = measure(Case(graph, "sample", feeds, wanted), runner.run(graph, feeds))
        relative, cosine = max(relative, difference.max_relative), min(cosine, difference.cosine)
        ok = ok and difference.within(VARIANTS[variant].tolerance)
    return {"ok": bool(ok), "max_relative": float(relative), "cosine": float(np.float64(cosine))}


def _shown(check: Document) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in check.items() if name != "ok")
