"""What the pages for programmers show is run as it stands, on a tiny model."""

import re
import runpy
from pathlib import Path

import pytest
from tiny_folders import write_tiny

from slimvlm.compress.allocate.allocators import ALLOCATORS
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.recovery.distillation.recipe import LOSSES, PROGRESSIONS, STARTS
from slimvlm.compress.slicing.compensation import COMPENSATIONS
from slimvlm.compress.sparsity.rules import RULES
from slimvlm.compress.statistics.rows import POOLS
from slimvlm.export.variants import VARIANTS

ROOT = Path(__file__).parents[1]

ROWS = {
    "Criteria": CRITERIA,
    "Tokens": POOLS,
    "Allocators": ALLOCATORS,
    "Compensation": COMPENSATIONS,
    "Recovery": (*PROGRESSIONS, *LOSSES, *STARTS),
    "Variants": VARIANTS,
    "Zeros": RULES,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`my-vlm` and `samples.jsonl`, then what the blocks of docs/python.md leave beside them."""
    where = tmp_path_factory.mktemp("docs")
    write_tiny(where)
    return where


@pytest.fixture(scope="module")
def shown(folder):
    """The names that the blocks of docs/python.md define, run in one process, one after the other."""
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for found in re.finditer(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
            lines = PAGE[: found.start()].count("\n") + 1
            exec(compile("\n" * lines + found[1], "docs/python.md", "exec"), names)
    return names


PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_paths_that_pages_name_exist():
    folders = "benchmarks|compress|console|demo|docs|examples|export|kernels|selfcheck|serve|tests"
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        named = re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*\w", page.read_text(encoding="utf-8"))
        missing = {name for name in named if "NAME" not in name and not (ROOT / name).exists()}
        assert missing == set(), page.name


def test_every_row_of_a_registry_has_its_section_in_the_page_of_methods():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    chapters = re.findall(r"^## (\w+).*?\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    found = {name: sorted(re.findall(r"^### (\S+)$", text, re.M)) for name, text in chapters}
    assert found == {name: sorted(rows) for name, rows in ROWS.items()}


def test_the_blocks_of_the_python_page_run(shown):
    assert shown["result"].plan.removed_fraction == pytest.approx(0.4, abs=0.01)
    assert shown["run"].medians["ttft"] > 0
    assert shown["answer"].tokens > 0


def test_the_example_compresses(folder, monkeypatch, capsys):
    asked = [folder / "my-vlm", folder / "samples.jsonl", folder / "example", "--ratio", "0.2", "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["compress.py", *map(str, asked)])
    runpy.run_path(ROOT / "examples" / "compress.py", run_name="__main__")
    assert "LlavaProcessor load from" in capsys.readouterr().out


def test_the_example_measures_an_export(folder, shown, monkeypatch, capsys):
    asked = [folder / "exported", folder / "0.png", "what is it ?", "--rounds", "2"]
    monkeypatch.setattr("sys.argv", ["measure_export.py", *map(str, asked)])
    runpy.run_path(ROOT / "examples" / "measure_export.py", run_name="__main__")
    assert re.search(r"first token, image included: [\d.]+ ms \(median of 2\)", capsys.readouterr().out)
