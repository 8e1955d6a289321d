"""On-policy distillation: the student writes the answers, the teacher scores them, the loss is any of the others.

    batch = sampled_batch(student, batch, max_new_tokens=64, pad_token_id=tokenizer.pad_token_id)
    loss = CausalLMLoss(kind="reverse_kl", ce_weight=0.0, kd_weight=1.0)(student, teacher, batch).loss

No gradient goes through the sampling (Agarwal et al., On-Policy Distillation of Language Models, ICLR 2024, algorithm 1): the sampled
tokens are data. So there is nothing to learn from them as labels, and cross-entropy belongs at weight 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


def prompts_of(batch: Mapping[str, Any], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """(input_ids [B, P], attention_mask [B, P]) of the prompts, padded on the left.

    The prompt of a row is what stands before its first label that counts; all of the row if there are no labels.
    """
    tokens = batch["input_ids"]
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
    if labels is not None:
        real = real & ((labels != IGNORE).cumsum(1) == 0)
    lengths = real.sum(1)
    if bool((lengths == 0).any()):
        raise ValueError(
            f"batch: expected a prompt in every row, tokens before the first label that is not {IGNORE}; row "
            f"{int((lengths == 0).int().argmax())} has none"
        )
    order = torch.argsort(real.to(torch.int8), dim=1, stable=True)[:, -int(lengths.max()) :]  # real ones to the right
    kept = real.gather(1, order)
    return tokens.gather(1, order).masked_fill(~kept, pad_token_id), kept.long()


@torch.no_grad()
def sampled_batch(
    student: Any,
    batch: Mapping[str, Any],
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    pad_token_id: int | None = None,
    **generate: Any,
) -> dict[str, Any]:
    """The batch's prompts with answers that the student samples.

    Args:
        student: a model with `generate`, not a wrapper; put back in the mode it was in.
        batch: input_ids [B, L], attention_mask, labels (`prompts_of`).
        pad_token_id: None takes that of the student's generation config, else its end-of-text token.
        generate: more for `student.generate`, e.g. top_p.
    Returns:
        {"input_ids", "attention_mask", "position_ids", "labels", "on_policy": True} of [B, P + new]; labels are the sampled tokens up to the
        end-of-text token with it, -100 elsewhere.

    Draws from torch's random numbers: the same seed gives the same answers.
    """
    config = student.generation_config
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if pad_token_id is None:
        pad_token_id = config.pad_token_id if config.pad_token_id is not None else (ends or [0])[0]
    prompts, mask = prompts_of(batch, pad_token_id)
    training = student.training
    student.eval()
    try:
        tokens = student.generate(
            input_ids=prompts, attention_mask=mask, do_sample=True, temperature=temperature, max_new_tokens=max_new_tokens,
            pad_token_id=pad_token_id, **{"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, **generate},
        )  # fmt: skip
    finally:
        student.train(training)
    answers = tokens[:, prompts.shape[1] :]
    over = torch.isin(answers, torch.tensor(ends, device=answers.device, dtype=answers.dtype)).cumsum(1)
    kept = torch.cat((torch.zeros_like(over[:, :1]), over[:, :-1]), 1) == 0  # up to the first end, and with it
    attention = torch.cat((mask, kept.long()), 1)
    labels = torch.cat((torch.full_like(prompts, IGNORE), answers.masked_fill(~kept, IGNORE)), 1)
    # position_ids as in generation, also for models with absolute positions
    positions = (attention.cumsum(1) - 1).clamp_min(0)
    return {
        "input_ids": tokens,
        "attention_mask": attention,
        "position_ids": positions,
        "labels": labels,
        "on_policy": True,
    }
