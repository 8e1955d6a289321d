"""How well a language model predicts a text, in bits per byte: comparable between tokenizers, which perplexity is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
LOGIT_BYTES = 128 << 20  # float32 logits held at a time


class Windows(NamedTuple):
    """A text as rows of tokens and, beside each, the token that follows. Every token of the text is a label once."""

    input_ids: Tensor  # [n, L]
    labels: Tensor  # [n, L], already shifted: labels[i, t] follows input_ids[i, t]; -100 after the end
    n_bytes: int  # of the text in UTF-8


def windows_of(texts: Iterable[str], encode: Callable[[str], list[int]], start: int, length: int) -> Windows:
    """Each document as windows of `length` tokens, one after the other.

    The first token of a document is predicted from `start` (the begin or end token), the first of a later window from the last one of the
    window before; nothing is predicted twice, and no special token is.
    """
    inputs, labels, n_bytes = [], [], 0
    for text in texts:
        ids = encode(text)
        n_bytes += len(text.encode())
        stream = [start, *ids]
        for at in range(0, len(ids), length):
            given, wanted = stream[at : at + length], stream[at + 1 : at + 1 + length]
            given = given[: len(wanted)]
            rest = length - len(wanted)
            inputs.append(given + [start] * rest)
            labels.append(wanted + [IGNORED] * rest)
    if not inputs:
        raise ValueError("texts: expected at least one that is not empty, got none")
    return Windows(torch.tensor(inputs), torch.tensor(labels), n_bytes)


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Windows) -> float:
    """sum over all tokens of -log2 q(token) / bytes of the text; summed in float64, the model in eval mode meanwhile.

    model: called with input_ids [n, L]; returns logits [n, L, V], or an object with `.logits`. A model that sees fewer bytes in
    its window has less to go by: compare tokenizers at windows that hold as much text.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    nats = 0.0
    rows = 1
    with torch.autocast(device.type, enabled=False):
        at = 0
        while at < len(windows.input_ids):
            output: Any = model(input_ids=windows.input_ids[at : at + rows].to(device))
            logits = getattr(output, "logits", output)
            labels = windows.labels[at : at + rows].to(device)
            each = F.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
            )
            nats += float(each.double().sum())
            at += len(labels)
            rows = max(LOGIT_BYTES // (4 * logits.shape[1] * logits.shape[2]), 1)
    model.train(training)
    return nats / math.log(2) / windows.n_bytes
