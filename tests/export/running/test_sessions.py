"""What ONNX Runtime is asked for on a GPU, without one."""

from __future__ import annotations

import pytest
from exports import export_tiny

from slimvlm.compress.errors import DeviceError
from slimvlm.export.running.exported import Exported
from slimvlm.export.running.sessions import GROWING, providers_of

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
STAYING = ("vision_encoder", "encoder_model", "vision_model", "text_model")


def test_a_cpu_has_its_provider_and_no_options():
    assert providers_of("vision_encoder", "cpu") == [(CPU, {})]


@pytest.mark.parametrize(("device", "number"), [("cuda", "0"), ("cuda:1", "1")])
@pytest.mark.parametrize("graph", (*STAYING, *GROWING))
def test_cuda_runs_on_its_own_gpu_without_tf32_as_torch_does(graph, device, number):
    assert providers_of(graph, device) == [(CUDA, {"device_id": number, "use_tf32": "0"})]


@pytest.mark.parametrize("graph", STAYING)
def test_tensorrt_has_cuda_behind_it_and_keeps_its_engines(graph):
    (first, options), behind = providers_of(graph, "tensorrt:1", engines="/engines/slim")
    assert (first, [behind]) == (TENSORRT, providers_of(graph, "cuda:1"))
    assert options["device_id"] == "1"
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == "/engines/slim"
    assert options["trt_fp16_enable"] == "0"


def test_tensorrt_takes_fp16_for_graphs_of_fp16_and_keeps_nothing_where_no_folder_is_given():
    [(_, options), _] = providers_of("vision_encoder", "tensorrt:0", half=True)
    assert options == {"device_id": "0", "trt_fp16_enable": "1"}


@pytest.mark.parametrize("graph", GROWING)
def test_graphs_that_grow_with_every_token_are_never_given_to_tensorrt(graph):
    assert providers_of(graph, "tensorrt:0", engines="/engines") == providers_of(graph, "cuda:0")


@pytest.mark.parametrize("device", ("cuda:0", "tensorrt:0"))
def test_a_runtime_without_the_provider_says_so(tmp_path, device):
    export_tiny("clip", tmp_path / "export", samples=2)
    runner = Exported.open(tmp_path / "export").runner("onnx", device)
    wanted = TENSORRT if device.startswith("tensorrt") else CUDA
    with pytest.raises(DeviceError, match=rf"has no {wanted} \(only .*{CPU}\); use --device cpu"):
        runner.inputs("vision_model")
