"""Every Triton kernel, as it is launched, compiled for GPUs that are not here, and what each one takes.

python -P tests/support/cubins.py tests/kernels/resources.json     (writes the table that the tests compare with)
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slimvlm.kernels.gather import gpu as gather
from slimvlm.kernels.histogram import gpu as histogram
from slimvlm.kernels.norms import gpu as norms
from slimvlm.kernels.taylor import gpu as taylor

TARGETS = (80, 86, 90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
VECTOR_LOAD = re.compile(r"ld\.global\S*\.v(?:4\.[bfu]32|2\.[bfu]64|8\.[bfu]16)\s")
BYTES = {"fp32": 4, "bf16": 2, "i32": 4, "i16": 2}


@dataclass(frozen=True)
class Case:
    """One use of a kernel.

    Attributes:
        name: operation, layout, dtypes.
        arguments: a type as Triton spells it (`*fp32`, `i32`), or a constant.
        settings: constants and warps of a launch.
        tile_bytes: what one round of a program must read in loads of 16 bytes; None where it cannot.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    settings: dict[str, int]
    tile_bytes: Callable[[dict[str, int]], int] | None = None


@dataclass(frozen=True)
class Compiled:
    """What one case takes on one target; `wide` says whether the tile is read in loads of 16 bytes."""

    name: str
    target: str
    registers: int
    shared: int
    spilled: int
    wide: bool | None


def cases() -> Iterator[Case]:
    """All kernels and settings; the layouts and dtypes that compile to different loads."""
    for layout, weight, grad, variant in (
        ("along", "fp32", "fp32", "first"),
        ("along", "bf16", "fp32", "first"),
        ("across", "bf16", "fp32", "first"),
        ("along", "fp32", "fp32", "mix"),
        ("strided", "fp32", "fp32", "mix"),
    ):
        yield _taylor(layout, weight, grad, variant)
    for kind in ("fp32", "bf16"):
        vector = 16 // BYTES[kind]
        arguments = {"matrix": f"*{kind}", "norms": "*fp32", "tokens": "i32", "width": "i32", "per_token": "i32"}
        arguments |= {"per_channel": 1, "ALIGN": vector}
        tile = lambda c, b=BYTES[kind]: c["BLOCK_T"] * c["BLOCK_C"] * b  # noqa: E731
        for settings in (norms.SHORT_ROWS, norms.LONG_ROWS):
            yield Case(f"norms {kind}", norms.norms_kernel, arguments, settings, tile)
        yield _histogram(kind)
    for kind in ("i16", "i32"):
        arguments = {"weight": f"*{kind}", "rows": "*i64", "cols": None, "out": f"*{kind}", "height": "i32"}
        arguments |= {"width": "i32", "per_row": "i32", "per_col": 1, "ALIGN": 16 // BYTES[kind]}
        tile = lambda c, b=BYTES[kind]: c["BLOCK_R"] * c["BLOCK_C"] * b  # noqa: E731
        yield Case(f"gather rows {kind}", gather.gather_kernel, arguments, gather.SETTINGS, tile)
    yield Case("gather rows and cols i32", gather.gather_kernel, arguments | {"cols": "*i64"}, gather.SETTINGS)
    parts = dict.fromkeys(("kept", "pruned_cols", "pruned_rows", "pruned"), "*i32")
    arguments = {"weight": "*i32", "row_places": "*i32", "col_places": "*i32", **parts, "height": "i32"}
    arguments |= {"width": "i32", "kept_width": "i32", "per_row": "i32", "per_col": 1, "ALIGN": 4}
    yield Case("gather blocks i32", gather.blocks_kernel, arguments, gather.SETTINGS, tile)


def _taylor(layout: str, weight: str, grad: str, variant: str) -> Case:
    types = {"fp32": tl.float32, "bf16": tl.bfloat16}
    align = 1 if layout == "strided" else 16 // min(BYTES[weight], BYTES[grad])
    arguments = {"table": "*i64", "tiles": "*i32", "partial": "*fp32", "total": "i32", "VARIANT": variant}
    arguments |= {"LAYOUT": layout, "WEIGHT": types[weight], "GRAD": types[grad], "SQUARE": types[grad]}
    arguments |= {"ALIGN": align, "BLOCK_N": taylor.SURVIVORS[layout]}
    size = BYTES[weight] + BYTES[grad] * (2 if variant == "mix" else 1)
    tile = None if layout == "strided" else lambda settings: settings["TILE"] * size
    name = f"taylor {layout} {weight} {grad} {variant}"
    return Case(name, taylor.saliency_kernel, arguments, taylor.SETTINGS, tile)


def _histogram(kind: str) -> Case:
    pointers = {"outputs": f"*{kind}", "lengths": "*fp32", "widths": "*fp32", "bias": f"*{kind}", "mask": "*u8"}
    sizes = {"tokens": "i32", "rows": "i32", "bins": "i32", "per_token": "i32", "per_channel": 1, "share": "i32"}
    constants = {"DROP": False, "ALIGN": 16 // BYTES[kind], "SLOTS": 128}
    arguments = {**pointers, "counts": "*i64", **sizes, **constants}
    size = histogram.CHANNELS.value * BYTES[kind]
    tile = lambda settings: settings["BLOCK_T"] * size  # noqa: E731
    return Case(f"histogram {kind}", histogram.histogram_kernel, arguments, histogram.SETTINGS, tile)


def compile_case(case: Case, capability: int) -> Compiled:
    """To a cubin, and read what it takes."""
    kernel = _compile(case, GPUTarget("cuda", capability, 32))
    wide = None
    if case.tile_bytes is not None:
        loaded = 16 * 32 * case.settings["num_warps"] * len(VECTOR_LOAD.findall(kernel.asm["ptx"]))
        wide = loaded >= case.tile_bytes(case.settings)
    registers, spilled = _usage(kernel.asm["cubin"])
    return Compiled(describe(case), f"sm_{capability}", registers, kernel.metadata.shared, spilled, wide)


def describe(case: Case) -> str:
    """Its name in the table."""
    return " ".join([case.name, *(f"{key.removeprefix('num_')}={value}" for key, value in case.settings.items())])


def spills_on_rocm(case: Case) -> int:
    """Registers that spill on an AMD GPU of the CDNA 3 generation; compiles to a code object."""
    kernel = _compile(case, GPUTarget("hip", "gfx942", 64))
    assert kernel.asm["hsaco"].startswith(b"\x7fELF")
    return sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])))


def _compile(case: Case, target: GPUTarget) -> Any:
    function = case.kernel
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        value = {**case.arguments, **case.settings}[name]
        if isinstance(value, str) and (value.startswith("*") or value in BYTES):
            signature[name] = value
            if value.startswith("*"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name], constants[(index,)] = "constexpr", value
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": case.settings["num_warps"]})


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of a thread's memory on the stack: these kernels put nothing there but spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


def compile_all(capability: int) -> list[Compiled]:
    """Every case for one target."""
    return [compile_case(case, capability) for case in cases()]


def main() -> None:
    table = {}
    for capability in TARGETS:
        for one in compile_all(capability):
            row = {"registers": one.registers, "shared": one.shared, "spilled": one.spilled}
            table[f"{one.target} {one.name}"] = row
            print(f"{one.target} {one.name}: {row} wide={one.wide}", flush=True)
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(table.items()))
    text = f'{{\n  "triton": "{triton.__version__}",\n  "kernels": {{\n{lines}\n  }}\n}}\n'
    Path(sys.argv[1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
