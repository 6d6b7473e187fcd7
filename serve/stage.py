"""The profile stage of a run: `profile.json`, the slim model next to the dense one."""

from __future__ import annotations

from pathlib import Path

from slimvlm.compress.errors import OutputError, SlimvlmError
from slimvlm.compress.files.decoding import read
from slimvlm.compress.options import DeliverOptions
from slimvlm.compress.progress import Progress
from slimvlm.compress.runs import AGAIN, PROFILE, RunFolder
from slimvlm.export.stage import exported_formats
from slimvlm.serve.options import BACKENDS, ONNX, TORCH, ProfileOptions
from slimvlm.serve.profile import Profile
from slimvlm.serve.profiling import profile_models

CELL_SECONDS = 6.0  # half of what `slimvlm profile` takes: nobody asked for this one


def profile_stage(run: RunFolder, options: DeliverOptions, progress: Progress) -> Profile | None:
    """Write `profile.json`: both models on torch and in what was exported; None where nothing is to be measured."""
    usable = TORCH, *exported_formats(run.facts("export"))
    names = [name for name in BACKENDS if name in usable] if options.profile else []
    precisions = {ONNX: [f"{ONNX}:{variant}" for variant in options.variants]}
    backends = [backend for name in names for backend in precisions.get(name) or [name]]
    path = run.path / PROFILE
    if not run.finished("profile") or run.facts("profile")["backends"] != backends:
        path.unlink(missing_ok=True)
        with run.stage("profile", backends=backends) as facts:
            if backends:
                facts.update(_profile(run.path, options, tuple(backends), progress))
    return read(path, Profile, OutputError, AGAIN) if path.is_file() else None


def _profile(out: Path, options: DeliverOptions, backends: tuple[str, ...], progress: Progress) -> dict[str, str]:
    chosen = ProfileOptions(
        slim=str(out),
        against=options.model,
        backend=backends,
        device=options.device,
        seed=options.seed,
        cell_seconds=CELL_SECONDS,
        out=out / PROFILE,
        trust_remote_code=options.trust_remote_code,
    )
    try:
        profile_models(chosen, progress)
    except SlimvlmError as refused:
        return {"refused": str(refused)}
    return {}
