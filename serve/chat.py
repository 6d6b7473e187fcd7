"""Questions about an image, answered token by token from a checkpoint or an export that stays loaded.

Every question is asked on its own, as the models were compressed and evaluated: there is no memory of earlier ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers.decoders import DecodeStream
from transformers.generation.streamers import BaseStreamer

from slimvlm.compress.data.collate import Batch, Collator, collator_of
from slimvlm.compress.data.images import BadImageError, as_png, check_image, read_content
from slimvlm.compress.data.questions import placed
from slimvlm.compress.data.records import Turn
from slimvlm.compress.data.samples import Sample, resized
from slimvlm.compress.errors import CheckpointError, SampleError, UnsupportedModelError
from slimvlm.compress.evaluation.evaluate import greedy
from slimvlm.compress.evaluation.soundness import check_answers
from slimvlm.compress.models.checkpoint import Loaded, load_model
from slimvlm.compress.models.experts import put_together
from slimvlm.compress.processes import pick_device
from slimvlm.export.running.exported import Exported
from slimvlm.export.running.generation import steps
from slimvlm.export.running.names import DECODER, EMBED, ENCODER, VISION
from slimvlm.serve.options import split_backend
from slimvlm.serve.targets import is_torch, what_runs

ANSWERING = {VISION, EMBED, ENCODER, DECODER}  # graphs of an answer
Theirs = Any  # a model or a tokenizer of transformers: its families have no common type
CHANGE = "/image "  # a line that begins so changes the image
Tell = Callable[[str], None]
# Tells every new token of the answer to a batch of one prompt; the last argument is the most of them.
Generator = Callable[[Batch, Callable[[int], None], int], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; seconds to its first token, image included, and to its last."""

    text: str
    tokens: int
    first_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Chat:
    """A loaded model.

    Attributes:
        name: as it was asked for.
        image_size: height and width all images are brought to first, if any.
    """

    name: str
    collator: Collator
    generator: Generator
    image_size: tuple[int, int] | None = None

    def ask(self, image: Sample, question: str, max_new_tokens: int, tell: Tell) -> Answer:
        """The most probable answer; `tell` gets each piece of its text as soon as it is whole characters.

        Raises:
            SampleError: the question is longer than the model can take, or holds its image token.
        """
        started, times, text = time.perf_counter(), [], Text(self.collator.tokenizer)
        sample = image if self.image_size is None else resized(image, self.image_size)
        sample = Sample(sample.image, (Turn(question, ("",)),), sample.identity, content=sample.content)

        def hear(token: int) -> None:
            times.append(time.perf_counter() - started)
            if piece := text.add(token):
                tell(piece)

        self.generator(self.collator.prompts([sample]), hear, max_new_tokens)
        return Answer(text.said.rstrip(), len(times), times[0], times[-1])


class Text:
    """Tokens of an answer -> its text, piece by piece, without special tokens; half a character waits for the rest."""

    def __init__(self, tokenizer: Theirs) -> None:
        self.tokenizer, self.stream, self.said = tokenizer.backend_tokenizer, DecodeStream(skip_special_tokens=True), ""

    def add(self, token: int) -> str:
        """What can be said now that was not said before; an answer does not begin with blanks."""
        piece = self.stream.step(self.tokenizer, token) or ""
        piece = piece if self.said else piece.lstrip()
        self.said += piece
        return piece


class _Listener(BaseStreamer):
    """Hears the tokens of `generate`; what it is given first is the prompt."""

    def __init__(self, hear: Callable[[int], None]) -> None:
        self.hear, self.prompted = hear, False

    def put(self, value: torch.Tensor) -> None:
        """The prompt [1, S], then new tokens [1]."""
        for token in value.tolist() if self.prompted else ():
            self.hear(token)
        self.prompted = True

    def end(self) -> None:
        """Nothing is kept back here."""


def open_chat(name: str, *, backend: str | None = None, device: str = "auto", trust_remote_code: bool = False) -> Chat:
    """Loads a checkpoint (both layouts, or a hub name) or an exported folder.

    Args:
        name: `FOLDER[:BACKEND[:VARIANT]]`, see targets.py; of an export by default the first of its graphs.
        backend: instead of the words behind the folder's name.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; `auto` runs the graphs of an export on the CPU.

    Raises:
        CheckpointError: the folder is neither, or not whole.
        UnsupportedModelError: a dual encoder, which generates nothing; or a model of no known family.
        UnsuitableOptionError: the model does not have this backend.
        DeviceError: the device is not there.
    """
    where, runs_on = what_runs(name, backend, trust_remote_code)
    folder = Path(where).expanduser()
    if not is_torch(runs_on):
        return _open_export(name, Exported.open(folder), runs_on, "cpu" if device == "auto" else device)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{name} is neither a checkpoint (config.json) nor an export (manifest.json); give a folder that "
            "slimvlm compress or slimvlm export wrote"
        )
    form = split_backend(runs_on)[1]
    loaded = load_model(where, device=pick_device(device), trust_remote_code=trust_remote_code, form=form)
    put_together(loaded.model)
    if loaded.family.contrastive:
        raise _answers_nothing(name)
    collator = collator_of(loaded)
    check_answers(loaded.model, collator, _probe(), name)
    return Chat(name, collator, _of_torch(loaded, collator))


def _probe() -> Sample:
    """A grey image and a word."""
    content = as_png(Image.new("RGB", (64, 64), (128, 128, 128)))
    return Sample(Path("grey.png"), (Turn("What?", ("",)),), "a grey image", content=content)


def open_image(path: Path) -> Sample:
    """The image as a sample that has no question yet.

    Raises:
        SampleError: there is no such file, or it is no image.
    """
    if not path.is_file():
        raise SampleError(f"{path} is not a file; give an image (PNG, JPEG, WebP, ...)")
    try:
        content = read_content(path)
        digest = check_image(content)
    except BadImageError as error:
        raise SampleError(f"{path} {error}") from error
    return Sample(path, (Turn("", ("",)),), f"{path.name} ({digest[:8]})", content=content)


def answer(chats: Sequence[Chat], image: Sample, question: str, most: int, tell: Tell, note: Tell) -> None:
    """Tells the answer of every model as it comes, a line each, with its name if there are several.

    Args:
        most: new tokens of an answer.
        tell: gets the pieces of the lines.
        note: gets a line about the speed after each answer.

    Raises:
        SampleError: as `Chat.ask`.
    """
    for chat in chats:
        labelled = len(chats) > 1
        if labelled:
            tell(f"{chat.name}: ")
        try:
            done = chat.ask(image, question, most, tell)
        except SampleError:
            tell("\n" if labelled else "")
            raise
        tell("\n")
        later = done.seconds - done.first_seconds
        rate = f", then {(done.tokens - 1) / later:.1f} tokens/s" if later > 0 else ""
        note(f"{done.tokens} tokens, the first after {done.first_seconds:.2f} s{rate}")


def converse(chats: Sequence[Chat], image: Sample, lines: Iterable[str], most: int, tell: Tell, note: Tell) -> None:
    """Answers line after line until one is empty; `/image PATH` changes the image.

    What cannot be answered is said by `note`, and the conversation goes on. Arguments as of `answer`.
    """
    for line in lines:
        question = line.strip()
        if not question:
            return
        try:
            if question.startswith(CHANGE):
                image = open_image(Path(question.removeprefix(CHANGE).strip()).expanduser())
            else:
                answer(chats, image, question, most, tell, note)
        except SampleError as error:
            note(str(error))


def _open_export(name: str, exported: Exported, backend: str | None, device: str) -> Chat:
    prompting = exported.manifest.generation
    if prompting is None:
        raise _answers_nothing(name)
    runner = exported.runner(backend, device)
    present = {artifact.graph for artifact in exported.manifest.artifacts}
    for graph in ANSWERING & present:
        runner.inputs(graph)  # opens it now, and not while the first question waits

    def tell_tokens(batch: Batch, hear: Callable[[int], None], most: int) -> None:
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        for tokens, _ in steps(runner, prompting, arrays, most):
            hear(int(tokens[0]))

    return Chat(name, exported.collator(), tell_tokens, exported.image_size)


def _of_torch(loaded: Loaded, collator: Collator) -> Generator:
    model: Theirs = loaded.model

    def tell_tokens(batch: Batch, hear: Callable[[int], None], most: int) -> None:
        config = greedy(model, collator, most)
        with torch.inference_mode():
            model.generate(
                **placed(batch, model.device, model.dtype), generation_config=config, streamer=_Listener(hear)
            )

    return tell_tokens


def _answers_nothing(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is a dual encoder (CLIP, SigLIP): it tells how well a text fits an image and answers nothing; "
        "give a generative model, or compare with slimvlm evaluate"
    )
