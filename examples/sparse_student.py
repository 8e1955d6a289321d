"""A student whose feed-forward layers are SparseMoE: a Transformer over the rows of a digit, 8 experts of which each row uses 2.

python examples/sparse_student.py           needs scikit-learn, for its digits; nothing is downloaded
"""

import torch
from torch import Tensor, nn

from kdfast.data.digits import digit_mlp, digit_splits
from kdfast.losses import distillation_loss
from kdfast.nn import SparseMoE, moe_losses


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        # in place of Linear(width, 2 width), GELU, Linear(2 width, width): as much work for a row, four times the weights
        self.feed_forward = SparseMoE(width, width, num_experts=8, top_k=2, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm1(x)
        x = x + self.attention(rows, rows, rows, need_weights=False)[0]
        return x + self.feed_forward(self.norm2(x))


class Student(nn.Module):
    """Logits [B, 10] of images [B, 1, 8, 8]: each row of pixels is a token."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(8, width), nn.Parameter(0.02 * torch.randn(8, width))
        self.blocks, self.head = nn.Sequential(Block(width), Block(width)), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(images[:, 0]) + self.places).mean(1))


def main(steps: int = 300) -> tuple[list[float], float, Tensor]:
    """(the student's loss of every step, its test accuracy, rows that each expert of the last layer got)."""
    torch.manual_seed(0)
    splits = {name: rows.tensors for name, rows in digit_splits(seed=0).items()}
    images, labels = splits["teacher"]
    teacher, student, losses = digit_mlp(256), Student(), []
    for network in (teacher, student):
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
        for _ in range(steps):
            batch = torch.randint(len(labels), (64,))
            x, y = images[batch], labels[batch]
            if network is teacher:
                loss = nn.functional.cross_entropy(teacher(x), y)
            else:
                with torch.no_grad():
                    target = teacher(x)
                loss = distillation_loss(student(x), target, y, temperature=4.0, scale_t2=True).loss
                loss = loss + moe_losses(student).loss  # the weighted balance terms of every SparseMoE in it
                losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    student.eval()
    with torch.no_grad():
        accuracy = (student(splits["test"][0]).argmax(-1) == splits["test"][1]).float().mean().item()
    load = student.blocks[-1].feed_forward.load
    print(f"test accuracy {accuracy:.3f}; rows of each expert in training {load.tolist()}")
    return losses, accuracy, load


if __name__ == "__main__":
    main()
