"""What the graphs of an export can do: the questions and scores of a checkpoint's evaluation, asked of a runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from slimvlm.compress.data.collate import IGNORED, Batch, Collator
from slimvlm.compress.data.samples import Sample, resized
from slimvlm.compress.evaluation.evaluate import Taught, asked_alike, longest_answer, measure_quality
from slimvlm.compress.evaluation.quality import Quality
from slimvlm.compress.options import EvaluateOptions
from slimvlm.compress.progress import Progress, silent
from slimvlm.export.running.exported import Exported
from slimvlm.export.running.generation import Arrays, Prompting, Runner, generate, steps, token_losses, until_end
from slimvlm.export.running.manifest import Manifest
from slimvlm.export.running.names import TOWERS

LOGITS_BYTES = 2**29  # of a batch of prompts, at most


def evaluate_export(
    export_folder: Path,
    variant: str | None,
    samples: Sequence[Sample],
    options: EvaluateOptions,
    progress: Progress = silent,
    blind_seed: int | None = None,
) -> Quality:
    """Quality of the graphs of one variant: answers by greedy generation, and the loss of the right ones.

    Args:
        variant: as `slimvlm profile --backend` has it (`onnx:int8`, `torchscript`) or the variant alone (`int8`); None
            for the export's first.
        options: whose device (`auto` is the CPU) and batch size are taken.
        blind_seed: as of `evaluate`.

    Raises:
        CheckpointError: the folder is no export, or not whole.
        UnsuitableOptionError: it has no such graphs; the message lists those it has.
        SampleError: a text is longer than the model can take.
    """
    exported = Exported.open(export_folder)
    device = "cpu" if options.device == "auto" else options.device
    runner, prompting = exported.runner(exported.named(variant), device), exported.manifest.generation
    graphs = _Graphs(exported.collator(), runner, prompting, exported.image_size)
    rows = min(options.batch_size, max(1, LOGITS_BYTES // graphs.logits_bytes(samples[0], exported.manifest)))
    return measure_quality(graphs, samples, batch_size=rows, progress=progress, blind_seed=blind_seed)


@dataclass(frozen=True, slots=True)
class _Graphs:
    """See `Answering`; `prompting` is None for a dual encoder, `size` that of all images where there is one grid."""

    collator: Collator
    runner: Runner
    prompting: Prompting | None
    size: tuple[int, int] | None

    def teach(self, questions: Sequence[Sample]) -> list[Taught]:
        """The loop of a generation, along the right answers."""
        questions, prompting = self._sized(questions), self._prompting()
        given = self.collator.training(questions, last_turn=True)
        prompts, targets = self._taken_apart(given)
        alike = asked_alike(self.collator, questions, given).numpy()
        counts = np.array([len(target) for target in targets])
        follow = np.full((len(targets), counts.max()), prompting.pad)
        for row, target in enumerate(targets):
            follow[row, : len(target)] = target
        losses = np.zeros(len(targets))
        for step, (_, logits) in enumerate(steps(self.runner, prompting, prompts, follow.shape[1], follow)):
            asked = step < counts
            losses += np.where(asked, token_losses(logits, follow[:, step]), 0.0)
            alike &= ~asked | (logits.argmax(-1) == follow[:, step])
        return [
            Taught(float(loss), len(target), self._decoded(target) if sure else None)
            for loss, target, sure in zip(losses, targets, alike, strict=True)
        ]

    def answer(self, questions: Sequence[Sample]) -> list[str]:
        """As a client of the files answers."""
        questions, prompting = self._sized(questions), self._prompting()
        prompts = _arrays(self.collator.prompts(questions))
        found = generate(self.runner, prompting, prompts, longest_answer(self.collator, questions))
        return [self._decoded(until_end(row, prompting.end)) for row in found.tokens]

    def embed(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """What each tower gives."""
        arrays = _arrays(self.collator.training(self._sized(samples)))
        images, texts = (next(iter(self.runner.run(tower, arrays).values())) for tower in TOWERS)
        return torch.from_numpy(images), torch.from_numpy(texts)

    def logits_bytes(self, sample: Sample, manifest: Manifest) -> int:
        """Of a prompt such as that of the sample, of all whose tokens an exported decoder gives logits."""
        vocabularies = [port.shape[-1] for one in manifest.artifacts for port in one.outputs if port.name == "logits"]
        if self.prompting is None or not vocabularies:
            return 1
        return 4 * int(vocabularies[0]) * self.collator.prompts(self._sized([sample]))["input_ids"].shape[1]

    def _prompting(self) -> Prompting:
        if self.prompting is None:
            raise ValueError("a dual encoder embeds, and answers nothing")
        return self.prompting

    def _sized(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        return samples if self.size is None else [resized(sample, self.size) for sample in samples]

    def _taken_apart(self, given: Batch) -> tuple[Arrays, list[list[int]]]:
        """A batch of questions with answers as the questions, left-padded, and the tokens of each answer."""
        arrays = _arrays(given)
        labels = arrays.pop("labels")
        targets = [row[row != IGNORED].tolist() for row in labels]
        if not self.collator.family.labels_shifted:  # the answers are not among the inputs
            return arrays, targets
        starts = (labels != IGNORED).argmax(axis=1)
        ids = np.full((len(labels), starts.max()), self._prompting().pad)
        mask = np.arange(-starts.max(), 0) >= -starts[:, None]
        for row, start in enumerate(starts):
            ids[row, len(ids[row]) - start :] = arrays["input_ids"][row, :start]
        return {**arrays, "input_ids": ids, "attention_mask": mask.astype(np.int64)}, targets

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self.collator.decode(torch.tensor([tokens]))[0]


def _arrays(batch: Batch) -> Arrays:
    return {name: tensor.numpy() for name, tensor in batch.items()}
