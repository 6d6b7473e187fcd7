"""How fast an exported folder answers on ONNX Runtime, in this process.

    slimvlm export out/model exported --format onnx
    python examples/measure_export.py exported photo.jpg "What is in the image?"

For two models side by side, with intervals over several processes and what bounds each phase, there is
`slimvlm profile`, or `slimvlm.serve.profiling.profile_models`; this is the least that measures.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

from slimvlm.serve.chat import open_chat, open_image


def main() -> None:
    """Ask the same question again and again, and say the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("export", help="folder that `slimvlm export` wrote")
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--backend", default="onnx", help="or a variant, as onnx:int8")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    asked = parser.parse_args()
    chat, image = open_chat(asked.export, backend=asked.backend), open_image(asked.image)
    first, later = [], []
    # The first answer opens the sessions and is not counted.
    for counted in [False] + [True] * asked.rounds:
        answer = chat.ask(image, asked.question, asked.max_new_tokens, lambda piece: None)
        if counted:
            first.append(answer.first_seconds)
            if answer.tokens > 1:
                later.append((answer.seconds - answer.first_seconds) / (answer.tokens - 1))
    print(f"answer: {answer.text} ({answer.tokens} tokens)")
    print(f"first token, image included: {1000 * median(first):.2f} ms (median of {len(first)})")
    if later:
        print(f"a later token: {1000 * median(later):.2f} ms")


if __name__ == "__main__":
    main()
