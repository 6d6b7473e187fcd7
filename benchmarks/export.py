"""What an export costs, and what the exported cut is worth: speed, size, seconds, memory.

    python benchmarks/export.py speed [--repeats 7]   dense and half of a medium decoder: fp32 variants, fused operators
    python benchmarks/export.py large                 a graph of more than 2 GB, its weights beside it, run
    python benchmarks/export.py smolvlm               seconds and peak memory of SmolVLM-256M's configuration
    python benchmarks/export.py families              seconds of a whole checked export per family, tiny models
    python benchmarks/export.py variants              every exporter and variant of every family, at full depth

One thread. Times are the process's CPU time and the least of several interleaved runs, so that others on the machine
change them little. Targets: half of heads and channels >= 1.8 x faster in prefill and decode; peak memory <= 3 x the
weights. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

from slimvlm.compress.errors import SlimvlmError
from slimvlm.compress.files.writing import installed_versions
from slimvlm.compress.models.families import find_family
from slimvlm.export.graphs.build import build_graphs
from slimvlm.export.graphs.decoder import Embed
from slimvlm.export.graphs.graph import Graph, Port
from slimvlm.export.options import EXTERNAL_BYTES, ExportOptions
from slimvlm.export.running.generation import empty_cache
from slimvlm.export.running.manifest import VERSIONED
from slimvlm.export.running.runners import SessionRunner
from slimvlm.export.variants import VARIANTS
from slimvlm.export.writers.onnx_rewriting import fuse
from slimvlm.export.writers.onnx_writer import trace_onnx, write_onnx, write_variant

PROMPT, VOCABULARY, IMAGE_TOKEN = 128, 8000, 7999


def medium(heads: int, channels: int) -> nn.Module:
    """A LLaVA with 8 layers of width 1024 and heads of 64, its vision tower as small as can be."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=channels,
        num_hidden_layers=8,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
    )
    tower = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE_TOKEN)
    return transformers.LlavaForConditionalGeneration(config).eval()


def decoder_of(model: nn.Module, pixels: torch.Tensor) -> Graph:
    """Its decoder as a graph."""
    batch = {"pixel_values": pixels, "pixel_attention_mask": torch.ones(2, 1, *pixels.shape[-2:])}
    return build_graphs(model, find_family(model.config), batch)[-1]


def speed(repeats: int, exporter: str) -> dict[str, object]:
    """Prefill of 128 tokens and one decoding step after them, in ms of CPU time; file sizes in bytes.

    In a decoding step every weight is read once, so the ratio of the file sizes is the most that can be gained; the
    head, which is not cut, and the operators between the matrices keep int8 below it. `--fuse cpu` has fewer of those.
    """
    with tempfile.TemporaryDirectory() as scratch:
        files: dict[str, Path] = {}
        for name, heads, channels in (("dense", 16, 4096), ("half", 8, 2048)):
            graph = decoder_of(medium(heads, channels), torch.zeros(2, 3, 16, 16))
            full = trace_onnx(graph, ExportOptions(exporter=exporter)).model
            fused = full.clone()
            fuse(fused, "cpu")
            made = [(full, row, row.name) for row in VARIANTS.values() if row.dtype == "float32"]
            made += [(fused, VARIANTS[kind], f"{kind} fused") for kind in ("fp32", "int8")]
            for source, row, kind in made:
                files[f"{name} {kind}"] = target = Path(scratch) / f"{name} {kind}.onnx"
                write_variant(source, target, row, EXTERNAL_BYTES)
        runs = {name: _runs(path) for name, path in files.items()}
        least = {name: [float("inf")] * 2 for name in runs}
        for _ in range(repeats):
            for name, steps in runs.items():
                for index, step in enumerate(steps):
                    started = time.process_time()
                    step()
                    least[name][index] = min(least[name][index], 1000 * (time.process_time() - started))
        sizes = {name: path.stat().st_size for name, path in files.items()}
    kinds = [name.removeprefix("dense ") for name in files if name.startswith("dense")]
    faster = {
        f"{kind} {what}": round(least[f"dense {kind}"][index] / least[f"half {kind}"][index], 2)
        for kind in kinds
        for index, what in enumerate(("prefill", "decode"))
    }
    smaller = {kind: round(sizes[f"dense {kind}"] / sizes[f"half {kind}"], 2) for kind in kinds}
    shown = {name: {"prefill_ms": round(a, 1), "decode_ms": round(b, 2)} for name, (a, b) in least.items()}
    return {"times": shown, "half_is_faster_by": faster, "half_is_smaller_by": smaller, "file_bytes": sizes}


def _runs(path: Path) -> tuple[Callable[[], object], ...]:
    """Prefill and one step of one graph, warmed up."""
    runner = SessionRunner({"decoder_model_merged": path}, threads=1)
    generator = np.random.default_rng(0)

    def feeds(tokens: int, past: int) -> dict[str, np.ndarray]:
        cache = empty_cache(runner, 1, {})
        grown = {name: np.zeros((*array.shape[:2], past, array.shape[3]), array.dtype) for name, array in cache.items()}
        return {
            "inputs_embeds": generator.standard_normal((1, tokens, 1024), np.float32),
            "attention_mask": np.ones((1, tokens + past), np.int64),
            "position_ids": np.arange(past, past + tokens)[None],
            **grown,
        }

    calls = [feeds(PROMPT, 0), feeds(1, PROMPT)]
    steps = tuple(partial(runner.run, "decoder_model_merged", given) for given in calls)
    for step in steps:
        step()
    return steps


def large() -> dict[str, object]:
    """A table of 2.2 GB: written with its rows beside it, opened and looked up."""
    table = nn.Embedding(140_000, 4_000)
    ids = torch.randint(0, 140_000, (2, 3))
    axes = {0: "batch_size", 1: "sequence_length"}
    graph = Graph("embed_tokens", Embed(table, 4_000).eval(), (Port("input_ids", ids, axes),), {"inputs_embeds": axes})
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "embed_tokens.onnx"
        started = time.perf_counter()
        written = write_onnx(graph, path, ExportOptions())
        seconds = time.perf_counter() - started
        found = SessionRunner({"embed_tokens": path}).run("embed_tokens", {"input_ids": ids.numpy()})["inputs_embeds"]
        error = float(np.abs(found - table(ids).detach().numpy()).max())
        sizes = {file.name: file.stat().st_size for file in sorted(Path(scratch).iterdir())}
    return {"exporter": written.exporter, "seconds": round(seconds, 1), "files": sizes, "max_error": error}


def smolvlm(exporter: str) -> dict[str, object]:
    """All graphs of SmolVLM-256M with random weights: seconds each, and the peak of memory above what came before."""
    sys.path.insert(0, str(Path(__file__).parent))
    from smolvlm import smolvlm_256m

    before = _resident()
    model = smolvlm_256m().eval()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    pixels = torch.zeros(2, 1, 3, 512, 512)
    mask = torch.ones(2, 1, 512, 512, dtype=torch.long)
    seconds, peak = {}, _Peak()
    with tempfile.TemporaryDirectory() as scratch, peak:
        graphs = build_graphs(model, find_family(model.config), {"pixel_values": pixels, "pixel_attention_mask": mask})
        for graph in graphs:
            started = time.perf_counter()
            written = write_onnx(graph, Path(scratch) / f"{graph.name}.onnx", ExportOptions(exporter=exporter))
            seconds[graph.name] = [written.exporter, round(time.perf_counter() - started, 1)]
        size = sum(file.stat().st_size for file in Path(scratch).iterdir())
    used = peak.bytes - before
    return {
        "seconds": seconds,
        "weights_bytes": weights,
        "files_bytes": size,
        "peak_bytes": used,
        "peak_over_weights": round(used / weights, 2),
    }


def families(exporter: str) -> dict[str, object]:
    """Export with checks of every tiny model of the tests: seconds of CPU time, and whether all answers are torch's."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    from exports import export_tiny
    from tiny_models import FACTORIES

    report: dict[str, object] = {}
    for name in FACTORIES:
        with tempfile.TemporaryDirectory() as scratch:
            started = time.process_time()
            manifest = export_tiny(name, Path(scratch) / "export", exporter=exporter).manifest
            seconds = round(time.process_time() - started, 1)
        exporters = sorted({artifact.exporter for artifact in manifest.artifacts})
        equal = {"equal_answers": [f"{check['equal']} of {check['samples']}" for check in manifest.checks]}
        report[name] = {"cpu_seconds": seconds, "exporters": exporters, **equal}
        print(name, seconds, exporters, file=sys.stderr)
    return report


def variants() -> dict[str, object]:
    """Every exporter and variant of every tiny model at full depth; in the tests the towers have one block."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    from exports import export_tiny
    from tiny_models import FACTORIES

    ways: list[dict[str, object]] = [
        {"exporter": exporter, **way}
        for exporter in ("torchscript", "dynamo")
        for way in ({"quantize": "int8"}, {"quantize": "int8", "fuse": "cpu"}, {"dtype": "fp16"})
    ]
    ways += [{"formats": (form,), "dtype": dtype} for form in ("torchscript", "pt2") for dtype in ("fp32", "fp16")]
    report: dict[str, object] = {}
    for name in FACTORIES:
        for way in ways:
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    export_tiny(name, Path(scratch) / "export", **way)
                    said = "ok"
                except SlimvlmError as error:
                    said = str(error)
            report[f"{name} {' '.join(map(str, way.values()))}"] = said
            print(name, way, said, file=sys.stderr)
    return report


class _Peak:
    """Largest resident memory inside the block, sampled."""

    def __enter__(self) -> None:
        self.bytes, self._done = _resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.bytes = max(self.bytes, _resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "large", "smolvlm", "families", "variants"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--exporter", choices=("auto", "dynamo", "torchscript"), default="auto")
    given = parser.parse_args()
    torch.set_num_threads(1)
    jobs: dict[str, Callable[[], dict[str, object]]] = {
        "speed": lambda: speed(given.repeats, given.exporter),
        "large": large,
        "smolvlm": lambda: smolvlm(given.exporter),
        "families": lambda: families(given.exporter),
        "variants": variants,
    }
    print(json.dumps({given.what: jobs[given.what](), "versions": installed_versions(VERSIONED)}, indent=1))


if __name__ == "__main__":
    main()
