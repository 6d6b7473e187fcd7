"""What every variant of an export or of the model in torch costs the demo, and what other quantizers would have cost.

    python benchmarks/variants.py [--split val] [--samples 1680] [--model DIR] [--part graphs,torch,rivals]

Own variants are written and judged by the product's export check: right answers, KL from torch's next token, torch's
tokens that are their own choice. The rivals quantize the matrices of the same fp32 graphs in the same blocks of 32 and
are judged alike: ONNX Runtime's other methods, and NNCF where it is installed (`pip install nncf`). In torch, KL and
tokens are those of the right answers. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import matmul_nbits_quantizer as rivals
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from slimvlm.compress.data.collate import IGNORED, collator_of
from slimvlm.compress.data.questions import ask
from slimvlm.compress.data.samples import batches
from slimvlm.compress.errors import CheckFailedError
from slimvlm.compress.evaluation.evaluate import evaluate
from slimvlm.compress.models.checkpoint import load_model, weight_files
from slimvlm.compress.models.computing import load_to_compute
from slimvlm.compress.models.saving import quantize_checkpoint
from slimvlm.compress.options import IN_TORCH, ComputeOptions
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.export import ExportOptions, export_checkpoint
from slimvlm.export.checks.reference import check_tokens, export_samples, first_batch, make_reference
from slimvlm.export.graphs.build import build_graphs
from slimvlm.export.job import ExportResult
from slimvlm.export.running.names import EMBED
from slimvlm.export.running.quiet import quiet
from slimvlm.export.running.runners import SessionRunner
from slimvlm.export.variants import VARIANTS
from slimvlm.export.writers.onnx_writer import write_onnx

BLOCK, ROWS = 32, 50
Rewrite = Callable[[onnx.ModelProto], onnx.ModelProto]


def own(model: str, options: ExportOptions) -> Iterator[dict[str, object]]:
    """Every variant, as the export judges it; bytes of its graphs."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            manifest = export_checkpoint(model, Path(scratch) / "export", options).manifest
        except CheckFailedError as failed:
            assert isinstance(failed.result, ExportResult)
            manifest = failed.result.manifest
        for check in manifest.checks:
            files = {artifact.file for artifact in manifest.artifacts if artifact.variant == check["variant"]}
            size = sum(entry["bytes"] for name, entry in manifest.files.items() if name.removesuffix("_data") in files)
            kept = ("accuracy", "divergence", "token_share", "samples")
            yield {"variant": check["variant"], "bytes": size, **{name: check[name] for name in kept}}


def others() -> Iterator[tuple[str, Rewrite]]:
    """Ways to write matrices in four and two bits."""

    def by_runtime(config: rivals.WeightOnlyQuantConfig, bits: int) -> Rewrite:
        def rewrite(model: onnx.ModelProto) -> onnx.ModelProto:
            quantizer = rivals.MatMulNBitsQuantizer(model, bits=bits, block_size=BLOCK, algo_config=config)
            quantizer.process()
            return quantizer.model.model

        return rewrite

    for bits in (4, 2):
        for kind, symmetric in (("symmetric", True), ("with points of zero", False)):
            config = rivals.DefaultWeightOnlyQuantConfig(BLOCK, is_symmetric=symmetric, bits=bits)
            yield f"round to nearest, {bits} bits, {kind}", by_runtime(config, bits)
        yield f"HQQ, {bits} bits", by_runtime(rivals.HQQWeightOnlyQuantConfig(BLOCK, bits=bits), bits)
    yield "k-quant, 4 bits", by_runtime(rivals.KQuantWeightOnlyQuantConfig(), 4)
    try:
        import nncf
    except ImportError:
        return
    for mode in (nncf.CompressWeightsMode.INT4_SYM, nncf.CompressWeightsMode.INT4_ASYM):

        def compressed(model: onnx.ModelProto, mode: object = mode) -> onnx.ModelProto:
            alone = nncf.IgnoredScope(types=["Conv"], validate=False)
            settings = {"group_size": BLOCK, "ratio": 1.0, "all_layers": True, "ignored_scope": alone}
            return nncf.compress_weights(model, mode=mode, **settings)

        yield f"NNCF, {mode.value}", compressed


def judged_rivals(name: str, options: ExportOptions) -> Iterator[dict[str, object]]:
    """Each rival's decoder and vision graph beside the embeddings in fp32; what one cannot write or run, it says."""
    loaded = load_model(name, dtype=torch.float32, attention="sdpa")
    collator = collator_of(loaded)
    samples = export_samples(collator, loaded.model, options)
    graphs = build_graphs(loaded.model, collator.family, first_batch(collator, samples))
    reference = make_reference(loaded.model, collator, graphs, samples, options.max_new_tokens)
    with tempfile.TemporaryDirectory() as scratch:
        full = {graph.name: Path(scratch) / f"{graph.name}.onnx" for graph in graphs}
        for graph in graphs:
            write_onnx(graph, full[graph.name], options)
        for what, rewrite in others():
            files = dict(full)
            try:
                for part in sorted(set(full) - {EMBED}):
                    files[part] = Path(scratch) / f"{part}_other.onnx"
                    with quiet():
                        onnx.save(rewrite(onnx.load(full[part])), files[part])
                check = check_tokens(SessionRunner(files, threads=1), reference)
            except Exception as error:  # of any library
                yield {"rival": what, "fails": str(error).splitlines()[0][:160]}
                continue
            size = sum(path.stat().st_size for part, path in files.items() if part != EMBED)
            found = {"accuracy": check.accuracy, "divergence": check.divergence, "token_share": check.token_share}
            yield {"rival": what, "bytes without embeddings": size, **found}


def of_torch(name: str, options: ExportOptions) -> Iterator[dict[str, object]]:
    """The model itself in every form of torchao, as it computes on this device; bytes of its checkpoint."""
    compute = ComputeOptions(device="cpu")
    full = load_to_compute(compute, name)
    collator = collator_of(full)
    samples = export_samples(collator, full.model, options)

    def said(model: PreTrainedModel) -> tuple[torch.Tensor, float]:
        """Log-probabilities at the tokens of the right answers, and how many questions are answered right."""
        found = []
        with torch.inference_mode():
            for batch in batches(samples, ROWS):
                question = ask(model, collator.family, collator.training(batch, last_turn=True))
                assert question is not None and question.labels is not None
                logits = question.chosen(model(**question.inputs).logits)
                found.append(logits[question.labels != IGNORED].float().log_softmax(-1))
        return torch.cat(found), evaluate(model, collator, samples).score

    wanted, right = said(full.model)
    stored = {"variant": "torch", "bytes": sum(path.stat().st_size for path in weight_files(full.folder))}
    yield {**stored, "accuracy": right, "samples": len(samples)}
    for form in IN_TORCH:
        with tempfile.TemporaryDirectory() as scratch:
            made = quantize_checkpoint(name, Path(scratch) / form, form)
            log, right = said(load_to_compute(compute, str(made.out), form=form).model)
        divergence = kl_div(log, wanted, log_target=True, reduction="none").sum(-1).mean().item()
        share = (log.argmax(-1) == wanted.argmax(-1)).float().mean().item()
        found = {"accuracy": right, "divergence": divergence, "token_share": share, "samples": len(samples)}
        yield {"variant": f"torch:{form}", "bytes": made.bytes, "linears": made.linears, **found}


PARTS = {"graphs": own, "torch": of_torch, "rivals": judged_rivals}


def main() -> None:
    """Parse, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--split", default="val")
    parser.add_argument("--samples", type=int, default=1680)
    parser.add_argument("--part", default=",".join(PARTS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    data = SAMPLES / f"{given.split}.jsonl"
    options = ExportOptions(variants=tuple(VARIANTS), data=data, samples=given.samples, max_new_tokens=12)
    for part in given.part.split(","):
        for line in PARTS[part](given.model, options):
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
