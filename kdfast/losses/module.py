"""LossOutput, and LossModule: the nn.Module twin of a loss function, for pipelines driven by configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn


class LossOutput(NamedTuple):
    """A loss and its parts. `parts` are detached, unweighted, for logging; `loss` alone carries the graph."""

    loss: Tensor
    parts: dict[str, Tensor]


class LossModule(nn.Module):
    """Binds the options of a loss function: `class KDLoss(LossModule, function=kd_loss): ...`.

    The constructor takes the function's keyword-only arguments and nothing else (a typo raises); Tensor options become
    buffers; an option given in the call wins over the bound one. Doc and signature come from the function.
    """

    function: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls, function: Callable[..., Any] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if function is None:
            return
        cls.function = staticmethod(function)
        parameters = inspect.signature(function).parameters.values()
        options = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        cls.__doc__ = (
            f"Module twin of `{function.__name__}`: options here, tensors in the call.\n\n{inspect.getdoc(function)}"
        )
        cls.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        signature: inspect.Signature = type(self).__signature__  # type: ignore[attr-defined]
        unknown = sorted(set(options) - set(signature.parameters))
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: unknown option {', '.join(unknown)}; expected some of {', '.join(signature.parameters)}"
            )
        self.options: dict[str, Any] = {}
        for name, value in options.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)  # a learned option stays learned
            elif isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                self.options[name] = value

    def forward(self, *tensors: Any, **call_options: Any) -> Any:
        # not without duplicates: one tensor may be given for two options
        buffers = dict(self.named_buffers(recurse=False, remove_duplicate=False))
        learnt = dict(self.named_parameters(recurse=False, remove_duplicate=False))
        bound = {**self.options, **buffers, **learnt, **call_options}
        return type(self).function(*tensors, **bound)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
