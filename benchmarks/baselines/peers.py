"""Other libraries, when they are installed. Each loader raises ImportError otherwise, and the row is left out.

None is a requirement of kdfast. They install without their dependencies, which pull in a CUDA torch:
`pip install --no-deps liger-kernel torchdistill trl`.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

PACKAGES = ("liger-kernel", "torchdistill", "trl", "torchtune")


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def one_function(package: str, file: str, name: str) -> Callable[..., Tensor]:
    """A single function out of an installed package whose own import asks for more packages than the function does."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"{package} is not installed")
    path = Path(spec.origin).parent / file
    if not path.exists():
        raise ImportError(f"this version of {package} has no {file}")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            node.decorator_list = []
            scope = {"torch": torch, "F": F, "math": math, "nn": torch.nn}
            exec(compile(ast.Module([node], []), str(path), "exec"), scope)
            return scope[name]
    raise ImportError(f"this version of {package} has no {name}")


def trl_jsd(beta: float) -> Callable[..., Tensor]:
    """TRL's dense loss of its GKD trainer. Without labels it divides by the first axis, so the rows go in as the batch."""
    function = one_function("trl", "experimental/gkd/gkd_trainer.py", "generalized_jsd_loss")

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return function(student, teacher, beta=beta)

    return loss


def trl_head(beta: float) -> Callable[..., Tensor]:
    function = one_function("trl", "experimental/gkd/gkd_trainer.py", "generalized_jsd_loss")

    def loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
        student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
        return function(student[None], teacher[None], labels[None], beta=beta)

    return loss


def liger_head(beta: float, chunk_size: int = 128) -> Callable[..., Tensor]:
    """Liger's chunked loss: logits of `chunk_size` rows at a time, gradient in the forward. Uncompiled, as TRL ships it."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False, chunk_size=chunk_size
    )

    def loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
        return module(hidden, weight, teacher_hidden, teacher_weight, labels)

    return loss


def torch_linear_cross_entropy() -> Callable[..., Tensor]:
    """torch's own fused head with probability targets: the cross term of the KL; the teacher's entropy is a constant to it.

    The teacher's softmax is computed here too, since kdfast and the other rows start from the teacher's hidden states.
    """
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise ImportError("this torch has no F.linear_cross_entropy")

    def loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
        keep = labels != -100
        log_p = F.log_softmax(teacher_hidden[keep] @ teacher_weight.T, -1)
        p = log_p.exp()
        return function(hidden[keep], weight, p) + (p * log_p).sum(-1).mean()

    return loss


def torchdistill_kd(temperature: float) -> Callable[..., Tensor]:
    """A loss over the dictionaries its hooks make; alpha tiny instead of 0, for at 0 it drops T^2."""
    from torchdistill.losses.mid_level import KDLoss

    module = KDLoss(".", "output", ".", "output", temperature=temperature, alpha=1e-12)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        labels = torch.zeros(student.shape[0], dtype=torch.long)
        return module({".": {"output": student}}, {".": {"output": teacher}}, labels)

    return loss
