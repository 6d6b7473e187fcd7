"""What a name stands for: a checkpoint, the run it belongs to, or an export; and which of its backends is meant.

`FOLDER[:BACKEND[:VARIANT]]`, as `out:onnx:int8`; a variant alone (`out:int8`) is that of the first backend that has it.
Of a checkpoint `torch:int8` and `torch:int4` are weights that torchao quantizes when they are loaded, or has quantized.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.errors import CheckpointError, MissingDependencyError, UnsuitableOptionError
from slimvlm.compress.files.decoding import content_of, parse, read
from slimvlm.compress.models.checkpoint import PLAN, locate, weight_files
from slimvlm.compress.models.loaders import load_processor, read_config
from slimvlm.compress.models.quantized import held_form, require_torchao
from slimvlm.compress.plan import Plan
from slimvlm.compress.sparsity.rules import RECORD
from slimvlm.export import ExportOptions, export_checkpoint
from slimvlm.export.options import FORMATS
from slimvlm.export.running.exported import Exported, is_export
from slimvlm.export.running.manifest import Manifest, inside
from slimvlm.export.running.sessions import NO_RUNTIME
from slimvlm.export.variants import FULL, TORCH_FORMS, VARIANTS
from slimvlm.serve.judging.roofline import Shapes, kv_bytes_per_token
from slimvlm.serve.judging.shapes import checkpoint_shapes
from slimvlm.serve.options import ONNX, TORCH, split_backend
from slimvlm.serve.profile import Subject

WORDS = {TORCH, *FORMATS, "aoti", *VARIANTS, *TORCH_FORMS}


def split_name(name: str) -> tuple[str, str]:
    """The folder (or hub name) of a name, and the words behind it; none where the whole name is a folder, colons and
    all, or where what is behind a colon belongs to nothing known.
    """
    if Path(name).expanduser().exists():
        return name, ""
    found = [(parts[0], parts[1:]) for count in (1, 2) if len(parts := name.rsplit(":", count)) > count and parts[0]]
    there = [(folder, words) for folder, words in found if Path(folder).expanduser().exists()]
    known = [(folder, words) for folder, words in reversed(found) if WORDS.issuperset(words)]
    folder, words = next(iter((*there, *known)), (name, []))
    return folder, ":".join(words)


def what_runs(name: str, backend: str | None = None, trust_remote_code: bool = False) -> tuple[str, str]:
    """The folder (or hub name) that is run for `name`, and on which backend: `torch`, `torch:int8`, or one that the
    export has.

    Args:
        backend: instead of the words in the name.

    Raises:
        UnsuitableOptionError: there are no such graphs; the message lists those there are.
        CheckpointError: the folder is neither a checkpoint, nor a run, nor an export.
    """
    folder, words = split_name(name)
    words = backend or words
    path = Path(folder).expanduser()
    of_torch = is_torch(words)
    if is_export(path) and not of_torch:
        return folder, Exported.open(path).named(words)
    if not words or (of_torch and not path.is_dir()):
        return folder, _as_held(path, words or TORCH)
    target = _found(name, folder, trust_remote_code)
    if of_torch:
        return str(checkpoint := target.folder(TORCH)), _as_held(checkpoint, words)
    if target.export is None:
        raise UnsuitableOptionError(f"{folder} is a checkpoint, which runs on {TORCH} only; export it for {words}")
    return str(target.export), Exported.open(target.export).named(words)


def is_torch(backend: str | None) -> bool:
    """Whether a backend, with or without a variant, is the model itself.

    Raises:
        UnsuitableOptionError: it is, in a form that there is not.
    """
    return (backend or "").partition(":")[0] == TORCH and split_backend(backend or "")[0] == TORCH


def _as_held(folder: Path, backend: str) -> str:
    """Quantized weights run in the form they are in."""
    form = held_form(folder)
    return f"{TORCH}:{form}" if form and backend == TORCH else backend


@dataclass(frozen=True, slots=True)
class Target:
    """One model to measure.

    Attributes:
        given: as the user named it.
        checkpoint: its folder; None where only graphs are there.
        export: folder of its graphs; None until some are found or made.
        digest: of the weights.
        family: name of its row.
        shapes: None where they cannot be read without the checkpoint.
        backend: that was named with it; None: any.
    """

    given: str
    checkpoint: Path | None
    export: Path | None
    digest: str
    family: str
    shapes: Shapes | None
    backend: str | None = None

    def folder(self, backend: str) -> Path:
        """What the backend opens.

        Raises:
            UnsuitableOptionError: there is no checkpoint for torch.
        """
        found = self.checkpoint if is_torch(backend) else self.export
        if found is None:
            raise UnsuitableOptionError(
                f"{self.given} is an export, which holds no torch checkpoint; leave torch out of --backend or give the "
                "checkpoint"
            )
        return found

    def collator(self, trust_remote_code: bool) -> Collator:
        """Makes its inputs."""
        if self.checkpoint is None:
            return Exported.open(self.folder(ONNX)).collator()
        config, family = read_config(self.checkpoint, trust_remote_code, held_form(self.checkpoint))
        return Collator(load_processor(self.checkpoint, trust_remote_code), family, config)

    def subject(self, dtype: str) -> Subject:
        """As it stands in the profile; `dtype` is that of its cache."""
        plan = (self.checkpoint or Path()) / PLAN
        layout = read(plan, Plan).layout if self.checkpoint and plan.is_file() else "dense"
        return Subject(
            source=self.given,
            family=self.family,
            layout=layout,
            parameters=self.shapes.parameters if self.shapes else None,
            weight_bytes=sum(path.stat().st_size for path in self._weight_files()),
            kv_bytes_per_token=kv_bytes_per_token(self.shapes, dtype) if self.shapes else None,
            digest=self.digest,
            zeros=_zeros(self.checkpoint or self.folder(ONNX)),
        )

    def _weight_files(self) -> list[Path]:
        """Of the checkpoint, or of the graphs that are meant: the first variant in an export."""
        if self.checkpoint is not None and (self.backend is None or is_torch(self.backend)):
            return weight_files(self.checkpoint)
        export = Exported.open(self.folder(ONNX))
        names = [artifact.file for artifact in export.graphs[export.named(self.backend)]]
        beside = [f"{name}_data" for name in names if f"{name}_data" in export.manifest.files]
        return [inside(export.folder, name) for name in (*names, *beside)]


def _zeros(folder: Path) -> float:
    """Share of the parameters that were made zero, as the config in `folder` records it."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        share = parse(content_of(folder / "config.json"))[RECORD]["zeros"]
        return share if isinstance(share, float) and 0 < share < 1 else 0.0
    return 0.0


def find_target(name: str, trust_remote_code: bool = False) -> Target:
    """What `name` is: a run folder, a checkpoint (folder or hub name), or an export; and the backend it names, whose
    graphs may have to be made (`with_graphs`).

    Raises:
        CheckpointError, UnsupportedModelError: none of them, or it cannot be read.
        UnsuitableOptionError: the words behind it name no backend that it has or that can be made of it.
    """
    folder, words = split_name(name)
    target = _found(name, folder, trust_remote_code)
    if target.checkpoint is not None and held_form(target.checkpoint) and (not words or words == TORCH):
        words = _as_held(target.checkpoint, TORCH)
    return replace(target, backend=_meant(target, words)) if words else target


def _meant(target: Target, words: str) -> str:
    """The backend that the words behind a name mean."""
    exported = None if target.export is None else Exported.open(target.export)
    if is_torch(words) or (exported is not None and (words := exported.find(words) or words) in exported.graphs):
        return words
    if exported is not None and target.checkpoint is None:
        return exported.named(words)  # which says what there is instead
    split_backend(full := f"{ONNX}:{words}" if words in VARIANTS else words)
    return full


def _found(given: str, name: str, trust_remote_code: bool) -> Target:
    folder = Path(name).expanduser()
    if is_export(folder):
        return _export_target(given, folder, trust_remote_code)
    run = folder if (folder / "run.json").is_file() else None
    if folder.is_dir() and not run and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{name} is neither a checkpoint (config.json), nor what slimvlm compress or slimvlm export wrote "
            "(run.json, manifest.json)"
        )
    checkpoint, digest = locate(folder / "model" if run else name)
    beside = (run or checkpoint.parent) / "export"
    _, family = read_config(checkpoint, trust_remote_code, held_form(checkpoint))
    export = beside if is_export(beside) and Manifest.read(beside).model.get("digest") == digest else None
    return Target(given, checkpoint, export, digest, family.name, checkpoint_shapes(checkpoint, trust_remote_code))


def _export_target(name: str, folder: Path, trust_remote_code: bool) -> Target:
    """Its shapes are those of the checkpoint it was made of, if that lies beside it."""
    model = Manifest.read(folder).model
    source, shapes, checkpoint = folder.absolute().parent / str(model.get("source")), None, None
    if (source / "config.json").is_file():
        found, digest = locate(source)
        if digest == model.get("digest"):
            checkpoint, shapes = found, checkpoint_shapes(found, trust_remote_code)
    return Target(name, checkpoint, folder, str(model.get("digest", "")), str(model["family"]), shapes)


def check_installed(backends: Sequence[str]) -> None:
    """Raises MissingDependencyError if a backend's runtime is not here."""
    wanted = [split_backend(backend) for backend in backends]
    if any(name == ONNX for name, _ in wanted) and not importlib.util.find_spec("onnxruntime"):
        raise MissingDependencyError(NO_RUNTIME)
    if any(name == TORCH and variant for name, variant in wanted):
        require_torchao()


def has_graphs(target: Target, backend: str) -> bool:
    """Whether the target's export holds what the backend runs."""
    return target.export is not None and Exported.open(target.export).backend(*split_backend(backend)) is not None


def with_graphs(target: Target, backends: Sequence[str], scratch: Path) -> Target:
    """The target with graphs for all `backends`, made in `scratch` where they are missing.

    Raises:
        CheckpointError: there are none, and no checkpoint to make them of.
        SlimvlmError: they cannot be made.
    """
    wanted = [backend for backend in backends if not is_torch(backend)]
    missing = [backend for backend in wanted if not has_graphs(target, backend)]
    if not missing:
        return target
    if target.checkpoint is None:
        raise CheckpointError(
            f"{target.given} has no {missing[0]} graphs; make them with slimvlm export, and give that folder or put it "
            "beside the checkpoint as `export`"
        )
    # held against torch on a few generated samples
    export_checkpoint(target.checkpoint, scratch, replace(graph_options(wanted), samples=4, max_new_tokens=8))
    return replace(target, export=scratch)


def graph_options(backends: Sequence[str]) -> ExportOptions:
    """The export that gives what these backends, none of them torch, run."""
    formats, variants = zip(*map(split_backend, backends), strict=True)
    wanted = dict.fromkeys(variant or FULL for variant in variants)
    return ExportOptions(formats=tuple(dict.fromkeys(formats)), variants=tuple(wanted))
