"""ONNX graphs rewritten: int8 weights, fused operators."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir

from slimvlm.export.options import EXTERNAL_BYTES
from slimvlm.export.running.quiet import quiet
from slimvlm.export.variants import Variant
from slimvlm.export.writers.onnx_writer import data_name, save_onnx

QUANTIZED_OPERATORS = ["MatMul", "Gemm", "Gather"]  # no convolutions: one per image, and slow in int8 on a CPU


def quantize_int8(model: onnx_ir.Model, _: Variant, scratch: Path) -> onnx_ir.Model:
    """A model with int8 weights, one scale per output channel; activations are quantized as they come.

    ONNX Runtime does this from file to file: those are written into the folder `scratch`, and in memory is the result.
    """
    with quiet():
        from onnxruntime.quantization import QuantType, quantize_dynamic

    source, draft = scratch / "full.onnx", scratch / "int8.onnx"
    save_onnx(model, source, EXTERNAL_BYTES)
    with quiet():
        quantize_dynamic(
            source,
            draft,
            op_types_to_quantize=QUANTIZED_OPERATORS,
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=source.with_name(data_name(source)).exists(),
        )
    return onnx_ir.serde.deserialize_model(onnx.load(draft))


def fuse(model: onnx_ir.Model, provider: str) -> None:
    """Rewrites a model with ONNX Runtime's fused operators for an execution provider (`cpu`, `cuda`)."""
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    with quiet():
        fuse_for_onnxruntime(model, provider)
    _split_turned_products(model)


def _split_turned_products(model: onnx_ir.Model) -> None:
    """Turns a batch axis before a product where a fusion put it inside, but the runtime cannot: inputs of two ranks."""
    for node in [node for node in model.graph if node.op_type == "FusedMatMul"]:
        ranks = [0 if value is None or value.shape is None else len(value.shape) for value in node.inputs]  # 0: unknown
        if 0 in ranks or ranks[0] == ranks[1]:
            continue
        for place, flag in enumerate(("transBatchA", "transBatchB")):
            turned = node.attributes.pop(flag, None)
            if turned is None or not turned.as_int():
                continue
            last = ranks[place] - 1
            turn = onnx_ir.node("Transpose", [node.inputs[place]], {"perm": [*range(1, last), 0, last]})
            model.graph.insert_before(node, turn)
            node.replace_input_with(place, turn.outputs[0])
