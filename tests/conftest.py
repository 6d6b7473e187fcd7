"""Every test runs offline, and on one thread unless OMP_NUM_THREADS says otherwise: two workers share two cores."""

import gc
import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as the command line does, before transformers is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

# Examples follow from the test's code alone, and a busy machine must not fail a test for being slow.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_sessionstart() -> None:
    """What imports make stays: none of it is looked for meanwhile."""
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole jobs first: with a file per worker, none is left with a long one at the end."""
    items.sort(key=lambda item: len(item.path.parts))


def pytest_collection_finish() -> None:
    """What is there before the first test is not looked through each time a stage frees memory."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Nor what a file leaves, which is caches: those of the exporters would take half a second each time."""
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without its report, of which matplotlib draws half a second: test_pipeline and serve/report look at it."""
    monkeypatch.setattr("slimvlm.serve.report.write_report", lambda run: run)
