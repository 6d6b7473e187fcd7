"""Training of the real-parts model: a start for the projector, then projector and low-rank factors together.

The tower stays as it came. What is learnt is a delta of 21 MB: the projector, and the factors of every linear of the
language model, which `joining.merge` adds to it.
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any  # modules of transformers

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageEnhance
from real_parts.joining import ASKED, END, RANK, READ, SCALE, USER
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerBase

from slimvlm.compress.files.writing import written_file

PREFIX = "base_model.model."
IGNORED = -100
BATCH = 16  # images, each with all its questions
WARM_UP, LEAST = 12, 0.03  # steps; of the rate, at the end of the cosine
SAVED_EVERY = 100
Row = dict[str, str]


def adapt(model: LlavaForConditionalGeneration) -> None:
    """Freeze all but the projector, and give the language model factors that change nothing yet, in place."""
    model.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules="all-linear", lora_dropout=0.0)
    model.model.language_model = get_peft_model(model.model.language_model, config)
    model.model.multi_modal_projector.requires_grad_(True)


def delta_of(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """What an adapted model has learnt, as `joining.merge` takes it."""
    projector = model.model.multi_modal_projector.state_dict()
    factors = {n: w for n, w in model.model.language_model.named_parameters() if w.requires_grad}
    found = {f"projector.{name}": weight for name, weight in projector.items()}
    found |= {f"lora.{name.removeprefix(PREFIX)}": weight for name, weight in factors.items()}
    return {name: weight.detach().bfloat16().contiguous() for name, weight in found.items()}


@torch.no_grad()
def resume(model: LlavaForConditionalGeneration, delta: Mapping[str, Tensor]) -> None:
    """Put an earlier delta into an adapted model, in place."""
    inner = model.model
    own = {f"projector.{name}": weight for name, weight in inner.multi_modal_projector.named_parameters()}
    own |= {f"lora.{name.removeprefix(PREFIX)}": weight for name, weight in inner.language_model.named_parameters()}
    for name, value in delta.items():
        own[name].copy_(value)


def train(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    rows: Sequence[Row],
    folder: Path,
    out: Path,
    minutes: float,
) -> None:
    """Train an adapted model for so long, and write its delta to `out` now and then."""
    rng, asked = random.Random(0), defaultdict(list)
    for row in rows:
        asked[row["image"]].append((row["question"], row["answer"]))
    factors = [w for w in model.model.language_model.parameters() if w.requires_grad]
    projector = list(model.model.multi_modal_projector.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": factors, "most": 8e-4}, {"params": projector, "most": 6e-4}], betas=(0.9, 0.98), weight_decay=0.01
    )
    model.train()
    losses: list[float] = []
    started, spent, chosen = time.monotonic(), 0.0, _epochs(sorted(asked), rng)
    while spent < 1:
        share = min(1, (len(losses) + 1) / WARM_UP) * (LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * spent)))
        for group in optimizer.param_groups:
            group["lr"] = group["most"] * share
        images = next(chosen)
        shown = pixels(images, folder, processor, rng)
        loss = loss_of(model, shown, pack([asked[name] for name in images], processor.tokenizer, model.config))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*factors, *projector], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        spent = (time.monotonic() - started) / (60 * minutes)
        if len(losses) % 10 == 0:
            print(f"step {len(losses)}, {60 * minutes * spent:.0f} s, loss {sum(losses[-10:]) / 10:.3f}", flush=True)
        if len(losses) % SAVED_EVERY == 0 or spent >= 1:
            with written_file(out) as beside:
                save_file(delta_of(model), beside)


def _epochs(images: Sequence[str], rng: random.Random) -> Iterator[list[str]]:
    queue: list[str] = []
    while True:
        while len(queue) < BATCH:
            queue = rng.sample(images, len(images)) + queue
        yield [queue.pop() for _ in range(BATCH)]


def loss_of(model: LlavaForConditionalGeneration, shown: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
    """Cross entropy of the answers' tokens in bf16; `packed` is of `pack`."""
    token, label, place, mask = packed
    inner, counted = model.model, label[:, 1:] != IGNORED
    with torch.autocast(token.device.type, torch.bfloat16):
        features = inner.multi_modal_projector(patches(model, shown))
        embedded = inner.get_input_embeddings()(token)
        holes = (token == model.config.image_token_index)[..., None]
        embedded = embedded.masked_scatter(holes, features.to(embedded.dtype))
        states = inner.language_model(inputs_embeds=embedded, attention_mask=mask, position_ids=place, use_cache=False)
        logits = model.lm_head(states.last_hidden_state[:, :-1][counted])
    return F.cross_entropy(logits.float(), label[:, 1:][counted])


@torch.no_grad()
def patches(model: LlavaForConditionalGeneration, shown: Tensor) -> Tensor:
    """What the projector reads: [images, tokens, width]."""
    tower = model.model.vision_tower
    with torch.autocast(shown.device.type, torch.bfloat16):
        states: Tensor = tower(shown, output_hidden_states=True).hidden_states[READ]
    return states


def pack(
    asked: Sequence[Sequence[tuple[str, str]]], tokenizer: PreTrainedTokenizerBase, config: LlavaConfig
) -> tuple[Tensor, ...]:
    """Questions of one image in one row, where each sees the image and itself only.

    Ids, labels and places are [B, S], what sees what is [B, 1, S, S].
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prefix = [*ids(USER), *[config.image_token_index] * config.image_seq_length]
    rows = []
    for questions in asked:
        row = [(token, IGNORED, place, 0) for place, token in enumerate(prefix)]
        for number, (question, answer) in enumerate(questions, 1):
            prompt, said = ids(question + ASKED), ids(answer + END)
            labels = zip(prompt + said, [IGNORED] * len(prompt) + said, strict=True)
            row += [(token, label, place, number) for place, (token, label) in enumerate(labels, len(prefix))]
        rows.append(row)
    width = max(map(len, rows))
    padded = [row + [(0, IGNORED, 0, -1)] * (width - len(row)) for row in rows]
    token, label, place, part = torch.tensor(padded).unbind(-1)
    own = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
    return token, label, place, (own & torch.ones(width, width, dtype=torch.bool).tril())[:, None]


def align(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, rows: Sequence[Row], folder: Path, seconds: float
) -> None:
    """Start of the projector: what it says of an image shall point where the words of its answers point.

    Without it hundreds of steps pass before the language model looks at images at all.
    """
    images = sorted({row["image"] for row in rows})
    embeddings: Any = model.get_input_embeddings()
    table, projector = embeddings.weight.detach(), model.model.multi_modal_projector
    by_task: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row)
    tasks = [_directions(table, processor.tokenizer, asked, images) for asked in by_task.values()]
    rng, size = random.Random(0), table.norm(dim=-1).mean()
    seen = [_all_patches(model, processor, images, folder, made) for made in (None, rng)]
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.05)
    started, step = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        chosen = torch.randint(len(images), (128,))
        some = torch.randint(1, model.config.image_seq_length, (8,))
        some[0] = 0  # the class token, and seven patches
        with torch.autocast("cpu", torch.bfloat16):
            out = projector(rng.choice(seen)[chosen][:, some]).float()
        mean = F.normalize(out.mean(1), dim=-1)
        losses = [
            F.cross_entropy(20 * mean @ words, wanted[chosen])
            for words, wanted in tasks
            if (wanted[chosen] != IGNORED).any()
        ]
        loss = torch.stack(losses).sum() + (out.norm(dim=-1) / size).log().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 500 == 0:
            print(f"align: step {step}, loss {loss.item():.2f}", flush=True)


def _directions(
    table: Tensor, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], images: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Where the words of every answer of one task point [width, answers], and which answer an image has."""
    answers = sorted({row["answer"] for row in rows})
    ids = tokenizer([f" {answer}" for answer in answers], add_special_tokens=False)["input_ids"]
    words = torch.stack([table[found].mean(0) for found in ids])
    right = {row["image"]: answers.index(row["answer"]) for row in rows}
    wanted = torch.tensor([right.get(image, IGNORED) for image in images])
    return F.normalize(words - words.mean(0), dim=-1).T, wanted


def _all_patches(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: Sequence[str],
    folder: Path,
    rng: random.Random | None,
) -> Tensor:
    parts = [images[first : first + 32] for first in range(0, len(images), 32)]
    return torch.cat([patches(model, pixels(part, folder, processor, rng)).bfloat16() for part in parts])


def pixels(images: Sequence[str], folder: Path, processor: LlavaProcessor, rng: random.Random | None = None) -> Tensor:
    """[images, 3, SIDE, SIDE], changed a little where there is a generator."""
    pictures = [Image.open(folder / name).convert("RGB") for name in images]
    if rng:
        pictures = [jitter(picture, rng) for picture in pictures]
    found: Tensor = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    return found


def jitter(picture: Image.Image, rng: random.Random) -> Image.Image:
    """A little smaller, shifted, tilted, flipped, recoloured: vendors differ in all of these."""
    side, scale = picture.width, rng.uniform(0.75, 1.0)
    tilted = picture.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor="white")
    small = tilted.resize((round(side * scale), round(side * scale)))
    out = Image.new("RGB", (side, side), "white")
    out.paste(small, (rng.randint(0, side - small.width), rng.randint(0, side - small.height)))
    if rng.random() < 0.5:
        out = out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        out = enhance(out).enhance(rng.uniform(0.7, 1.4))
    return out
