"""The timed loop over exported graphs says what torch said when they were exported."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exports import export_tiny

from slimvlm.export.checks.sample import read_sample
from slimvlm.export.running.exported import Exported
from slimvlm.export.running.generation import until_end
from slimvlm.export.running.runners import BoundRunner, SessionRunner
from slimvlm.serve.backends.backend import HostClock, time_embedding, time_generation
from slimvlm.serve.backends.graph_backend import GraphBackend

FAMILIES = ("llava", "qwen3_vl", "smolvlm", "blip2_t5")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    done = {}

    def get(name):
        if name not in done:
            out = tmp_path_factory.mktemp(name) / "export"
            export_tiny(name, out, formats=("onnx", "torchscript"), samples=2)
            done[name] = Exported.open(out)
        return done[name]

    return get


def backends_of(export):
    arrays = export.runner("onnx", threads=1)
    for runner in (arrays, BoundRunner(arrays.files, threads=1), export.runner("torchscript")):
        yield GraphBackend(runner, export.manifest.generation, CPU)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_timed_loop_over_graphs_gives_the_tokens_of_torch(exported, name):
    export = exported(name)
    given, expected = read_sample(export.folder)
    wanted = until_end(expected["tokens"][0], export.manifest.generation.end)
    for backend in backends_of(export):
        backend.place(given)
        timed = time_generation(backend, HostClock(), 6)
        assert timed.tokens.shape == (1, 6)
        assert timed.tokens[0, : len(wanted)].tolist() == wanted
        assert torch.equal(time_generation(backend, HostClock(), 6).tokens, timed.tokens)


def test_the_language_model_of_graphs_runs_without_images(exported):
    for name in ("llava", "blip2_t5"):
        for backend in backends_of(exported(name)):
            ids = np.arange(3, 17).reshape(2, 7)
            backend.place({"input_ids": ids, "attention_mask": np.ones_like(ids)})
            assert time_generation(backend, HostClock(), 3, images=False).tokens.shape == (2, 3)


def test_graphs_of_a_dual_encoder_embed_images_and_texts(exported):
    export = exported("clip")
    given, expected = read_sample(export.folder)
    for backend in backends_of(export):
        backend.place(given)
        assert set(time_embedding(backend, HostClock())) == {"vision", "text"}
        found = backend.vision()["image_embeds"].detach().numpy()
        np.testing.assert_allclose(found, expected["vision_model.image_embeds"], atol=1e-4)


def test_an_output_that_onnx_runtime_holds_becomes_a_tensor_without_a_copy(exported):
    """The very call that no version below the floor of pyproject.toml can do (1.22 to 1.25: an invalid capsule)."""
    session = exported("llava").runner("onnx", threads=1).session("embed_tokens")
    binding = session.io_binding()
    ids = torch.arange(6).reshape(2, 3)
    binding.bind_input("input_ids", "cpu", 0, np.int64, tuple(ids.shape), ids.data_ptr())
    binding.bind_output("inputs_embeds", "cpu", 0)
    session.run_with_iobinding(binding)
    [value] = binding.get_outputs()
    tensor = torch.from_dlpack(value)
    assert tensor.data_ptr() == value.data_ptr()
    np.testing.assert_array_equal(tensor, value.numpy())


class Watched:
    """A session that keeps the names of the methods that were called."""

    def __init__(self, session, calls):
        self.session, self.calls = session, calls

    def __getattr__(self, name):
        self.calls.append(name)
        return getattr(self.session, name)


@pytest.mark.parametrize(("kind", "asked"), [(SessionRunner, "run"), (BoundRunner, "run_with_iobinding")])
def test_a_later_token_is_two_runs_of_sessions_and_no_question_to_them(exported, kind, asked):
    export, calls = exported("llava"), []

    class WatchedRunner(kind):
        def session(self, graph):
            return Watched(super().session(graph), calls)

    runner = WatchedRunner(export.runner("onnx").files, threads=1)
    backend = GraphBackend(runner, export.manifest.generation, CPU)
    backend.place(read_sample(export.folder)[0])
    with torch.inference_mode():
        token = backend.prefill(backend.vision(), 6).argmax(-1, keepdims=True)
        calls.clear()
        for _ in range(5):
            token = backend.step(token).argmax(-1, keepdims=True)
    assert calls == 10 * [asked]
