"""Without a GPU: every kernel, as it is launched, compiles for real GPUs and takes what the table says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from cubins import TARGETS, cases, compile_all, compile_case, describe, spills_on_rocm  # noqa: E402

from slimvlm.kernels import FOLDERS  # noqa: E402

TABLE = json.loads((Path(__file__).parent / "resources.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("capability", TARGETS)
def test_every_kernel_compiles_without_spills_reads_whole_vectors_and_matches_the_table(capability):
    found = {}
    for one in compile_all(capability):
        assert one.spilled == 0, f"{one.target} {one.name}: {one.spilled} bytes of a thread's registers spill to memory"
        assert one.wide is not False, f"{one.target} {one.name}: loads are narrower than 16 bytes"
        row = {"registers": one.registers, "shared": one.shared, "spilled": one.spilled}
        found[f"{one.target} {one.name}"] = row
    recorded = {name: row for name, row in TABLE["kernels"].items() if name.startswith(f"sm_{capability} ")}
    assert set(found) == set(recorded), (
        "python -P tests/support/cubins.py tests/kernels/resources.json writes the table"
    )
    if triton.__version__ == TABLE["triton"]:  # another compiler allocates otherwise
        assert found == recorded


def test_every_kernel_and_setting_is_in_the_table():
    assert {case.name.split()[0] for case in cases()} == set(FOLDERS.values())
    assert all(f"sm_90 {describe(case)}" in TABLE["kernels"] for case in cases())


def test_every_kernel_compiles_for_rocm_without_spills():
    for case in cases():
        assert spills_on_rocm(case) == 0, case.name


def test_the_checks_notice_spills_and_narrow_loads():
    case = next(case for case in cases() if case.name.startswith("taylor along fp32"))
    assert compile_case(replace(case, settings={"TILE": 32768, "num_warps": 4}), 80).spilled > 0
    case.arguments["ALIGN"] = 1
    assert compile_case(case, 80).wide is False
