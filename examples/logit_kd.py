"""Distillation in a plain training loop: one line changes, the rest of the loop is what it was.

python examples/logit_kd.py             needs scikit-learn, for its digits; nothing is downloaded
"""

import torch
from torch import Tensor, nn

from kdfast.data.digits import digit_mlp, digit_splits
from kdfast.losses import distillation_loss


def train(model: nn.Module, data: tuple[Tensor, Tensor], steps: int, teacher: nn.Module | None = None) -> list[float]:
    """The loss of every step. With a teacher the same loop, one line changed."""
    images, labels = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(labels), (64,))
        x, y = images[batch], labels[batch]
        if teacher is None:
            loss = nn.functional.cross_entropy(model(x), y)
        else:
            with torch.no_grad():
                target = teacher(x)
            # the changed line: 0.5 CE + 0.5 T^2 KL(teacher || student), one pass over the logits
            loss = distillation_loss(model(x), target, y, temperature=4.0, scale_t2=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    images, labels = data
    return (model(images).argmax(-1) == labels).float().mean().item()


def main(steps: int = 600) -> dict[str, tuple[list[float], float]]:
    """{network: (losses, test accuracy)}: a teacher of 900 labels; a student of 200, alone and with the teacher."""
    torch.manual_seed(0)
    splits = {name: rows.tensors for name, rows in digit_splits(seed=0).items()}
    teacher, alone, distilled = digit_mlp(256), digit_mlp(16), digit_mlp(16)
    distilled.load_state_dict(alone.state_dict())
    found = {}
    for name, model, part, guide in (
        ("teacher", teacher, "teacher", None), ("alone", alone, "student", None), ("distilled", distilled, "student", teacher),
    ):  # fmt: skip
        losses = train(model, splits[part], steps, guide)
        found[name] = losses, accuracy(model, splits["test"])
        print(f"{name}: test accuracy {found[name][1]:.3f}")
    return found


if __name__ == "__main__":
    main()
