"""Whether a loaded model computes at all, asked once and first: transformers builds what does not fit without a word.

A layer that is not there, image features of another number than image tokens, a table that is too short: such a config
shows when the model runs. Then it is refused, before the minutes that would end in a traceback.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from slimvlm.compress.data.collate import Batch, Collator
from slimvlm.compress.data.questions import placed
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.errors import CheckpointError, foreign
from slimvlm.compress.evaluation.evaluate import generate

UNFIT = "its config, its weights and its processor do not fit together"


def check_computes(model: PreTrainedModel, collator: Collator, sample: Sample, where: object) -> None:
    """Run the model once on `sample` and its right answer.

    Args:
        where: its folder, for messages.

    Raises:
        CheckpointError: it fails, or its loss is not finite.
        SampleError: as `Collator.training`.
    """
    batch = _placed(model, collator.training([sample]), collator, where)
    with foreign(f"{where}: the model cannot compute {sample.identity}", UNFIT), torch.inference_mode():
        loss = model(**batch).loss
    if loss is not None and not bool(loss.isfinite()):
        raise CheckpointError(f"{where}: the loss of {sample.identity} is {loss.item()}, no finite number; {UNFIT}")


def check_answers(model: PreTrainedModel, collator: Collator, sample: Sample, where: object) -> None:
    """Let the model answer `sample` with one token.

    Raises:
        CheckpointError, SampleError: as `check_computes`.
    """
    batch = _placed(model, collator.prompts([sample]), collator, where)
    with foreign(f"{where}: the model cannot answer {sample.identity}", UNFIT), torch.inference_mode():
        generate(model, collator, batch, 1)


def _placed(model: PreTrainedModel, batch: Batch, collator: Collator, where: object) -> Batch:
    """On the model's device, after a look at the token ids: on a GPU an id past the table ends the process."""
    known = getattr(model.config.get_text_config(), "vocab_size", None)
    ids = batch["input_ids"]
    largest = int(ids.masked_fill(ids == collator.image_token_id, 0).max())
    if known is not None and largest >= known:
        raise CheckpointError(f"{where}: the tokenizer gives the id {largest}, the model has {known} tokens; {UNFIT}")
    return placed(batch, model.device, model.dtype)
