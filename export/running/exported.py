"""An exported folder, opened to be run: which graphs it holds, their runtime, and how prompts are made for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.errors import CheckpointError, UnsuitableOptionError
from slimvlm.compress.files.folders import MANIFEST
from slimvlm.compress.models.checkpoint import INDEX, SINGLE
from slimvlm.compress.models.loaders import load_processor, read_config
from slimvlm.export.running.manifest import Artifact, Manifest, check_files
from slimvlm.export.running.runners import SessionRunner, TorchRunner, runner_of


def is_export(folder: Path) -> bool:
    """Whether a folder holds graphs; a checkpoint, which has a manifest too, holds weights."""
    return (folder / MANIFEST).is_file() and not any((folder / name).is_file() for name in (SINGLE, INDEX))


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export holds."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Exported:
        """Reads the manifest.

        Raises:
            CheckpointError: the folder is no export.
        """
        return cls(folder, Manifest.read(folder))

    @property
    def graphs(self) -> dict[str, list[Artifact]]:
        """Its artifacts by backend."""
        return self.manifest.graphs

    def backend(self, form: str | None = None, variant: str | None = None) -> str | None:
        """Of `graphs` the key of a format and variant, by default the first; None if they are not here."""
        for key, (artifact, *_) in self.graphs.items():
            if form in (None, artifact.format) and variant in (None, artifact.variant):
                return key
        return None

    def find(self, words: str | None) -> str | None:
        """Of `graphs` the key that is meant by `onnx:int8`, by `onnx` or `int8` alone (the first), or by nothing."""
        first, _, second = (words or "").partition(":")
        return self.backend(first, second) if second else self.backend(first or None) or self.backend(None, first)

    def named(self, words: str | None) -> str:
        """As `find`.

        Raises:
            UnsuitableOptionError: they are not here; the message lists those that are.
        """
        if found := self.find(words):
            return found
        raise UnsuitableOptionError(f"{self.folder} has no {words} graphs; it holds {', '.join(self.graphs)}")

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
    ) -> SessionRunner | TorchRunner:
        """The graphs of one backend, by default the first, after a look at their files.

        Args:
            device, threads, engines: as `runner_of` takes them.

        Raises:
            UnsuitableOptionError: the export does not hold this backend.
            CheckpointError: a file is missing, was changed, or lies outside the folder.
            DeviceError: graphs of torch are run on the CPU only, on which they were traced.
        """
        artifacts = self.graphs[self.named(backend)]
        names = {artifact.file for artifact in artifacts}
        entries = self.manifest.files.items()
        if wrong := check_files(self.folder, {k: v for k, v in entries if k.removesuffix("_data") in names}):
            raise CheckpointError(f"{self.folder}: {wrong[0]}; copy the export again")
        return runner_of(self.folder, artifacts, device, threads, engines)
