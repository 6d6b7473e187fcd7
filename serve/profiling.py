"""`slimvlm profile`: two models over the grid on every backend, judged, gated, and kept on disk cell by cell."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from slimvlm.compress.errors import CheckFailedError, DeviceError, OutputError, UnsuitableOptionError
from slimvlm.compress.files.decoding import read
from slimvlm.compress.files.locks import locked_file
from slimvlm.compress.files.writing import VERSIONED, check_writable, installed_versions, write_text
from slimvlm.compress.models.quantized import check_dtype
from slimvlm.compress.processes import pick_device
from slimvlm.compress.progress import Progress, silent
from slimvlm.export.running import manifest
from slimvlm.export.running.exported import Exported
from slimvlm.export.running.sessions import NO_TENSORRT
from slimvlm.serve.judging.intervals import RATIO_RULE
from slimvlm.serve.judging.limits import check_limits, limit_words
from slimvlm.serve.judging.roofline import Sizes, count_costs, rate_run
from slimvlm.serve.judging.verdict import Judged, judge_cell
from slimvlm.serve.measuring.bench import Source
from slimvlm.serve.measuring.device import available_cores, measure_device
from slimvlm.serve.measuring.measure import TURN_SECONDS, Effort, measure_cell, measure_decoder
from slimvlm.serve.measuring.memory import gpu_name
from slimvlm.serve.measuring.workload import InputMaker, Inputs, grid
from slimvlm.serve.options import TORCH, TORCHSCRIPT, ProfileOptions, split_backend
from slimvlm.serve.profile import MEASURED, Cell, Device, Profile, Verdict
from slimvlm.serve.targets import Target, check_installed, find_target, is_torch, with_graphs

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class _Job:
    """What is decided before anything is measured."""

    options: ProfileOptions
    device: torch.device
    threads: int
    targets: Mapping[str, Target]
    backends: tuple[str, ...]
    skipped: tuple[str, ...]
    inputs: tuple[Inputs, ...]
    engines: Path
    tests: Mapping[str, tuple[Inputs, str, int]]

    @property
    def effort(self) -> Effort:
        """Of every cell."""
        asked = self.options
        return Effort(asked.warmup, asked.starts, asked.rounds, asked.cell_seconds, asked.seed)

    def sources(self, backend: str) -> dict[str, Source]:
        """What the workers of a backend load; a model that was named with one is run on that."""
        named = {model: target.backend or backend for model, target in self.targets.items()}
        return {
            model: Source(
                str(target.folder(name := split_backend(named[model])[0])),
                named[model],
                str(self.device),
                _provider(self.options.provider, self.device),
                self.threads,
                self.options.dtype if name == TORCH else "auto",
                self.options.trust_remote_code,
                gpu_name(self.device),
                str(self.engines / model / name),
            )
            for model, target in self.targets.items()
        }


def profile_models(options: ProfileOptions, progress: Progress = silent) -> Profile:
    """Measures the slim model, next to the dense one if there is one; `options.written` always holds what is done.

    Graphs that a backend needs and that are not there are made, and thrown away with it.

    Raises:
        SlimvlmError: refused, with the reason; cells that were measured stay in `options.written`.
        CheckFailedError: a limit was crossed; `result` is the profile.
    """
    options = options.checked()
    check_installed(options.backend)
    device = pick_device(options.device)
    _provider(options.provider, device)
    refuse_unless_profile(options.written)
    with locked_file(options.written), TemporaryDirectory(prefix="slimvlm-profile-") as scratch:
        job = _prepare(options, device, Path(scratch), progress)
        profile = _measure(job, progress)
    limits = check_limits(options, profile)
    profile = _kept(replace(profile, limits=limits), options)
    if crossed := [limit for limit in limits if limit.crossed]:
        said = "; ".join(limit_words(limit) for limit in crossed)
        raise CheckFailedError(f"{said}; every figure is in {options.written}", profile)
    return profile


def measure_first(options: ProfileOptions) -> Cell:
    """The first cell that `profile_models` would measure, alone: unjudged, and written nowhere.

    Raises:
        SlimvlmError: refused, with the reason.
    """
    options = options.checked()
    check_installed(options.backend)
    with TemporaryDirectory(prefix="slimvlm-profile-") as scratch:
        job = _prepare(options, pick_device(options.device), Path(scratch), silent)
        return measure_cell(job.sources(job.backends[0]), job.inputs[0], job.effort)


def refuse_unless_profile(path: Path) -> None:
    """Refuse to write a profile where none can be, or in the place of anything but a profile.

    Raises:
        OutputError: so it is.
    """
    check_writable(path)
    if path.exists():
        read(path, Profile, OutputError, "only a profile is replaced by one; choose another name with --out")


def _prepare(options: ProfileOptions, device: torch.device, scratch: Path, progress: Progress) -> _Job:
    """Finds or makes everything that is to be run, and refuses what cannot be, before time is spent on measuring."""
    names = {"dense": options.against, "slim": options.slim}
    targets = {model: find_target(name, options.trust_remote_code) for model, name in names.items() if name is not None}
    own = {model: (target.backend,) for model, target in targets.items() if target.backend is not None}
    backends, skipped = _measurable(own.get("slim", options.backend), device)
    for done, model in enumerate(targets):
        asked, _ = _measurable(own.get(model, backends), device)
        check_installed(asked)
        for name in asked:
            check_dtype(split_backend(name)[1] if is_torch(name) else None, options.dtype)
        progress("export", done, len(targets), model)
        targets[model] = with_graphs(targets[model], asked, scratch / model)
    progress("export", len(targets), len(targets))
    if len({target.family for target in targets.values()}) > 1:
        found = " and ".join(f"{target.given} is {target.family}" for target in targets.values())
        raise UnsuitableOptionError(f"{found}: two models of one family can be compared")
    for target in targets.values():
        for backend in backends if target.backend is None else (target.backend,):
            target.folder(split_backend(backend)[0])
    slim = targets["slim"]
    fixed = next((Exported.open(target.export).image_size for target in targets.values() if target.export), None)
    maker = InputMaker(slim.collator(options.trust_remote_code), options, fixed)
    tests: dict[str, tuple[Inputs, str, int]] = {}
    if options.decoder_tests and maker.kind != "dual-encoder":
        read, write = maker.read_test(), maker.write_test()
        tests[f"pp{read.prompt_tokens}"] = read, "prefill", read.prompt_tokens
        tests[f"tg{write.new_tokens - 1}"] = write, "tpot", write.new_tokens - 1
    threads = options.threads or min(available_cores(), torch.get_num_threads())  # which OMP_NUM_THREADS may lower
    inputs = tuple(maker.make(workload) for workload in grid(options))
    if options.provider == "tensorrt" and maker.kind != "dual-encoder":
        skipped = (*skipped, NO_TENSORRT)
    return _Job(options, device, threads, targets, backends, skipped, inputs, scratch / "engines", tests)


def _measurable(backends: Sequence[str], device: torch.device) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The backends that run on the device, and why the others do not.

    Raises:
        DeviceError: none does.
    """
    tied = [name for name in backends if device.type != "cpu" and split_backend(name)[0] == TORCHSCRIPT]
    skipped = tuple(f"{name}: its graphs were traced on the CPU and run there only" for name in tied)
    kept = tuple(name for name in backends if name not in tied)
    if not kept:
        raise DeviceError(f"{skipped[0]}; use --device cpu, or add torch or onnx to --backend")
    return kept, skipped


def _measure(job: _Job, progress: Progress) -> Profile:
    """All cells, then the decoder tests; the profile is written after each."""
    options = job.options
    total = 1 + len(job.backends) * (len(job.inputs) + bool(job.tests))
    progress("profile", 0, total, "the device")
    dtypes = {"fp32", "bf16", SHORT.get(options.dtype, "fp32")} | ({"fp16"} if job.device.type == "cuda" else set())
    device = measure_device(job.device, job.threads, sorted(dtypes))
    profile = _kept(_started(job, device), options)
    effort, done = job.effort, 1
    for backend in job.backends:
        sources = job.sources(backend)
        for inputs in job.inputs:
            progress("profile", done, total, f"{backend}, batch {inputs.rows}")
            cell, verdicts = _judged(measure_cell(sources, inputs, effort), inputs, job, device)
            profile = replace(profile, cells=(*profile.cells, cell), verdicts=(*profile.verdicts, *verdicts))
            profile, done = _kept(profile, options), done + 1
        if job.tests:
            progress("profile", done, total, f"{backend}, {', '.join(job.tests)}")
            tests = (*profile.decoder_tests, *measure_decoder(sources, job.tests, effort))
            profile, done = _kept(replace(profile, decoder_tests=tests), options), done + 1
    progress("profile", total, total)
    return profile


def _kept(profile: Profile, options: ProfileOptions) -> Profile:
    """Itself, once it is on disk."""
    write_text(options.written, profile.to_json())
    return profile


def _started(job: _Job, device: Device) -> Profile:
    """A profile of no cells."""
    options = job.options
    dtype = SHORT.get(options.dtype, "fp32")
    return Profile(
        command=(Path(sys.argv[0]).name, *sys.argv[1:]),
        versions=installed_versions((*VERSIONED, *manifest.VERSIONED, "torchao")),
        seed=options.seed,
        device=device,
        settings={
            "backends": list(job.backends),
            "provider": _provider(options.provider, job.device),
            "threads": job.threads,
            "dtype": options.dtype,
            "tf32": False,
            "warmup": options.warmup,
            "starts": options.starts,
            "rounds": options.rounds,
            "cell_seconds": options.cell_seconds,
            "turn_seconds": TURN_SECONDS,
            "data": None if options.data is None else str(options.data),
            "rule": RATIO_RULE,
        },
        models={model: target.subject(dtype) for model, target in job.targets.items()},
        skipped=job.skipped,
    )


def _judged(cell: Cell, inputs: Inputs, job: _Job, device: Device) -> tuple[Cell, tuple[Verdict, ...]]:
    """The cell with its work per phase, and what it means; as it was where the shapes of a model are not known."""
    if cell.status != MEASURED:
        return cell, ()
    every = inputs.prompt_tokens if split_backend(cell.backend)[0] != TORCH else 1  # an exported graph gives all logits
    sizes = Sizes(inputs.rows, inputs.pixels, inputs.prompt_tokens, inputs.new_tokens, every)
    judged = {
        model: Judged(count_costs(target.shapes, sizes, cell.dtype), target.shapes)
        for model, target in job.targets.items()
        if target.shapes is not None and target.backend in (None, cell.backend)  # two runtimes differ in more than work
    }
    rated = {
        model: rate_run(run, judged[model].costs, device, cell.dtype) if model in judged else run
        for model, run in cell.runs.items()
    }
    cell = replace(cell, runs=rated)
    return cell, judge_cell(cell, judged, device)


def _provider(asked: str, device: torch.device) -> str:
    """The device of ONNX Runtime, as `providers_of` takes it.

    Raises:
        DeviceError: a provider of another device than the one that is measured.
    """
    kind = device.type if asked == "auto" else asked
    if (kind == "cpu") != (device.type == "cpu"):
        raise DeviceError(f"--provider {asked} does not run on the device {device}; choose both alike, or leave it out")
    return kind if kind == "cpu" else f"{kind}:{device.index or 0}"
