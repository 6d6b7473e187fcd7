"""Turn a training checkpoint into the packaged model: `python -m slimvlm.demo.export CHECKPOINT [--out FOLDER]`.

Weights go to fp16 and the attention back to the library's default; nothing else changes.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from slimvlm.demo import MODEL
from slimvlm.demo.model import build_processor


def main() -> None:
    """Parse the options and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=MODEL)
    options = parser.parse_args()
    export(options.checkpoint, options.out)


def export(checkpoint: Path, out: Path) -> None:
    """Replace `out` by the fp16 model of `checkpoint` and its processor, loadable by plain `from_pretrained`."""
    shutil.rmtree(out, ignore_errors=True)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float16)
    model.save_pretrained(out)
    build_processor().save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    main()
