"""What the cut took away, read back from the dense checkpoint: only the rows and columns asked for, never a model.

The tensors of a file may have older names than the modules of the model. They are mapped as transformers maps them when
it loads the checkpoint: with its own rules, on the dense model built on the meta device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming, rename_source_key

from slimvlm.compress.errors import CheckpointError
from slimvlm.compress.models.checkpoint import build_meta, weight_files
from slimvlm.compress.models.experts import stacked_names, together
from slimvlm.compress.models.loaders import stored_weights
from slimvlm.compress.models.streaming.lazy import Lazy, Source
from slimvlm.compress.models.streaming.shards import KINDS
from slimvlm.compress.plan import Plan
from slimvlm.compress.slicing.cuts import Cut, complement, find_cuts, matching_groups
from slimvlm.compress.slicing.depth import place
from slimvlm.kernels import gather_blocks


@dataclass(frozen=True, slots=True)
class Recalled:
    """The pruned slices of one dense weight W0, which keeps rows R and columns C and loses rows P and columns D.

    Attributes:
        rows: W0[P][:, C], [|P|, |C|]; None if no row was cut.
        columns: W0[R][:, D], [|R|, |D|]; None if no column was cut.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None


class Slices:
    """The pruned slices of every matrix a plan cuts, on the CPU, in the dtype of the file. Nothing stays in memory.

    Args:
        folder: the dense checkpoint (single file or shards).
        model: the model that was cut from it.
        plan: what was cut.

    Raises:
        CheckpointError: the plan is not this checkpoint's, or not this model's, or a matrix is not in the files.
    """

    def __init__(self, folder: str | os.PathLike[str], model: nn.Module, plan: Plan) -> None:
        self._folder = Path(folder)
        dense, family = build_meta(folder)
        self._shapes, self._cuts = {}, {}
        stacked = stacked_names(dense)
        for group in matching_groups(dense, family, plan):
            for cut in find_cuts(group, torch.tensor(plan.keep[group.key], dtype=torch.int64)):
                shape = tuple(dense.get_parameter(f"{cut.path}.weight").shape)
                if len(shape) == 2:  # norms of the heads lose entries, which no low-rank branch recalls
                    path = place(cut.path, family, plan)
                    self._check_cut(path, model, cut, shape)
                    self._shapes[path], self._cuts[path] = shape, cut
        found = find_tensors(self._folder, dense)
        self._stored = {}
        for cut in self._cuts.values():
            name = f"{cut.path}.weight"
            whole, entry = stacked.get(name, (name, None))
            if whole in found:
                self._stored[name] = (*found[whole], entry)
            else:
                raise CheckpointError(
                    f"{folder}: {cut.path}.weight is not stored as one tensor; load the checkpoint and save it once "
                    "with slimvlm or transformers, then cut the saved one"
                )

    def of(self, path: str) -> Recalled:
        """The pruned slices of the linear module `path`; both None for one that was not cut.

        Raises:
            CheckpointError: the file cannot be read, or its tensor has another size than the config says.
        """
        cut = self._cuts.get(path)
        if cut is None:
            return Recalled()
        file, name, entry = self._stored[f"{cut.path}.weight"]
        try:
            with safe_open(file, "pt") as opened:
                view, shape = opened.get_slice(name), self._shapes[path]
                if entry is not None:
                    view = view[entry]
                    view = view if tuple(view.shape) == shape else view.T
                found = tuple(view.get_shape() if entry is None else view.shape)
                if found != shape:
                    raise CheckpointError(f"{file}: {name} is {list(found)}, not {list(shape)}")
                return _read(view, cut, shape)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: {name} cannot be read ({error}); copy or download it again") from error

    def lazily(self, path: str) -> Recalled:
        """The same, read when they are needed.

        Raises:
            CheckpointError: as `of`; also when they are read.
        """
        cut = self._cuts.get(path)
        if cut is None:
            return Recalled()
        (height, width), (file, name, _) = self._shapes[path], self._stored[f"{cut.path}.weight"]
        rows, columns = (
            size if kept is None else len(kept) for kept, size in ((cut.rows, height), (cut.columns, width))
        )
        like = torch.empty(0, dtype=KINDS[stored_weights(file)[name][0]], device="meta")
        return Recalled(
            None if cut.rows is None else Lazy.of(_Piece(self, path, True), like.new_empty(height - rows, columns)),
            None if cut.columns is None else Lazy.of(_Piece(self, path, False), like.new_empty(rows, width - columns)),
        )

    def _check_cut(self, path: str, model: nn.Module, cut: Cut, shape: tuple[int, int]) -> None:
        kept = tuple(
            size if index is None else len(index) for index, size in zip((cut.rows, cut.columns), shape, strict=True)
        )
        found = tuple(model.get_parameter(f"{path}.weight").shape)
        if found != kept:
            raise CheckpointError(
                f"{path} is {found} in this model, the plan leaves {kept} of {self._folder}; "
                "give the plan and the dense checkpoint this model was cut with"
            )


@dataclass(frozen=True, eq=False)
class _Piece(Source):
    """Pruned rows or columns of the linear at a path."""

    slices: Slices
    path: str
    rows: bool

    def make(self, values: Sequence[Any]) -> Tensor:
        found = self.slices.of(self.path)
        piece = found.rows if self.rows else found.columns
        assert piece is not None  # it was made of the same cut
        return piece


def find_tensors(folder: Path, model: PreTrainedModel) -> dict[str, tuple[Path, str]]:
    """Where the weights of `model` (the dense one; the meta device is enough) are: name -> (file, name in the file).

    Weights that transformers computes from several stored tensors are left out. Experts are stacked, as the unmodified
    class has them, and may lie there transposed.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    turned = {
        pattern
        for rule in converters
        if all(isinstance(step, Transpose) for step in rule.operations)
        for pattern in rule.source_patterns
    }
    with together(model):
        known, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for file in weight_files(folder):
        for stored in stored_weights(file):
            name, converter = rename_source_key(stored, renamings, converters, prefix, known)
            if name not in known and stored in known:
                name, converter = rename_source_key(stored, [], [], prefix, known)
            if converter is None or converter in turned:
                found[name] = (file, stored)
    return found


def _read(view: Any, cut: Cut, shape: tuple[int, int]) -> Recalled:  # of safetensors, which gives it no type
    """Of a one-sided cut only what was pruned is read; cut on both, the matrix is read once and taken apart at once."""
    height, width = shape
    if cut.rows is not None and cut.columns is not None:
        blocks = gather_blocks(view[:], cut.rows, cut.columns)
        return Recalled(blocks.pruned_rows, blocks.pruned_cols)
    if cut.rows is not None:
        return Recalled(view[complement(cut.rows, height).tolist()], None)
    return Recalled(None, view[:, complement(cut.columns, width).tolist()] if cut.columns is not None else None)
