"""The whole profile on tiny models: what is written, what goes on after a loss, what is refused."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import psutil
import pytest
from exports import export_tiny
from profiling import quick, save_pair

from slimvlm.compress.errors import CheckFailedError, CheckpointError, DeviceError, OutputError, UnsuitableOptionError
from slimvlm.compress.files.decoding import read
from slimvlm.serve.profile import MEASURED, OUT_OF_MEMORY, Profile
from slimvlm.serve.profiling import profile_models

BUSY = 0.1  # seconds of work after which a worker is certainly loading its model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    return str(export_tiny("llava", folder / "export", samples=2, max_new_tokens=2).out)


def workers():
    """Processes that measure; the server they are forked from stays."""
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    return psutil.Process(server).children() if server else []


class Loss:
    """Progress that kills a worker of the cell number `at` as soon as there is one."""

    def __init__(self, at):
        self.at = at

    def __call__(self, stage, done, total, note=""):
        if stage == "profile" and done == self.at:
            threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self):
        while not any(process.cpu_times().user > BUSY for process in workers()):
            os.sched_yield()
        workers()[0].kill()


def test_a_profile_holds_paired_raw_samples_and_what_follows_from_them(pair, tmp_path):
    dense, slim = pair
    options = quick(tmp_path, slim, against=dense, batch_sizes=(1, 2), decoder_tests=True, prompt_tokens=(60,))
    profile = profile_models(options)
    assert read(options.written, Profile) == profile
    assert [(cell.batch_size, cell.prompt_tokens, cell.new_tokens) for cell in profile.cells] == [
        (1, 60, 3),
        (2, 60, 3),
    ]
    for cell in profile.cells:
        assert (cell.status, cell.dtype, cell.image_size) == (MEASURED, "fp32", None)
        assert set(cell.runs) == set(profile.models) == {"dense", "slim"}
        for run in cell.runs.values():
            assert {tuple(map(len, starts)) for starts in run.seconds.values()} == {(2,)}
            assert set(run.seconds) == set(cell.ratios) == {"vision", "prefill", "ttft", "tpot", "end_to_end"}
            assert run.medians["vision"] < run.medians["ttft"] < run.medians["end_to_end"]
            assert run.flops["ttft"] == run.flops["vision"] + run.flops["prefill"]
            assert run.energy_joules_per_token is None
        assert cell.runs["slim"].flops["prefill"] < cell.runs["dense"].flops["prefill"]
    assert {verdict.phase for verdict in profile.verdicts} == {"vision", "prefill", "tpot"}
    assert [(test.name, test.tokens) for test in profile.decoder_tests] == [("pp256", 256), ("tg128", 128)]
    assert profile.models["slim"].layout == "per-layer"
    assert profile.models["slim"].parameters < profile.models["dense"].parameters
    assert profile.settings["threads"] == profile.device.threads == 1


def test_both_processes_are_started_anew_and_the_samples_of_every_start_are_kept(pair, tmp_path):
    dense, slim = pair
    profile = profile_models(quick(tmp_path, slim, against=dense, starts=3, rounds=6))
    [cell] = profile.cells
    assert cell.starts == profile.settings["starts"] == 3
    for run in cell.runs.values():
        assert len(run.load_seconds) == 3
        assert {tuple(map(len, starts)) for starts in run.seconds.values()} == {(2, 2, 2)}
    assert all(ratio.low <= ratio.value <= ratio.high for ratio in cell.ratios.values())


def test_graphs_of_an_export_are_measured_alone(exported, tmp_path):
    profile = profile_models(quick(tmp_path, exported, backend=("onnx",)))
    [cell] = profile.cells
    assert (cell.status, cell.dtype, set(cell.runs), cell.ratios) == (MEASURED, "fp32", {"slim"}, {})
    assert profile.models["slim"].weight_bytes > 0


def test_two_backends_are_compared_where_each_model_names_its_own(pair, exported, tmp_path):
    """Torch against graphs that are there, which the cell and the list of models say; their work is not compared."""
    dense, _ = pair
    profile = profile_models(quick(tmp_path, f"{exported}:onnx", against=f"{dense}:torch", backend=("torchscript",)))
    [cell] = profile.cells
    assert (cell.status, cell.backend, set(cell.ratios)) == (MEASURED, "onnx", set(cell.runs["dense"].seconds))
    assert {model: subject.source for model, subject in profile.models.items()} == {
        "slim": f"{exported}:onnx",
        "dense": f"{dense}:torch",
    }
    assert profile.verdicts == () and read(tmp_path / "profile.json", Profile) == profile


def test_a_dual_encoder_is_profiled_by_its_two_sides(tmp_path):
    dense, slim = save_pair(tmp_path, "clip")
    [cell] = profile_models(quick(tmp_path, slim, against=dense, decoder_tests=True)).cells
    assert set(cell.ratios) == {"vision", "text"}


def test_a_killed_dense_model_leaves_the_slim_one_and_the_other_cells(pair, tmp_path):
    dense, slim = pair
    options = quick(tmp_path, slim, against=dense, batch_sizes=(1, 2))
    first, second = profile_models(options, Loss(1)).cells
    assert first.status == OUT_OF_MEMORY
    assert "killed" in first.reason
    assert second.status == MEASURED
    assert read(options.written, Profile).cells[0].status == OUT_OF_MEMORY


@pytest.fixture
def interruptible():
    """The handler of a program that is run by hand: pytest's workers ignore the signal."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_keeps_what_was_measured_and_leaves_no_process(pair, tmp_path):
    dense, slim = pair
    options = quick(tmp_path, slim, against=dense, batch_sizes=(1, 2))

    def interrupt(stage, done, total, note=""):
        if stage == "profile" and done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        profile_models(options, interrupt)
    [cell] = read(options.written, Profile).cells
    assert cell.status == MEASURED
    assert not workers()


def test_a_crossed_limit_fails_with_the_whole_profile(pair, tmp_path):
    options = quick(tmp_path, pair[1], max_ttft_ms=1e-6, max_tpot_ms=1e6, max_memory=2**40)
    with pytest.raises(CheckFailedError, match=r"--max-ttft-ms 1e-06: the slim model takes .* ms \(torch, batch 1"):
        profile_models(options)
    profile = read(options.written, Profile)
    assert [(limit.name, limit.crossed) for limit in profile.limits] == [
        ("max_ttft_ms", True),
        ("max_tpot_ms", False),
        ("max_memory", False),
    ]


def test_missing_graphs_are_made_and_thrown_away(pair, tmp_path):
    [cell] = profile_models(quick(tmp_path, pair[1], backend=("torchscript",))).cells
    assert cell.status == MEASURED
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"slim": "nowhere"}, CheckpointError, "nowhere is not a folder"),
        ({"device": "cuda"}, DeviceError, "not available"),
        ({"provider": "cuda"}, DeviceError, "--provider cuda does not run on the device cpu"),
        ({"provider": "tensorrt"}, DeviceError, "--provider tensorrt does not run on the device cpu"),
        ({"backend": ("tensorflow",)}, UnsuitableOptionError, "choose from torch, onnx, torchscript"),
        ({"backend": ()}, UnsuitableOptionError, "names none"),
        ({"backend": ("torch:int5",)}, UnsuitableOptionError, "torch:int5 is unknown"),
        ({"batch_sizes": (0,)}, UnsuitableOptionError, "--batch-sizes 0: accepted is 1 to 2147483647"),
        ({"image_sizes": ((32, 9999),)}, UnsuitableOptionError, "--image-sizes 9999: accepted is 1 to 8192"),
        ({"threads": 10**9}, UnsuitableOptionError, "--threads 1000000000: accepted is 1 to 1024"),
        ({"starts": 0}, UnsuitableOptionError, "--starts 0: accepted is 1"),
        ({"warmup": -1}, UnsuitableOptionError, "--warmup -1: accepted is 0"),
        ({"seed": -1}, UnsuitableOptionError, "--seed -1: accepted is 0 to 4294967295"),
        ({"max_memory": -1}, UnsuitableOptionError, "--max-memory -1: accepted is 1"),
        ({"max_ttft_ms": float("nan")}, UnsuitableOptionError, "--max-ttft-ms nan: accepted is a finite number above"),
        ({"max_tpot_ms": float("inf")}, UnsuitableOptionError, "--max-tpot-ms inf: accepted is a finite number above"),
        ({"cell_seconds": float("nan")}, UnsuitableOptionError, "--cell-seconds nan: accepted is a finite"),
        ({"dtype": "int4"}, UnsuitableOptionError, "--dtype int4 is unknown"),
        ({"prompt_tokens": (2,)}, UnsuitableOptionError, "takes .* tokens here"),
        ({"prompt_tokens": (999,)}, UnsuitableOptionError, "more than the 256 this model takes"),
        ({"image_sizes": ((32, 32),)}, UnsuitableOptionError, "brings every image to 16x16"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(pair, tmp_path, changes, error, words):
    options = quick(tmp_path, **{"slim": pair[1], **changes})
    with pytest.raises(error, match=words):
        profile_models(options)
    assert not options.written.exists()


def test_a_folder_that_is_nothing_of_ours_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint .* nor what slimvlm compress or slimvlm export"):
        profile_models(quick(tmp_path, str(tmp_path)))


def test_models_of_two_families_are_not_compared(pair, tmp_path):
    other, _ = save_pair(tmp_path, "clip")
    with pytest.raises(UnsuitableOptionError, match="is clip and .* is llava"):
        profile_models(quick(tmp_path, pair[1], against=other))


def test_an_unwritable_place_is_refused_before_the_cells(pair, tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        profile_models(quick(tmp_path / "absent", pair[1]))
