"""One copy of a table of embeddings that several ONNX graphs of a folder read: tied heads, onnxruntime-genai's merge.

The copy stands beside `embed_tokens`, as weights that are apart do; the other graphs name that file as theirs. A head
reads it transposed: ONNX Runtime folds that when it opens the file, so nothing is paid for it at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir

from slimvlm.export.writers.onnx_writer import save_onnx


def share_table(owner: Path, readers: Sequence[Path], external_bytes: int) -> None:
    """Takes the largest weight of `owner` out of every reader that holds it, as it is or transposed.

    Nothing changes where no reader does. All files lie in one folder.
    """
    model = _loaded(owner)
    held = [value for value in model.graph.initializers.values() if value.const_value is not None]
    table = max(held, key=lambda value: value.const_value.nbytes)  # type: ignore[union-attr]
    tied = {path: found for path in readers if (found := _holding(_loaded(path), table))}
    if not tied:
        return
    save_onnx(model, owner, external_bytes=0)
    weights = onnx_ir.load(owner).graph.initializers[str(table.name)].const_value
    if not isinstance(weights, onnx_ir.ExternalTensor):
        return  # a few bytes: they stay in their graphs
    for path, (reader, values) in tied.items():
        for value in values:
            _replace(reader, value, weights)
        save_onnx(reader, path, external_bytes)


def _loaded(path: Path) -> onnx_ir.Model:
    model = onnx_ir.load(path)
    onnx_ir.external_data.load_to_model(model)  # its files are about to be written again
    return model


def _holding(model: onnx_ir.Model, table: onnx_ir.Value) -> tuple[onnx_ir.Model, list[onnx_ir.Value]] | None:
    """The model and its weights that are the table's."""
    wanted = _numbers(table)
    found = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes != wanted.nbytes:
            continue
        numbers = _numbers(value)
        if np.array_equal(numbers, wanted) or np.array_equal(numbers, wanted.T):
            found.append(value)
    return (model, found) if found else None


def _numbers(value: onnx_ir.Value) -> np.ndarray:
    return np.asarray(value.const_value.numpy())  # type: ignore[union-attr]


def _replace(model: onnx_ir.Model, value: onnx_ir.Value, weights: onnx_ir.ExternalTensor) -> None:
    """Puts the shared weights in the place of an initializer."""
    turned = not np.array_equal(_numbers(value), weights.numpy())
    if not turned:
        value.const_value = weights
        return
    shared = onnx_ir.Value(name=f"{value.name}_shared", const_value=weights)
    turn = onnx_ir.node("Transpose", [shared], {"perm": [1, 0]})
    value.replace_all_uses_with(turn.outputs[0])
    model.graph.initializers.pop(str(value.name))
    model.graph.register_initializer(shared)
    model.graph.insert_before(model.graph[0], turn)
