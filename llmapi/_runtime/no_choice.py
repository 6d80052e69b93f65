"""Why no token can be chosen from a row of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from llmapi._runtime.request import Sequence
from llmapi.errors import RequestError


def no_choice(raw: Tensor, edited: Tensor, sequence: Sequence) -> RequestError:
    """Say why no token can be chosen from a row."""
    where = f"request {sequence.request.id}, output token {sequence.num_output}"
    for broken, name in ((raw.isnan(), "NaN"), (raw == torch.inf, "+inf")):
        if bad := int(broken.sum()):
            return RequestError(
                f"{where}: {bad} of the model's {raw.numel()} logits are {name}. Try dtype='float32' or another "
                "quantization, and check the checkpoint"
            )
    if bool((raw == -torch.inf).all()):
        return RequestError(f"{where}: all {raw.numel()} logits of the model are -inf. Check the checkpoint")
    bad = int(edited.isnan().sum())
    if bad:
        return RequestError(
            f"{where}: logits_processors left {bad} of {edited.numel()} logits NaN. Return numbers or -inf"
        )
    return RequestError(
        f"{where}: no token is left of {edited.numel()}: logits_processors, guided_decoding, min_tokens, logit_bias "
        "and bad_words exclude all of them. Loosen one"
    )


def failed(reason: int, vocab: int, sequence: Sequence) -> RequestError:
    """:func:`no_choice` by what a kernel says of the row.

    Args:
        reason: how many logits are NaN; -1: all are -inf; -2: one is +inf; any other: they are in order, and edits
            left none of them.
        vocab: width of the logits.
        sequence: as of :func:`no_choice`.
    """
    raw, edited = torch.zeros(2, vocab)
    if reason > 0:
        raw[:reason] = torch.nan
    elif reason == -1:
        raw[:] = -torch.inf
    elif reason == -2:
        raw[0] = torch.inf
    return no_choice(raw, edited, sequence)
