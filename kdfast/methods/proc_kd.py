"""ProC-KD: prototypes of a teacher's local features help a student on another task, with other labels.

Paper: Prototype-guided Cross-task Knowledge Distillation for Large-scale Models. Li et al.; 2022; FITEE 2025;
https://arxiv.org/abs/2212.13180
Based on: an author's MindSpore release, github.com/Daniel00008/Visual_Scene_Adaptive_Framework at 5c81083, folder ProC-KD: the two
    modules are complete there and here (`kdfast.nn.PrototypeLearner`, `PrototypeAugment`).
Reconstruction: the whole objective below, its weights and its temperature, since the release trains with cross-entropy alone and
    never runs the prototype branch; the layers T1 to T3, which it leaves open.
Differs from the release: evaluation there takes top-1 from y1 and top-5 from y2; here `predict` says which one is used.
Symbols: T1..T3 [B, N, D] tokens of three teacher layers, X [B, N, D] the student's tokens before its final norm, both with the class token
    first; c [K, D] prototypes; norm and head are the student's own and shared by both paths.

    proto = PrototypeLearner(T1, T2, T3);   aug(u) = PrototypeAugment(u, c)
    y1 = head(norm(X))[class],  y2(u) = head(norm(aug(u)))[class]
    stage 1    CE(y2(proto), y)   or, for any task,   mean (norm(proto) - norm(t))^2, t the teacher's tokens after `cat`
    stage 2    CE(y1, y) + CE(y2(X), y) + w_f mean (norm(aug(X)) - sg norm(aug(proto)))^2
               + w_k T^2 KL(sg softmax(y2(proto)/T) || softmax(y1/T))

Stage 1 fits the modules, norm and head on the frozen teacher; stage 2 trains the student, norm, head, E and aug, the prototypes frozen.
Inference: teacher and learner are dropped; aug and c stay where y2 is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_choice, check_int, check_number
from kdfast.losses import LossOutput, cross_entropy_loss, kd_loss
from kdfast.methods._protocol import Context, Setup
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn import PrototypeAugment, PrototypeLearner, capture_outputs

TaskLoss = Callable[[Tensor, Tensor], Tensor]


def readout(
    tokens: Tensor, norm: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """(norm(tokens) [B, N, D], head of its class token [B, C])."""
    normed = norm(tokens)
    return normed, head(normed[:, 0])


def reconstruction_loss(output: Tensor, tokens: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """mean (norm(out) - norm(t))^2 over B, N, D: stage 1 without labels."""
    return F.mse_loss(norm(output), norm(tokens))


def proc_kd_loss(
    student: Tensor, augmented: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], labels: Tensor, *,
    feature_weight: float = 1.0, kd_weight: float = 1.0, temperature: float = 4.0, task_loss: TaskLoss = cross_entropy_loss,
) -> LossOutput:  # fmt: skip
    """Stage 2: CE(y1) + CE(y2) + w_f (feature) + w_k T^2 KL.

    Args:
        student: y1 [B, C]. augmented: (norm(aug(X)) [B, N, D], y2 [B, C]), `readout` of the student path. target: the same of the
            teacher path, constants. labels: [B]. task_loss: (logits, labels) -> loss, in place of cross-entropy.
    Returns:
        LossOutput(loss, {"task", "task_augmented", "feature", "kd"}), without the weights, kd with T^2.
    """
    for name, value in (("feature_weight", feature_weight), ("kd_weight", kd_weight)):
        check_number(name, value, low=0.0)
    (features, y2), (wanted, y2_teacher) = augmented, target
    if features.shape != wanted.shape:
        raise ValueError(f"target: expected tokens {tuple(features.shape)} as the student's, got {tuple(wanted.shape)}")
    terms = {
        "task": (1.0, task_loss(student, labels)),
        "task_augmented": (1.0, task_loss(y2, labels)),
        "feature": (feature_weight, F.mse_loss(features, wanted.detach())),
        "kd": (kd_weight, kd_loss(student, y2_teacher, temperature=temperature)),
    }
    loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
    return LossOutput(loss, {name: term.detach() for name, (_, term) in terms.items()})


# ---------------------------------------------------------------- by name
class Method(MethodBase):
    """Both stages in one run: `prototype_steps` optimizer steps of stage 1, then stage 2.

    Reads "tokens" of the student (before its final norm) and "first", "second", "third" of the teacher, all [B, N, D] of one width and
    with the class token first.

    Args:
        widths: {"tokens": (D, None), "first": (None, D), ...}. stage1: "task" (cross-entropy) or "reconstruction".
        prototype_rate: factor of the prototypes' gradient in stage 2, 0: frozen. predict: "y1" (the student alone) or "y2", which
            `deploy` gives. norm, head: paths in the student. form: "linear" is a baseline without prototypes or stages: CE(y1) + w_f times
            the mean squared error of a linear map of X to the teacher's third layer. Others: `proc_kd_loss`, `kdfast.nn.PrototypeLearner`.
    """

    captures = ("tokens", "first", "second", "third")

    def __init__(
        self, widths: Mapping[str, tuple[int, int]], *, num_prototypes: int = 72, bias: bool = False, prototype_steps: int = 100,
        stage1: str = "task", prototype_rate: float = 0.0, feature_weight: float = 1.0, kd_weight: float = 1.0,
        temperature: float = 4.0, predict: str = "y1", form: str = "prototypes", norm: str = "norm", head: str = "head", ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__()
        dim = widths["tokens"][0]
        for name in self.captures[1:]:
            if widths[name][1] != dim:
                raise ValueError(
                    f"widths[{name!r}]: expected the width of the student's tokens ({dim}), got {widths[name][1]}"
                )
        self.form = check_choice("form", form, ("prototypes", "linear"))
        self.learner, self.augment = PrototypeLearner(dim, num_prototypes, bias=bias), PrototypeAugment(dim, bias=bias)
        self.linear = nn.Linear(dim, dim) if form == "linear" else None
        self.prototype_steps = check_int("prototype_steps", prototype_steps)
        self.stage1 = check_choice("stage1", stage1, ("task", "reconstruction"))
        self.predict = check_choice("predict", predict, ("y1", "y2"))
        self.prototype_rate = check_number("prototype_rate", prototype_rate, low=0.0)
        check_number("temperature", temperature, low=0.0, open_low=True)
        self.weights: dict[str, Any] = {
            "feature_weight": check_number("feature_weight", feature_weight, low=0.0),
            "kd_weight": check_number("kd_weight", kd_weight, low=0.0), "temperature": temperature,
        }  # fmt: skip
        self.paths, self.ignore_index = (norm, head), ignore_index
        self.shared: tuple[nn.Module, ...] = ()  # in a tuple, since the student owns them

    def adapt(self, student: nn.Module) -> nn.Module:
        self.shared = tuple(student.get_submodule(path) for path in self.paths)
        return student

    def prototypes(self) -> Tensor:
        """c with its gradient scaled by `prototype_rate`."""
        c = self.learner.prototypes
        return c.detach() + self.prototype_rate * (c - c.detach()) if self.prototype_rate else c.detach()

    def path(self, tokens: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        return readout(self.augment(tokens, prototypes)[0], *self.shared)

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        missing = [name for name in self.captures[1:] if name not in context.teacher_features]
        if missing:
            raise ValueError(f"teacher: expected its features {', '.join(missing)} in training, got none")
        layers = [context.teacher_features[name] for name in self.captures[1:]]
        if self.linear is not None:
            task = self.task_loss(context.student, context.labels)
            feature = F.mse_loss(self.linear(context.student_features["tokens"]), layers[-1])
            parts = {"task": task.detach(), "feature": feature.detach()}
            return LossOutput(task + self.weights["feature_weight"] * feature, parts)
        if context.step < self.prototype_steps:
            return self.fit_prototypes(layers, context.labels)
        with torch.no_grad():
            target = self.path(self.learner(layers)[0], self.learner.prototypes)
        augmented = self.path(context.student_features["tokens"], self.prototypes())
        return proc_kd_loss(
            context.student, augmented, target, context.labels, task_loss=self.task_loss, **self.weights
        )  # fmt: skip

    def fit_prototypes(self, layers: list[Tensor], labels: Tensor) -> LossOutput:
        tokens = torch.relu(self.learner.cat(torch.cat(layers, -1)))
        output = self.learner.fuse(tokens)[0]
        if self.stage1 == "task":
            loss = self.task_loss(self.path(output, self.learner.prototypes)[1], labels)
        else:
            loss = reconstruction_loss(output, tokens, self.shared[0])
        return LossOutput(loss, {"prototypes": loss.detach()})

    def task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_loss(logits, labels, ignore_index=self.ignore_index)

    def deploy(self, setup: Setup) -> nn.Module:
        if self.predict == "y1":
            return setup.student
        return Augmented(setup.student, self.augment, self.learner.prototypes, setup.capture["tokens"], self.paths)


class Augmented(nn.Module):
    """y2 [B, C] of a trained student: its tokens enriched by the prototypes, read by its own norm and head."""

    def __init__(
        self, student: nn.Module, augment: PrototypeAugment, prototypes: Tensor, tokens: str, paths: tuple[str, str]
    ) -> None:
        super().__init__()
        self.student, self.augment, self.tokens, self.paths = student, augment, tokens, paths
        self.prototypes: Tensor
        self.register_buffer("prototypes", prototypes.detach().clone())

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        with capture_outputs(self.student, {"tokens": self.tokens}) as found:
            self.student(*inputs, **named)
        norm, head = (self.student.get_submodule(path) for path in self.paths)
        return readout(self.augment(found["tokens"], self.prototypes)[0], norm, head)[1]
