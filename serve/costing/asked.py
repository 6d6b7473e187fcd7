"""What is asked of a compression whose cost is wanted. No torch: the command line reads its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of a compression; the defaults are those of `slimvlm compress`.

    Attributes:
        samples: to calibrate on, in each of `rounds`; as many are evaluated.
        refit: what is left is fitted to the dense outputs, between rounds and at the end.
        text_tokens: of a sample besides its image; the last `answer_tokens` of them get logits.
        variant: of the exported graphs.
        cached: the checkpoint is in the system's cache, as after it was written.
    """

    samples: int = 512
    rounds: int = 4
    ratio: float = 0.5
    refit: bool = True
    text_tokens: int = 64
    answer_tokens: int = 8
    variant: str = "q4"
    cached: bool = False

    @property
    def left(self) -> float:
        """Share of the parameters that stay."""
        return 1 - self.ratio
