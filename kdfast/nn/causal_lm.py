"""A causal language model's last hidden states and output layer, read from its own forward: its logits are never made.

The model runs as it is; only the call of its output layer is cut to no rows, and the hidden states that the call was given are
handed out with the layer's weight. What the model does to its logits afterwards (Gemma's soft cap, the factors of Cohere, Granite
and others) is taken from its config and confirmed once, on the logits of a few rows that the model makes itself.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)
PROBE_ROWS = 4


class Head(NamedTuple):
    """An output layer: logits = softcap(scale (hidden weight^T + bias))"""

    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None


class States(NamedTuple):
    """What a model says of a batch: hidden states [B, L, D] with a head, or logits [B, L, V] with None. outputs: the model's own."""

    rows: Tensor
    head: Head | None
    outputs: Any = None


def scale_candidates(config: Any) -> list[float]:
    """Factors on the logits that a config may mean, most likely first."""
    value: dict[str, Any] = {
        name: getattr(config, name, None)
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    }
    found = [float(value[name]) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier") if value[name]]
    if value["logits_scaling"]:
        found += [1 / float(value["logits_scaling"]), float(value["logits_scaling"])]  # Granite; HyperCLOVA X
    return [*found, 1.0]


class Reader:
    """Reads the hidden states and the head of one model. `reason` says why it takes the logits instead, once it does."""

    def __init__(self, name: str = "model", use_logits: bool = False) -> None:
        self.name = name
        self.reason: str | None = "as asked" if use_logits else None
        self._logits: tuple[float, float | None] | None = None  # (scale, softcap), confirmed

    def __call__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        forward: Callable[..., Any] | None = None,
        *,
        all_logits: bool = False,
    ) -> States:
        """One forward. forward: what to call instead of the model (`through`). all_logits: `outputs` has them all."""
        forward = model if forward is None else forward  # a compiled model has a len(), which raises
        if "use_cache" in inspect.signature(type(model).forward).parameters:
            inputs = {"use_cache": False, **inputs}  # else keys and values of every layer are kept
        head = None if self.reason else self._head_module(model)
        if head is None:
            outputs = forward(**inputs)
            return States(outputs.logits, None, outputs)
        calls: list[Tensor] = []
        dtypes: list[torch.dtype] = []
        rows = None if all_logits else 0 if self._logits else PROBE_ROWS

        def cut(module: nn.Module, args: tuple) -> tuple | None:
            calls.append(args[0])
            dtypes.append(_product_dtype(args[0]))
            return None if rows is None else (args[0][..., :rows, :], *args[1:])

        with head.register_forward_pre_hook(cut):
            outputs = forward(**inputs)
        dtype = dtypes[0] if dtypes else head.weight.dtype  # as the model's own products, also under autocast
        read = Head(head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype))
        if self._logits is None:
            self._confirm(model, read, calls, inputs, outputs.logits)
        if self._logits is None:
            return self(model, inputs, forward)
        return States(calls[0].to(dtype), Head(read.weight, read.bias, *self._logits), outputs)

    def _head_module(self, model: Any) -> nn.Linear | None:
        head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        weight = getattr(head, "weight", None)
        if head is None:
            self._give_up(model, "it has no get_output_embeddings()")
        elif not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
            self._give_up(model, f"its output layer is a {type(head).__name__}, not an nn.Linear")
        elif hasattr(weight, "ds_id"):
            self._give_up(model, "DeepSpeed ZeRO-3 holds its output layer in pieces")
        elif hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            self._give_up(model, "it is compiled, which does not see the hook on its output layer")
        else:
            return head
        return None

    @torch.no_grad()
    def _confirm(self, model: Any, head: Head, calls: list[Tensor], inputs: Mapping[str, Any], logits: Tensor) -> None:
        tokens = next(inputs[key] for key in ("input_ids", "inputs_embeds") if inputs.get(key) is not None)
        if len(calls) != 1 or calls[0].shape[:2] != tokens.shape[:2] or calls[0].dim() != 3:
            shapes = [tuple(call.shape) for call in calls]
            self._give_up(model, f"its output layer was called with {shapes} for tokens {tuple(tokens.shape[:2])}")
            return
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        hidden, want = calls[0][:, :PROBE_ROWS].to(head.weight.dtype), logits[:, :PROBE_ROWS]
        with torch.autocast(hidden.device.type, enabled=False):
            raw = F.linear(hidden, head.weight, head.bias).float()
        # Both round to the wider of these two, whose logits are of size max |want|.
        allowed = max(1e-5, 4 * torch.finfo(hidden.dtype).eps, 4 * torch.finfo(want.dtype).eps)
        worst = float("inf")
        for scale in scale_candidates(config):
            for softcap in dict.fromkeys((getattr(config, "final_logit_softcapping", None), None)):
                got = raw * scale if softcap is None else softcap * torch.tanh(raw * scale / softcap)
                error = float((got - want.float()).abs().max() / want.float().abs().max().clamp_min(1e-30))
                if error <= allowed:
                    self._logits = (scale, softcap)
                    return
                worst = min(worst, error)
        self._give_up(
            model,
            f"its logits are not its output layer's times what its config says (off by {worst:.1e} of the largest)",
        )

    def _give_up(self, model: nn.Module, why: str) -> None:
        self.reason = why
        logger.warning("%s (%s): using its logits, since %s", self.name, type(model).__name__, why)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The type of the products of an output layer called with these: under autocast not that of its weight."""
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype
