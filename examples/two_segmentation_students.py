"""Segmentation with two students that teach each other: at every pixel the one that is right teaches the other.

python examples/two_segmentation_students.py            needs scikit-learn, for its digits; nothing is downloaded
"""

import torch
import torch.nn.functional as F

from kdfast.data.canvases import BACKGROUND, CLASSES, IGNORE, SegmentationCNN, SegmentationViT, canvas_splits
from kdfast.losses import selective_kd_loss
from kdfast.metrics import mean_iou


def main(steps: int = 300) -> tuple[list[float], dict[str, float]]:
    """(the loss of every step, {network: test mIoU}). Put your own pair here: logits [B, C, H, W] of both, labels [B, H, W]."""
    torch.manual_seed(0)
    splits = canvas_splits(seed=0)
    images, labels = splits["student"].tensors  # [400, 1, 32, 32], [400, 32, 32] with 255 where nothing is asked
    cnn, vit = SegmentationCNN(), SegmentationViT()
    optimizers = [torch.optim.AdamW(network.parameters(), lr=2e-3) for network in (cnn, vit)]
    losses = []
    for step in range(steps):
        batch = torch.randint(len(labels), (16,))
        x, y = images[batch], labels[batch]
        a, b = cnn(x), vit(x)
        ce = F.cross_entropy(a, y, ignore_index=IGNORE) + F.cross_entropy(b, y, ignore_index=IGNORE)
        # KL(better || other) at each labelled pixel. The teaching side is detached, so one backward serves both networks.
        selective, parts = selective_kd_loss(a, b, y, ignore_index=IGNORE)
        loss = ce + selective
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}, to the CNN {parts['to_a']:.3f}, to the ViT {parts['to_b']:.3f}")
    images, labels = splits["test"].tensors
    scores = {}
    for name, network in (("cnn", cnn), ("vit", vit)):
        with torch.no_grad():
            predicted = network.eval()(images).argmax(1)
        scores[name] = mean_iou(predicted, labels, num_classes=CLASSES, ignore_index=IGNORE)
        found = (predicted[labels < BACKGROUND] == labels[labels < BACKGROUND]).float().mean()
        print(f"{name}: test mIoU {scores[name]:.3f}, of the pixels of digits {found:.3f} right")
    return losses, scores


if __name__ == "__main__":
    main()
