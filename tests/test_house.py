"""The limits that keep the house small, checked on every committed Python file."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    "benchmarks",
    "compress",
    "console",
    "demo",
    "docs",
    "examples",
    "export",
    "kernels",
    "selfcheck",
    "serve",
    "tests",
)
FILES = sorted(ROOT.glob("*.py")) + sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FOLDER_FILES = 10
# Split so that this file does not contain what it forbids.
FORBIDDEN_CODE = re.compile("|".join((r"torch\.sa" r"ve\(", r"torch\.lo" r"ad\(", r"import \*", r"shell=Tr" r"ue")))
FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_the_check_sees_the_product() -> None:
    assert {"cli.py", "compress/plan.py", "tests/test_house.py"} <= {_name(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_file_keeps_the_house_limits(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert text.count("\n") <= MAX_FILE_LINES, f"{_name(path)}: more than {MAX_FILE_LINES} lines; split it by duty"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{_name(path)}:{node.lineno}: {node.name} has {lines} lines"
    for number, line in enumerate(text.splitlines(), start=1):
        found = FORBIDDEN_CODE.search(line)
        assert found is None, f"{_name(path)}:{number}: {found.group()} is forbidden here"
    assert not _imported(tree) & FORBIDDEN_IMPORTS, f"{_name(path)}: JSON and safetensors only"


def test_no_room_holds_more_than_ten_files() -> None:
    """Of the product: tests and benchmarks are looked up by the name of what they are about."""
    rooms = Counter(path.parent for path in FILES if path.name != "__init__.py")
    product = {room: count for room, count in rooms.items() if not _name(room).startswith(("benchmarks", "tests"))}
    assert {_name(room): count for room, count in product.items() if count > MAX_FOLDER_FILES} == {}


def test_no_module_has_a_name_that_says_nothing() -> None:
    vague = [_name(path) for path in FILES if path.stem in VAGUE_NAMES or path.parent.name in VAGUE_NAMES]
    assert vague == []


def test_tests_are_no_packages() -> None:
    # With an __init__.py, tests/kernels would be imported as `kernels`, a name transformers probes.
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_only_the_job_itself_takes_all_options() -> None:
    rooms = [path for path in FILES if _name(path).split("/")[0] in ("compress", "export", "serve", "kernels")]
    whole = {_name(path) for path in rooms if "CompressOptions" in path.read_text(encoding="utf-8")}
    assert whole == {"compress/options.py", "compress/run_record.py"}  # which makes them, and reads them again
