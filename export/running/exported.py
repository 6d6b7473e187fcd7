"""An exported folder, opened to be run: which graphs it holds, their runtime, and how prompts are made for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.errors import CheckpointError, DeviceError, UnsuitableOptionError
from slimvlm.compress.models.checkpoint import INDEX, SINGLE, load_processor, read_config
from slimvlm.export.running.generation import Prompting, Runner
from slimvlm.export.running.manifest import NAME, Artifact, Manifest, check_files, inside
from slimvlm.export.running.runners import SessionRunner, torch_files
from slimvlm.export.running.sessions import open_session, providers_of

FULL = "fp32"  # the variant that needs no name


def is_export(folder: Path) -> bool:
    """Whether a folder holds graphs; a checkpoint, which has a manifest too, holds weights."""
    return (folder / NAME).is_file() and not any((folder / name).is_file() for name in (SINGLE, INDEX))


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export holds; `graphs` are its artifacts by backend: `onnx`, `onnx:int8`, `torchscript`, `pt2`."""

    folder: Path
    manifest: Manifest
    graphs: dict[str, list[Artifact]]

    @classmethod
    def open(cls, folder: Path) -> Exported:
        """Reads the manifest.

        Raises:
            CheckpointError: the folder is no export.
        """
        manifest = Manifest.read(folder)
        graphs: dict[str, list[Artifact]] = {}
        for artifact in manifest.artifacts:
            name = artifact.format if artifact.variant == FULL else f"{artifact.format}:{artifact.variant}"
            graphs.setdefault(name, []).append(artifact)
        return cls(folder, manifest, graphs)

    @property
    def prompting(self) -> Prompting | None:
        """How answers are generated; None for a dual encoder."""
        return None if self.manifest.generation is None else Prompting.from_dict(self.manifest.generation)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width that every image must be brought to first, where the vision graph has one grid."""
        size = self.manifest.run.get("image_size")
        return None if size is None else tuple(size)

    def collator(self) -> Collator:
        """Makes prompts by the processor that lies in the folder.

        Raises:
            CheckpointError, MissingDependencyError: it cannot be loaded.
        """
        config, family = read_config(self.folder)
        return Collator(load_processor(self.folder), family, config)

    def runner(
        self, backend: str | None = None, device: str = "cpu", threads: int = 0, engines: str | None = None
    ) -> Runner:
        """The graphs of one backend, by default the first, after a look at their files.

        Args:
            device, engines: of ONNX graphs, as `providers_of` takes them.

        Raises:
            UnsuitableOptionError: the export does not hold this backend.
            CheckpointError: a file is missing, was changed, or lies outside the folder.
            DeviceError: graphs of torch are run on the CPU only, on which they were traced.
        """
        backend = backend or next(iter(self.graphs), "")
        if backend not in self.graphs:
            raise UnsuitableOptionError(f"{self.folder} has no {backend} graphs; it holds {', '.join(self.graphs)}")
        artifacts = self.graphs[backend]
        names = {artifact.file for artifact in artifacts}
        entries = self.manifest.files.items()
        if wrong := check_files(self.folder, {k: v for k, v in entries if k.removesuffix("_data") in names}):
            raise CheckpointError(f"{self.folder}: {wrong[0]}; copy the export again")
        files = {artifact.graph: inside(self.folder, artifact.file) for artifact in artifacts}
        if artifacts[0].format == "onnx":
            half = artifacts[0].variant == "fp16"
            providers = {path: providers_of(graph, device, half, engines) for graph, path in files.items()}
            return SessionRunner(files, lambda path: open_session(path, providers[path], threads))
        if device != "cpu":
            raise DeviceError(f"{backend} graphs were traced on the CPU and run there only; use --device cpu")
        return torch_files(files, artifacts)
