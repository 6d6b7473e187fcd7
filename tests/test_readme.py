"""The tables of the README and of the model card are what the benchmark prints from its stored measurements."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def table() -> str:
    spec = importlib.util.spec_from_file_location("quality_benchmark", ROOT / "benchmarks" / "quality.py")
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(sys.modules, spec.name, benchmark)  # its dataclasses look themselves up there
    spec.loader.exec_module(benchmark)
    monkeypatch.undo()
    return benchmark.table(benchmark.read(ROOT / "benchmarks" / "results" / "quality.jsonl"))


@pytest.mark.parametrize("page", ["README.md", "demo/README.md"])
def test_the_printed_table_is_the_measured_one(table, page):
    assert table in (ROOT / page).read_text()


def test_the_readme_is_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
