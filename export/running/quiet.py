"""Silence around tools that say much which is no news to a user."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters and loaders of graphs warn, log and print: deprecations, missing torchvision, progress.

    Some give everybody's log a handler of theirs when they are imported; it is taken away again.
    """
    level, kept = logging.root.manager.disable, (list(logging.root.handlers), logging.root.level)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        logging.root.handlers[:], logging.root.level = kept[0], kept[1]
