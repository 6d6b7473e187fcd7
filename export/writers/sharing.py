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

from slimvlm.export.writers.onnx_writer import INSIDE_BYTES, numbers, save_onnx

AT_ONCE = 2**22  # numbers that are compared at a time
Found = tuple[onnx_ir.Value, str, bool]  # a reader's weight, its name in the owner, whether it is transposed there


def share_table(owner: Path, readers: Sequence[Path], external_bytes: int) -> None:
    """Takes the weights of `owner` (a table; its codes and scales) out of every reader that holds them: as they are,
    in another shape, or, if of two axes, transposed.

    Nothing changes where no reader does. All files lie in one folder.
    """
    model = onnx_ir.load(owner)
    held = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    table = [tensor for tensor in held if tensor.nbytes > INSIDE_BYTES]
    tied = {path: (reader, found) for path in readers if (found := _found(reader := onnx_ir.load(path), table))}
    if not tied:
        return
    save_onnx(model, owner, external_bytes=0)
    weights = onnx_ir.load(owner).graph.initializers
    for path, (reader, found) in tied.items():
        for value, name, is_turned in found:
            _replace(reader, value, weights[name].const_value, is_turned)
        save_onnx(reader, path, external_bytes)


def _found(model: onnx_ir.Model, table: Sequence[onnx_ir.TensorProtocol]) -> list[Found]:
    """Those of a model's weights that are the table's."""
    found = []
    for value in model.graph.initializers.values():
        if (held := value.const_value) is None:
            continue
        for part in table:
            if held.nbytes != part.nbytes or held.dtype != part.dtype:
                continue
            if (is_same := _is_same(held, part)) or _is_turned(held, part):
                found.append((value, str(part.name), not is_same))
                break
    return found


def _is_same(held: onnx_ir.TensorProtocol, part: onnx_ir.TensorProtocol) -> bool:
    """Whether all bits are, in whatever shape; read up to the first that is not."""
    counts = range(0, part.size, AT_ONCE)
    pairs = ((numbers(held, at, AT_ONCE), numbers(part, at, AT_ONCE)) for at in counts)
    return all(left.tobytes() == right.tobytes() for left, right in pairs)


def _is_turned(held: onnx_ir.TensorProtocol, part: onnx_ir.TensorProtocol) -> bool:
    if len(held.shape) != 2 or held.shape.numpy() != part.shape.numpy()[::-1]:
        return False
    rows, wanted = numbers(held).T, numbers(part)
    each = max(1, AT_ONCE // max(1, wanted.shape[1]))
    return all(np.array_equal(rows[at : at + each], wanted[at : at + each]) for at in range(0, len(wanted), each))


def _replace(model: onnx_ir.Model, value: onnx_ir.Value, weights: Any, is_turned: bool) -> None:
    """Puts the shared weights, an `onnx_ir.ExternalTensor`, in the place of an initializer."""
    held = value.const_value
    assert held is not None
    if not is_turned:
        place = weights.location, weights.offset, weights.length, weights.dtype
        value.const_value = onnx_ir.ExternalTensor(
            *place, shape=onnx_ir.Shape(held.shape.numpy()), name=str(value.name), base_dir=weights.base_dir
        )
        return
    shared = onnx_ir.Value(name=f"{value.name}_shared", const_value=weights)
    turn = onnx_ir.node("Transpose", [shared], {"perm": [1, 0]})
    value.replace_all_uses_with(turn.outputs[0])
    model.graph.initializers.pop(str(value.name))
    model.graph.register_initializer(shared)
    model.graph.insert_before(model.graph[0], turn)
