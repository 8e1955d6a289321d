"""Quarter turns: index by index, layouts, normalisation, gradients, images that are not square, wrong arguments."""

import pytest
import torch

from kdfast.data.rotations import rotate4, rotate90, rotate_pairs, rotation_labels


def test_turns_index_by_index():
    x = torch.arange(2 * 3 * 5 * 5).view(2, 3, 5, 5)
    for i in range(5):
        for j in range(5):
            for k, (row, column) in enumerate([(i, j), (j, 4 - i), (4 - i, 4 - j), (4 - j, i)]):
                assert torch.equal(rotate90(x, k)[..., i, j], x[..., row, column])
    assert torch.equal(rotate90(x[0], 1), rotate90(x, 1)[0])


def test_turns_form_a_group():
    x = torch.rand(2, 1, 4, 4)
    for a in range(4):
        for b in range(4):
            assert torch.equal(rotate90(rotate90(x, a), b), rotate90(x, (a + b) % 4))


@pytest.mark.parametrize("layout", ["image_major", "rotation_major"])
def test_rotate4_holds_each_turn_of_each_image_where_its_label_says(layout):
    x = torch.rand(3, 2, 4, 4)
    turned, labels = rotate4(x, layout=layout)
    assert turned.shape == (12, 2, 4, 4) and torch.equal(labels, rotation_labels(3, layout=layout))
    for row, (image, label) in enumerate(zip(turned, labels.tolist())):
        source = row // 4 if layout == "image_major" else row % 3
        assert torch.equal(image, rotate90(x[source], label))
    assert rotation_labels(2, layout=layout).tolist() == (
        [0, 1, 2, 3] * 2 if "image" in layout else [0, 0, 1, 1, 2, 2, 3, 3]
    )


def test_bytes_are_scaled_and_normalisation_commutes():
    x = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    assert rotate4(x)[0].dtype == torch.uint8
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 4.0])
    got, _ = rotate4(x, mean=mean, std=std, dtype=torch.float32)
    after = (rotate4(x)[0].float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    torch.testing.assert_close(got, after)
    with pytest.raises(TypeError, match="dtype: expected a float dtype to normalise in"):
        rotate4(x, mean=0.5)


def test_the_gradient_is_turned_back():
    x = torch.rand(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(8, 1, 3, 3, dtype=torch.float64)
    (grad,) = torch.autograd.grad((rotate4(x)[0] * weight).sum(), x)
    want = sum(rotate90(weight.view(2, 4, 1, 3, 3)[:, k], (4 - k) % 4) for k in range(4))
    torch.testing.assert_close(grad, want)


def test_images_that_are_not_square_come_in_two_batches():
    x = torch.rand(2, 1, 3, 5)
    (even, even_labels), (odd, odd_labels) = rotate_pairs(x)
    assert even.shape == (4, 1, 3, 5) and odd.shape == (4, 1, 5, 3)
    assert even_labels.tolist() == [0, 2, 0, 2] and odd_labels.tolist() == [1, 3, 1, 3]
    assert torch.equal(odd[3], rotate90(x[1], 3)) and torch.equal(even[1], rotate90(x[0], 2))
    with pytest.raises(ValueError, match="x: expected square images, got 3 x 5"):
        rotate4(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotate90(torch.zeros(1, 1, 2, 2), 4), "k: expected 0 to 3 quarter turns, got 4"),
        (lambda: rotate90(torch.zeros(1, 1, 2, 2), -1), "k: expected an int >= 0"),
        (lambda: rotate90(torch.zeros(2, 2), 1), r"x: expected images \[B, C, H, W\] or"),
        (lambda: rotate4(torch.zeros(3, 2, 2)), r"x: expected images \[B, C, H, W\]"),
        (lambda: rotate4(torch.zeros(0, 1, 2, 2)), "at least one"),
        (lambda: rotate4(torch.zeros(1, 1, 2, 2), layout="mixed"), "layout: expected one of"),
        (lambda: rotate_pairs(torch.zeros(0, 1, 2, 2)), "at least one"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
