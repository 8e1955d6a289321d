"""Buffers whose size is not known when a module is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ResizedBuffers(nn.Module):
    """A module whose own buffers take the shape they were saved with: they are made later, from data or from what was learned."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != buffer.shape:
                setattr(self, name, torch.empty_like(saved, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)
