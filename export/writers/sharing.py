"""One copy of a table of embeddings that several ONNX graphs of a folder read: tied heads, onnxruntime-genai's merge.

The copy stands beside `embed_tokens`, as weights that are apart do; the other graphs name that file as theirs. A head
reads it transposed: ONNX Runtime folds that when it opens the file, so nothing is paid for it at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from slimvlm.export.writers.onnx_writer import INSIDE_BYTES, save_onnx


def share_table(owner: Path, readers: Sequence[Path], external_bytes: int) -> None:
    """Takes the weights of `owner` (a table; its codes and scales) out of every reader that holds them: as they are,
    in another shape, or, if of two axes, transposed.

    Nothing changes where no reader does. All files lie in one folder.
    """
    model = _loaded(owner)
    held = [value for value in model.graph.initializers.values() if value.const_value is not None]
    table = [value for value in held if value.const_value.nbytes > INSIDE_BYTES]  # type: ignore[union-attr]
    tied = {path: found for path in readers if (found := _holding(_loaded(path), table))}
    if not tied:
        return
    save_onnx(model, owner, external_bytes=0)
    weights = onnx_ir.load(owner).graph.initializers
    for path, (reader, values) in tied.items():
        for value, name in values:
            _replace(reader, value, weights[name].const_value)
        save_onnx(reader, path, external_bytes)


def _loaded(path: Path) -> onnx_ir.Model:
    model = onnx_ir.load(path)
    onnx_ir.external_data.load_to_model(model)  # its files are about to be written again
    return model


def _holding(
    model: onnx_ir.Model, table: Sequence[onnx_ir.Value]
) -> tuple[onnx_ir.Model, list[tuple[onnx_ir.Value, str]]] | None:
    """The model and its weights that are the table's, with the names that those have there."""
    found = []
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            found += [(value, str(part.name)) for part in table if _same(value, part)][:1]
    return (model, found) if found else None


def _same(value: onnx_ir.Value, part: onnx_ir.Value) -> bool:
    held, wanted = value.const_value, part.const_value
    assert held is not None and wanted is not None
    if held.nbytes != wanted.nbytes or held.dtype != wanted.dtype:
        return False
    return held.tobytes() == wanted.tobytes() or _is_turned(held, wanted)


def _is_turned(held: onnx_ir.TensorProtocol, wanted: onnx_ir.TensorProtocol) -> bool:
    return len(held.shape) == 2 and np.array_equal(held.numpy(), wanted.numpy().T)


def _replace(model: onnx_ir.Model, value: onnx_ir.Value, weights: Any) -> None:
    """Puts the shared weights, an `onnx_ir.ExternalTensor`, in the place of an initializer."""
    held = value.const_value
    assert held is not None
    if held.tobytes() == weights.tobytes():
        place = weights.location, weights.offset, weights.length, weights.dtype
        value.const_value = onnx_ir.ExternalTensor(
            *place, shape=onnx_ir.Shape(held.numpy().shape), name=str(value.name), base_dir=weights.base_dir
        )
        return
    shared = onnx_ir.Value(name=f"{value.name}_shared", const_value=weights)
    turn = onnx_ir.node("Transpose", [shared], {"perm": [1, 0]})
    value.replace_all_uses_with(turn.outputs[0])
    model.graph.initializers.pop(str(value.name))
    model.graph.register_initializer(shared)
    model.graph.insert_before(model.graph[0], turn)
