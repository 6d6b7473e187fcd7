"""What is installed: every package, the demo, light imports."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from slimvlm.export.running.runtimes import runtime_conflict

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PRODUCT = ("compress", "console", "demo", "export", "kernels", "selfcheck", "serve")


def _python(code: str, *, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_folder_with_modules_is_a_listed_package() -> None:
    folders = {path.parent for name in PRODUCT for path in (ROOT / name).rglob("*.py")}
    placed = {ROOT / folder: name for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
    named = {"slimvlm." + str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders - set(placed)}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == named | set(placed.values())


def test_what_lies_in_the_namespace_of_others_leaves_it_open() -> None:
    """PEP 420: with an `__init__.py` only one of those who share it would be found."""
    folder = ROOT / PROJECT["tool"]["setuptools"]["package-dir"]["optimum.commands.register"]
    assert [path.name for path in folder.glob("*.py")] == ["slimvlm.py"]


def test_every_asset_of_the_demo_is_packaged() -> None:
    demo = ROOT / "demo"
    assets = {path for path in demo.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["slimvlm.demo"]
    assert assets - {path for pattern in patterns for path in demo.glob(pattern)} == set()
    assert demo / "samples" / "test.jsonl" in assets


def test_every_dependency_is_pinned_in_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")}
    project = PROJECT["project"]
    wanted = (
        project["dependencies"] + project["optional-dependencies"]["dev"] + project["optional-dependencies"]["onnx"]
    )
    names = {re.split(r"[<>=!~\[; ]", requirement)[0].lower() for requirement in wanted}
    assert names - pinned == set()


def test_installed_versions_satisfy_the_project() -> None:
    assert importlib.metadata.version("slimvlm") == PROJECT["project"]["version"]


def test_the_two_onnx_runtimes_are_never_in_one_extra() -> None:
    for name, requirements in PROJECT["project"]["optional-dependencies"].items():
        runtimes = [line for line in requirements if line.startswith("onnxruntime")]
        assert len(runtimes) <= 1, name


def test_every_extra_asks_for_an_onnx_runtime_whose_outputs_torch_can_take() -> None:
    """`torch.from_dlpack(OrtValue)` failed on 1.22 to 1.25 and works on 1.26 to 1.31 (test_graph_backend.py)."""
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [line for name in ("onnx", "gpu", "dev") for line in extras[name] if line.startswith("onnxruntime")]
    assert [tuple(map(int, line.partition(">=")[2].split("."))) >= (1, 26) for line in lines] == 3 * [True]


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from slimvlm.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'rich', 'PIL') if name in sys.modules])"
    )
    assert _python(code, folder=tmp_path).splitlines()[-1] == "[]"


def test_kernels_import_alone_and_light() -> None:
    # transformers may import a top-level `kernels`; ours must then be harmless.
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import kernels\n"
        "assert kernels.__file__.startswith(sys.path[0]), kernels.__file__\n"
        "print([name for name in ('torch', 'triton', 'numpy', 'slimvlm') if name in sys.modules])"
    )
    assert _python(code, folder=ROOT / "tests").splitlines()[-1] == "[]"


@pytest.mark.parametrize("installed", [(), ("onnxruntime",), ("onnxruntime-gpu",)])
def test_one_onnx_runtime_is_no_conflict(installed: tuple[str, ...]) -> None:
    assert runtime_conflict(installed) is None


def test_both_onnx_runtimes_are_named_with_the_way_out() -> None:
    message = runtime_conflict(("onnxruntime", "onnxruntime-gpu"))
    assert message is not None
    assert "pip uninstall onnxruntime onnxruntime-gpu" in message


def test_pre_commit_and_the_forge_call_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))["jobs"].values()
    called = [hook["entry"] for repository in hooks for hook in repository["hooks"]]
    called += [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert "make test" in called
    for command in called:
        assert re.search(rf"^{command.removeprefix('make ')}:", makefile, re.M), command
    assert all("@v" in step["uses"] for job in jobs for step in job["steps"] if "uses" in step)
