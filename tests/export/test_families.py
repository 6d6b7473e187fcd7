"""Every family, cut to other widths in every layer, exported to ONNX and run without torch or its code."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from exports import cut_model, quality_of, size_of, tiny_samples
from huggingface_hub import ModelCard
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.evaluation.evaluate import evaluate
from slimvlm.compress.models.families import FAMILIES, Export
from slimvlm.export.checks.answers import retell, torch_answers
from slimvlm.export.graphs.decoder import Decoder, Embed
from slimvlm.export.running import parts
from slimvlm.export.running.generation import empty_cache
from slimvlm.export.running.runners import SessionRunner, runner_of

DUAL = ("clip", "siglip")
GENERATIVE = [name for name in FACTORIES if name not in DUAL]


def input_of(model, name):
    return next(value for value in model.graph.input if value.name == name)


def dims(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("name", GENERATIVE)
def test_generation_through_the_runtime_gives_torchs_logits_at_every_token(exported, name):
    [check] = exported(name).manifest.checks
    assert check["samples"] == 5  # in batches of four, left-padded, and one
    assert check["max_relative"] < 1e-5  # of every logit on torch's way, so no tie decides
    assert check["cosine"] > 1 - 1e-9
    assert check["long_prompt"] > (100 if name == "blip2_opt" else 200)


@pytest.mark.parametrize("name", ("mistral3", "idefics2"))
def test_a_graph_of_one_image_gives_torchs_logits_for_a_batch_of_two(exported, name):
    result, (model, collator) = exported(name), cut_model(name)
    assert all(isinstance(size, int) for port in result.manifest.artifacts[0].inputs for size in port.shape)
    prompts = collator.prompts(tiny_samples(2))
    feeds = {name: tensor.numpy() for name, tensor in prompts.items()}
    prompting = result.manifest.generation
    answers = torch_answers(model, collator, feeds, prompting, 6)
    retold = retell(runner_of(result.out, result.manifest.artifacts), prompting, answers, "two images")
    assert retold.difference.max_relative < 1e-5
    assert retold.difference.cosine > 1 - 1e-9


def test_tokens_that_stand_for_no_text_are_embedded_as_padding():
    table = torch.nn.Embedding(8, 4)
    found = Embed(table, 4, silent=(5, 6), pad=1)(torch.tensor([[5, 2, 6, 1]]))
    assert torch.equal(found, table(torch.tensor([[1, 2, 1, 1]])))


@torch.inference_mode()
def test_logits_are_multiplied_and_capped_as_the_config_says():
    text, head = tiny_model("aya_vision").model.model.language_model, torch.nn.Linear(32, 32)
    text.config.logit_scale, text.config.final_logit_softcapping = 0.3, 2.0
    given = torch.randn(2, 3, 32), torch.ones(2, 3, dtype=torch.long), torch.arange(3).expand(2, -1)
    plain, scaled = (
        Decoder(text, head, row)(*given)[0] for row in (Export(), Export(scaled="logit_scale", capped=True))
    )
    assert torch.allclose(scaled, 2 * torch.tanh(0.3 * plain / 2), atol=1e-6)


@pytest.mark.parametrize("name", FACTORIES)
def test_every_graph_equals_torch_at_two_sizes_of_every_axis(exported, name):
    for artifact in exported(name).manifest.artifacts:
        sizes = {}
        for difference in artifact.parity:
            assert difference["max_relative"] < 1e-5
            assert difference["cosine"] > 1 - 1e-9
            for port in artifact.inputs:
                for axis, label in enumerate(port.shape):
                    if isinstance(label, str) and port.name in difference["shapes"]:
                        sizes.setdefault(label, set()).add(difference["shapes"][port.name][axis])
        assert all(len(seen) >= 2 for seen in sizes.values()), sizes
        if artifact.graph == "decoder_model_merged" and "past_sequence_length" in sizes:
            assert 0 in sizes["past_sequence_length"]


@pytest.mark.parametrize("name", FACTORIES)
def test_every_export_has_a_card_that_the_hub_reads(exported, name):
    card = ModelCard.load(exported(name).out / "README.md")
    task = "zero-shot-image-classification" if name in DUAL else "image-text-to-text"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers.js", task)
    assert card.data.tags == ["slimvlm", "onnx"]
    assert all(f"| {artifact.file} |" in card.text for artifact in exported(name).manifest.artifacts)


@pytest.mark.parametrize("name", FACTORIES)
def test_graphs_are_valid_onnx_with_the_stated_ports(exported, name):
    result = exported(name)
    for artifact in result.manifest.artifacts:
        path = result.out / artifact.file
        onnx.checker.check_model(path, full_check=True)
        model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
        assert [value.name for value in model.graph.input] == [port.name for port in artifact.inputs]
        for port in artifact.inputs:
            assert dims(input_of(model, port.name)) == list(port.shape)


@pytest.mark.parametrize("name", GENERATIVE)
def test_the_decoder_states_a_cache_that_differs_from_layer_to_layer(exported, name):
    result = exported(name)
    prompting = result.manifest.generation
    runner = runner_of(result.out, result.manifest.artifacts)
    own = [
        array.shape
        for port, array in empty_cache(runner, 3, {}).items()
        if port.endswith("key") and ".encoder." not in port
    ]
    assert len(own) == 2
    assert all(shape[0] == 3 and shape[2] == 0 for shape in own)
    assert prompting.end


@pytest.mark.parametrize("name", ("llava", "llava_onevision", "qwen2_vl", "qwen3_vl", "smolvlm", "paligemma"))
def test_the_folder_has_the_names_that_transformers_js_asks_for(exported, name):
    out = exported(name).out
    for graph in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
        assert (out / "onnx" / f"{graph}.onnx").is_file()
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / file).is_file()
    images = json.loads((out / "preprocessor_config.json").read_text())
    assert images["processor_class"].endswith("Processor")
    assert not images["image_processor_type"].endswith(("Pil", "Fast"))
    assert "auto_map" not in json.loads((out / "config.json").read_text())


def test_a_dual_encoder_gives_the_embeddings_of_torch(exported):
    for name, outputs in (("clip", ["image_embeds", "text_embeds"]), ("siglip", ["pooler_output"] * 2)):
        artifacts = exported(name).manifest.artifacts
        assert [artifact.graph for artifact in artifacts] == ["vision_model", "text_model"]
        assert [artifact.outputs[0].name for artifact in artifacts] == outputs


@pytest.mark.parametrize("name", ("smolvlm", "blip2_t5", "clip"))
def test_a_graph_run_a_part_at_a_time_gives_what_it_gives_as_a_whole(exported, name, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 4000)
    out, artifacts, random = exported(name).out, exported(name).manifest.artifacts, np.random.default_rng(0)
    files = {artifact.graph: out / artifact.file for artifact in artifacts}
    opened, inner = [], parts.open_session
    monkeypatch.setattr(parts, "open_session", lambda *asked: opened.append(asked) or inner(*asked))
    whole, parted = SessionRunner(files), parts.PartedRunner(files)
    sizes = {"batch_size": 2, "past_sequence_length": 4, "total_sequence_length": 7}
    for graph in files:
        assert parted.inputs(graph) == whole.inputs(graph)
        feeds = {}
        for port in whole.inputs(graph):
            shape = [size if isinstance(size, int) else sizes.get(size, 3) for size in port.shape]
            feeds[port.name] = (random.random(shape) + 0.5).astype(port.dtype)
        opened.clear()
        found, wanted = parted.together([partial(parted.run, graph, feeds)] * 2), whole.run(graph, feeds)
        assert len(opened) == len(parts.parts_of(onnx.load(files[graph]).graph))  # once for both
        for one in found:
            assert one.keys() == wanted.keys()
            assert all(np.allclose(one[name], wanted[name], rtol=1e-4, atol=1e-5) for name in one)
    assert len(parts.parts_of(onnx.load(files[graph]).graph)) > 3


def test_windows_of_qwen_vision_keep_apart_in_the_graph(exported):
    """The 32-pixel image of the test has four windows of one layer; the other layer attends to all of it."""
    artifact = exported("qwen2_5_vl").manifest.artifacts[0]
    assert artifact.inputs[0].shape == ("num_patches", 96)
    assert artifact.parity[1]["shapes"]["pixel_values"][0] == 2 * 64
    assert artifact.parity[1]["max_relative"] < 1e-5


def test_features_of_later_layers_travel_in_the_embedding(exported):
    """Qwen3-VL adds vision features after its first decoder layers; the embedding is as wide as all of them."""
    embed = next(artifact for artifact in exported("qwen3_vl").manifest.artifacts if artifact.graph == "embed_tokens")
    assert embed.outputs[0].shape == ("batch_size", "sequence_length", 64)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.export.genai])
def test_an_image_token_that_the_model_gives_itself_has_its_own_embedding(exported, name):
    """onnxruntime-genai puts every new token through the graph that merges features into a prompt, then without any."""
    result = exported(name)
    runner = SessionRunner({graph: result.out / "onnx" / f"{graph}.onnx" for graph in ("embedding", "embed_tokens")})
    token = result.manifest.generation.image_token
    ids = np.array([[3, token, token, 4]])
    own = runner.run("embed_tokens", {"input_ids": ids})["inputs_embeds"]
    features = np.ones((1, own.shape[-1]), np.float32)
    found = runner.run("embedding", {"input_ids": ids, "image_features": features})["inputs_embeds"]
    assert np.array_equal(found[0, 1], features[0])
    assert np.array_equal(np.delete(found, 1, axis=1), np.delete(own, 1, axis=1))
    found = runner.run("embedding", {"input_ids": ids, "image_features": features[:0]})["inputs_embeds"]
    assert np.array_equal(found, own)


@pytest.mark.parametrize("name", GENERATIVE)
def test_an_embedding_that_several_graphs_read_is_stored_once(exported, name):
    """Of a head that is tied to it, and of the graph in which onnxruntime-genai merges."""
    out, (model, collator) = exported(name).out / "onnx", cut_model(name)
    table = model.get_input_embeddings().weight
    tied = np.array_equal(model.get_output_embeddings().weight.detach(), table.detach())
    readers = ["decoder_model_merged.onnx"] * tied + ["embedding.onnx"] * (collator.family.export.genai is not None)
    assert [path.name for path in out.glob("*_data")] == ["embed_tokens.onnx_data"] * bool(readers)
    for file in readers:
        weights = onnx.load(out / file, load_external_data=False).graph.initializer
        same = [weight for weight in weights if sorted(weight.dims) == sorted(table.shape)]
        apart = [weight for weight in same if weight.data_location == onnx.TensorProto.EXTERNAL]
        assert [{entry.key: entry.value for entry in weight.external_data} for weight in apart] == [
            {"location": "embed_tokens.onnx_data", "offset": "0", "length": str(table.nbytes)}
        ]
        assert len(same) == 1


def test_some_families_tie_their_head():
    tied = {name for name in GENERATIVE if getattr(cut_model(name)[0].config, "tie_word_embeddings", False)}
    assert len(tied) >= 2


def test_an_empty_cache_takes_the_batch_and_no_positions(exported):
    result = exported("llava")
    cache = empty_cache(runner_of(result.out, result.manifest.artifacts), 2, {})
    assert {array.dtype for array in cache.values()} == {np.dtype("float32")}


def asking(sample, answer):
    """The sample with another right answer."""
    return replace(sample, turns=(replace(sample.turns[-1], answers=(answer,)),))


@pytest.mark.parametrize("name", FACTORIES)
def test_an_export_is_scored_as_its_checkpoint_on_the_same_samples(exported, name):
    """Answers of several lengths, one of them what the model says."""
    model, collator = cut_model(name)
    samples = [asking(*pair) for pair in zip(tiny_samples(3, size_of(name)), ("red cat", "dog", "a"), strict=True)]
    if name not in DUAL:
        samples.append(asking(samples[0], evaluate(model, collator, samples[:1]).rows[0].prediction or "cat"))
    wanted, found = evaluate(model, collator, samples), quality_of(exported(name).out, name, None, samples)
    assert (found.kind, found.scores) == (wanted.kind, pytest.approx(wanted.scores, rel=1e-4))
    for row, other in zip(found.rows, wanted.rows, strict=True):
        assert replace(row, loss=None) == replace(other, loss=None)
        assert row.loss == (None if name in DUAL else pytest.approx(other.loss, rel=1e-4))
