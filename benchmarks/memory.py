"""How much memory each stage of `slimvlm compress` takes at its worst, over the fp32 weights, on a CPU.

    python benchmarks/memory.py --dtype float32 --recover none

Makes a LLaVA of 157 M random weights (the sizes of DINOv2-small and SmolLM2-135M, the processor and samples of the
demo), compresses it in a process of its own with the default batch sizes, and prints one line per stage. The resident
set is what Linux counts, libraries and memory-mapped files included; its high-water mark is read and reset all the
time. `at start` is the process with torch and transformers imported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from slimvlm.compress.files.writing import installed_versions
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.options import CompressOptions
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.pipeline import compress

SIDE, PATCH = 84, 14
GOAL = 2.5  # x the fp32 weights
POLL = 0.02  # seconds


def build(folder: Path, dtype: torch.dtype) -> None:
    """The checkpoint `folder`: random weights, seeded."""
    processor: Any = AutoProcessor.from_pretrained(MODEL)
    processor.patch_size, processor.image_processor.size = PATCH, {"height": SIDE, "width": SIDE}
    vision = CLIPVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text, image_token_index=4, vision_feature_layer=-1, image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=True,
    )  # fmt: skip
    save_checkpoint(folder, LlavaForConditionalGeneration(config).eval().to(dtype), processor, None)


@dataclass
class Watch:
    """The largest resident set per stage of the run in `out`, while inside."""

    out: Path
    peaks: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    phase: str = ""

    def __enter__(self) -> Watch:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def note(self, stage: str, done: int, total: int, note: str = "") -> None:
        """A callback of the run's progress: what happens inside a stage."""
        self.phase = stage

    def _poll(self) -> None:
        while not self._done.wait(POLL):
            peak = high_water()
            name = f"{self._stage()}: {self.phase}"
            self.peaks[name] = max(self.peaks[name], peak)

    def _stage(self) -> str:
        try:
            stages = json.loads((self.out / "run.json").read_text())["stages"]
        except (OSError, ValueError):
            return "before"
        running = [name for name, stage in stages.items() if stage["status"] == "running"]
        return running[0] if running else "between"


def high_water() -> int:
    """Bytes: the largest resident set since the last call."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def run(arguments: argparse.Namespace) -> None:
    """Compress what `build` made, watched."""
    folder, started = arguments.folder, time.perf_counter()
    options = CompressOptions(
        model=str(folder / "model"),
        out=folder / "out",
        data=SAMPLES / "train.jsonl",
        eval_data=SAMPLES / "val.jsonl",
        samples=arguments.samples,
        eval_samples=arguments.samples,
        rounds=arguments.rounds,
        criterion=arguments.criterion,
        recover=arguments.recover,
        steps=4,
        export=(),
        profile=False,
        device="cpu",
    )
    before = high_water()
    with Watch(options.out) as watch:
        result = compress(options, watch.note)
    weights = 4 * result.plan.parameters_before
    print(f"{'at start':40} {before / 2**20:7.0f} MiB {before / weights:5.2f} x")
    for name, peak in watch.peaks.items():
        print(f"{name:40} {peak / 2**20:7.0f} MiB {peak / weights:5.2f} x")
    facts = {
        "parameters": result.plan.parameters_before,
        "peak_over_fp32_weights": round(max(watch.peaks.values()) / weights, 2),
        "goal": GOAL,
        "seconds": round(time.perf_counter() - started),
        "versions": installed_versions(),
    }
    print(json.dumps({**{name: str(value) for name, value in vars(arguments).items() if name != "folder"}, **facts}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--recover", default="none")
    parser.add_argument("--criterion", default="gate")
    parser.add_argument("--samples", type=int, default=64, help="to calibrate on, and to evaluate with")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.folder is not None:
        run(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder, "model"), getattr(torch, arguments.dtype))
        words = [sys.executable, __file__, *sys.argv[1:], "--folder", folder]
        raise SystemExit(subprocess.run(words, check=False).returncode)


if __name__ == "__main__":
    main()
