"""The profile as a file: nothing is lost, nothing is guessed, what does not fit is named with its place."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from profiles import example_profile

from slimvlm.compress.files.decoding import decode, parse
from slimvlm.serve.profile import Cell, Profile, Ratio, Verdict


def read_back(text: str) -> Profile:
    return decode(parse(text), Profile, "profile")


def changed(path: str, value: object) -> str:
    """The example's JSON with one value replaced; `...` takes the key away."""
    document = json.loads(example_profile().to_json())
    *parents, last = path.split("/")
    where = document
    for name in parents:
        where = where[int(name) if isinstance(where, list) else name]
    if value is ...:
        del where[last]
    else:
        where[int(last) if isinstance(where, list) else last] = value
    return json.dumps(document)


def test_a_profile_survives_its_file() -> None:
    profile = example_profile()
    assert read_back(profile.to_json()) == profile


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 1, "profile: schema 1 is not the 2"),
        ("seed", ..., "profile: key 'seed' is missing"),
        ("cells/0/runs/slim/memory/more", 1, r"profile\.cells\[0\]\.runs\.slim\.memory: unknown key 'more'"),
        ("cells/0/runs/slim/memory/host_peak_bytes", "1", "host_peak_bytes: '1' is not of type int"),
        ("cells/0/runs/dense/seconds/tpot/2/1", None, r"seconds\.tpot\[2\]\[1\]: None is not a finite number"),
        ("cells/0/runs/dense/seconds/tpot/2/1", float("nan"), "it holds NaN, which is no JSON number"),
        ("cells/0/batch_size", True, "batch_size: True is not of type int"),
        ("cells/0/image_size", [1, 2, 3], "image_size: 3 entries; accepted is 2"),
        ("cells/0/status", "done", r"cells\[0\]: cell: status is 'done'; accepted is one of measured"),
        ("cells/0/runs/slim", ..., "cell: the dense model alone was measured"),
        ("cells/0/runs/slim/seconds/tpot/0", [], r"seconds\.tpot has a start without a round"),
        ("cells/0/runs/slim/seconds/tpot/0/0", -1.0, r"seconds\.tpot is -1\.0; accepted is more than 0"),
        ("cells/0/runs/slim/medians/tpot", ..., "medians has no tpot, of which there are seconds"),
        ("cells/0/ratios/tpot/low", 3.0, r"ratio: 2\.0 lies outside of its interval"),
        ("cells/0/ratios/tpot/high", 1e300, "ratio is 1e\\+300; accepted is more than 0 and at most 1e\\+18"),
        ("decoder_tests/0/runs/slim", ..., "decoder test: the dense model alone was measured"),
        ("device/copy_bytes_per_second/x", 1.0, "the key 'x'; accepted are numbers of bytes"),
        ("device/launch_seconds", 0.0, "launch_seconds is 0.0; accepted is more than 0"),
        ("cells", {}, "profile.cells: {} is not a list"),
        ("device", [], r"profile\.device: \[\] is not an object"),
        ("device/launch_seconds", ..., "profile.device: key 'launch_seconds' is missing"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_back(changed(path, value))


def test_text_that_is_no_profile_is_refused() -> None:
    for text, message in (("{", "not JSON"), ("[]", "is not an object")):
        with pytest.raises(ValueError, match=message):
            read_back(text)


def test_a_figure_that_is_not_finite_is_not_written() -> None:
    profile = example_profile()
    broken = replace(profile, settings={"cell_seconds": float("inf")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.to_json()


def test_words_that_are_not_in_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="verdict is 'better'"):
        Ratio(1.0, 2.0, 2.0, 1.9, 2.1, "better")
    with pytest.raises(ValueError, match="bound is 'cpu'"):
        Verdict("torch", "tpot", "batch 1", "cpu", 2.0, 1.5, 0.5, ())


def test_a_workload_reads_as_words() -> None:
    cell = Cell("torch", "fp32", 2, (224, 336), 32, 16, "measured")
    assert cell.workload == "batch 2, image 224 x 336, prompt 32, new 16"
    assert replace(cell, image_size=None).workload == "batch 2, prompt 32, new 16"


def test_a_profile_is_read_without_torch() -> None:
    code = "import sys; import slimvlm.serve.profile; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
