"""The k most probable classes of a row and the mass of the rest: from logits, to a few bytes, and back with a stated error.

log p = log softmax(logits / T) over all classes         ids, log_probs: the k greatest, in descending order
tail  = sum of p over the others, summed itself: 1 - sum of the k has no digits left when it is small

ids        2 bytes each, and 1 more for a vocabulary above 65536
log_probs  "float16", 2 bytes:    |error| <= 2^-11 |log p|
           "uint8", 1 byte, and 8 per row:  with g = l_1 - log p, how far it is below the row's first, and G the greatest g,
                                  code = round(254 sqrt(g / G)),    |error| <= sqrt(g G) / 254 + G / 254^2
           so it is exact at the top and the error grows where there is little mass (G = 16: 0.016 at g = 1, 0.063 at g = 16).
tail       4 bytes, float32
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kdfast.data.text import IGNORE

FORMS = ("float16", "uint8")
LEVELS = 254  # code 255: no entry


def top_k_lists(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [N, k], log_probs [N, k], tail [N]) of logits [N, V], computed in float32. An entry of mass 0 has the id -1."""
    z = logits.float() / temperature
    total = z.logsumexp(-1, keepdim=True)
    top, ids = z.topk(k)
    rest = z.scatter(-1, ids, -math.inf)
    empty = (rest == -math.inf).all(-1)
    tail = torch.where(empty, 0.0, (torch.where(empty[:, None], 0.0, rest).logsumexp(-1) - total[:, 0]).exp())
    return torch.where(top == -math.inf, -1, ids), top - total, tail


def pack_lists(ids: Tensor, log_probs: Tensor, tail: Tensor, form: str, vocab_size: int) -> dict[str, Tensor]:
    """The tensors that are stored."""
    there = ids >= 0
    ids = ids.clamp_min(0).int()
    stored = {"ids": (ids & 0xFFFF).to(torch.uint16), "tail": tail.float()}
    if vocab_size > 1 << 16:
        stored["ids_high"] = (ids >> 16).to(torch.uint8)
    if form == "float16":
        stored["log_probs"] = log_probs.clamp_min(-65504.0).where(there, -math.inf).half()
        return stored
    top = log_probs[:, :1]
    gap = (top - log_probs).where(there, 0.0)
    span = gap.amax(1, keepdim=True)
    code = (LEVELS * (gap / span.clamp_min(1e-30)).sqrt()).round()
    stored |= {"codes": code.where(there, 255.0).to(torch.uint8), "top": top[:, 0].float(), "span": span[:, 0].float()}
    return stored


def unpack_lists(stored: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids int32 [N, k], -1 for no entry; log_probs float16 or float32 [N, k], 0 there; tail float32 [N])."""
    ids = stored["ids"].int()
    if "ids_high" in stored:
        ids = ids | (stored["ids_high"].int() << 16)
    if "codes" in stored:
        codes = stored["codes"]
        there = codes != 255
        log_probs = stored["top"][:, None] - stored["span"][:, None] * (codes.float() / LEVELS).square()
    else:
        log_probs = stored["log_probs"]
        there = log_probs != -math.inf
    return ids.where(there, -1), log_probs.where(there, 0.0), stored["tail"]


def log_prob_error(log_probs: Tensor, form: str) -> Tensor:
    """The stated bound on the stored form's error, for each of log_probs [..., k] in descending order."""
    if form == "float16":
        return log_probs.abs() * 2.0**-11 + 2.0**-25
    gap = log_probs[..., :1] - log_probs
    span = gap.amax(-1, keepdim=True)
    return (gap * span).sqrt() / LEVELS + span / LEVELS**2


def has_list(labels: Tensor) -> Tensor:
    """Which of the tokens [L] have a list: those whose successor has a label."""
    return torch.cat((labels[1:] != IGNORE, torch.zeros_like(labels[:1], dtype=torch.bool)))


def list_bytes(k: int, form: str, vocab_size: int) -> int:
    """Bytes of one list on the disk."""
    per_entry = 2 + (vocab_size > 1 << 16) + (2 if form == "float16" else 1)
    return k * per_entry + 4 + (0 if form == "float16" else 8)
