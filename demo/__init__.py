"""The packaged demo: a small really trained LLaVA model and its sample scenes.

`MODEL` is a checkpoint folder for plain `from_pretrained`; `SAMPLES` holds `train.jsonl`, `val.jsonl`, `test.jsonl`,
`vendor.jsonl`, `photos.jsonl` and their `images/`. How they were made: `README.md`; whose pictures: `LICENSES.md`.
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
SAMPLES = Path(__file__).parent / "samples"
