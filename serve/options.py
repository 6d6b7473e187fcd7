"""Everything `slimvlm profile` can be told, as data. No torch: the command line reads its defaults from here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.runs import PROFILE
from slimvlm.export.running.sessions import PROVIDERS as KNOWN_PROVIDERS
from slimvlm.export.variants import TORCH_FORMS, VARIANTS

BACKENDS = TORCH, ONNX, TORCHSCRIPT = ("torch", "onnx", "torchscript")
DTYPES = ("auto", "float32", "bfloat16", "float16")
PROVIDERS = ("auto", *KNOWN_PROVIDERS)
COUNTED = 2**31 - 1  # which every library counts to
RANGES = {
    **dict.fromkeys(("batch_sizes", "prompt_tokens", "new_tokens", "starts", "rounds"), (1, COUNTED)),
    "image_sizes": (1, 8192),
    "threads": (1, 1024),
    "warmup": (0, COUNTED),
    "seed": (0, 2**32 - 1),
    "max_memory": (1, 2**63 - 1),
}
AMOUNTS = ("cell_seconds", "max_ttft_ms", "max_tpot_ms")


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """Options of a profile; the names are the command line's.

    Attributes:
        slim: checkpoint folder, run folder, or export folder; followed by `:BACKEND[:VARIANT]`, run on that alone.
        against: the dense model it is compared with, named alike; None: `slim` is measured alone.
        backend: of BACKENDS, with a variant behind a colon (`onnx:int8`, `torch:int4`).
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        provider: execution provider of ONNX Runtime; `auto` is the device's own.
        threads: of one operation on the CPU; None: the physical cores this process may use, or OMP_NUM_THREADS.
        dtype: of the torch model; an export has its own.
        batch_sizes, image_sizes, prompt_tokens, new_tokens: the grid; no image size: the processor's own; no prompt
            length: that of a short question with its image.
        decoder_tests: also pp512 and tg128 of the language model alone.
        starts: of both models' processes per cell, at least; fewer than 3 decide nothing.
        rounds: at most so many of every cell, each with both models, over all starts.
        cell_seconds: after so many no further start of a cell is made, if there were enough for a statement.
        warmup: runs of each model before the first round.
        data: images and questions to use; default: generated noise and a plain question.
        max_ttft_ms, max_tpot_ms, max_memory: limits (bytes) of the slim model; crossing one is a failed check.
        out: the profile, written anew after every cell; default: `profile.json` in the run folder `slim`, else here.
    """

    slim: str
    against: str | None = None
    backend: tuple[str, ...] = (TORCH,)
    device: str = "auto"
    provider: str = "auto"
    threads: int | None = None
    dtype: str = "auto"
    batch_sizes: tuple[int, ...] = (1, 4)
    image_sizes: tuple[tuple[int, int], ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    new_tokens: tuple[int, ...] = (32,)
    decoder_tests: bool = True
    starts: int = 3
    rounds: int = 24
    cell_seconds: float = 12.0
    warmup: int = 2
    data: Path | None = None
    seed: int = 0
    max_ttft_ms: float | None = None
    max_tpot_ms: float | None = None
    max_memory: int | None = None
    out: Path | None = None
    trust_remote_code: bool = False

    @property
    def written(self) -> Path:
        """Where the profile goes."""
        if self.out is not None:
            return self.out
        run = Path(self.slim)
        return run / PROFILE if (run / "run.json").is_file() else Path(PROFILE)

    def checked(self) -> ProfileOptions:
        """Itself.

        Raises:
            UnsuitableOptionError: an unknown value, or one that nothing can be measured with.
        """
        if not self.backend:
            raise UnsuitableOptionError(f"--backend names none; choose from {', '.join(BACKENDS)}")
        for backend in self.backend:
            split_backend(backend)
        for name, accepted in {"dtype": DTYPES, "provider": PROVIDERS}.items():
            if (value := getattr(self, name)) not in accepted:
                raise UnsuitableOptionError(f"--{name} {value} is unknown; choose one of {', '.join(accepted)}")
        for name, (least, most) in RANGES.items():
            for value in _numbers(getattr(self, name)):
                if not least <= value <= most:
                    raise UnsuitableOptionError(f"{_flag(name)} {value}: accepted is {least} to {most}")
        for name in AMOUNTS:
            for value in _numbers(getattr(self, name)):
                if not 0 < value < math.inf:
                    raise UnsuitableOptionError(f"{_flag(name)} {value}: accepted is a finite number above 0")
        if not self.batch_sizes or not self.new_tokens:
            raise UnsuitableOptionError("--batch-sizes and --new-tokens must name at least one number each")
        return self


def _numbers(value: object) -> Iterator[float]:
    """All numbers of an option: none, one, or those of a list, in pairs or not."""
    if isinstance(value, tuple):
        yield from (number for one in value for number in _numbers(one))
    elif isinstance(value, (int, float)):
        yield value


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def split_backend(backend: str) -> tuple[str, str | None]:
    """`onnx:int8` -> (`onnx`, `int8`); no variant: None. Of torch, variants have the names of torchao's forms.

    Raises:
        UnsuitableOptionError: an unknown backend.
    """
    name, _, variant = backend.partition(":")
    if name not in BACKENDS or (variant and variant not in (TORCH_FORMS if name == TORCH else VARIANTS)):
        of_torch = " or ".join(f"{TORCH}:{form}" for form in TORCH_FORMS)
        known = f"{', '.join(BACKENDS)}, a variant of an export as onnx:int8, or {of_torch}"
        raise UnsuitableOptionError(f"--backend {backend} is unknown; choose from {known}")
    return name, variant or None
