"""Vectors of rotnet: the four turns of images stored with channels last, and the loss with the accuracy of given logits."""

from kdfast.data.rotations import rotate4
from kdfast.methods.rotnet import rotation_prediction_loss
from kdfast.metrics import accuracy


def run(inputs, params):
    images, logits = inputs["images_hwc"], inputs["logits"]
    turned, labels = rotate4(images.movedim(-1, 1))
    return {
        "rotated_hwc": turned.movedim(1, -1).unflatten(0, (-1, 4)),
        "rotation_labels": labels,
        "loss": rotation_prediction_loss(logits),
        "top1_percent": 100 * accuracy(logits.argmax(-1), labels),
    }
