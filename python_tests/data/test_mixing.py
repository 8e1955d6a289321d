"""Mixup: by hand, the draws and their counts, soft labels, batches of mixed rows, wrong arguments."""

import pytest
import torch

from kdfast.data.mixing import MixDraw, MixedRows, draw_mixup, mix, soft_labels


def test_by_hand():
    images = torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1, 1)
    draw = MixDraw(torch.tensor([0.25, 0.5, 0.75]), torch.tensor([2, 0, 1]), torch.tensor([0, 1, 2]), torch.tensor([1]))
    mixed = mix(images, torch.tensor([7, 8, 9]), draw)
    assert mixed.inputs.flatten().tolist() == [25.75, 1.0, 32.5]  # row 1 is the pure image of first[1]
    assert mixed.labels_a.tolist() == [9, 7, 8] and mixed.labels_b.tolist() == [7, 8, 9]
    assert mixed.lam.tolist() == [0.25, 1.0, 0.75]


def test_soft_labels_add_up_where_the_partners_share_a_class():
    got = soft_labels(torch.tensor([0, 2]), torch.tensor([1, 2]), torch.tensor([0.25, 0.25]), 3)
    assert got.tolist() == [[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]


def test_the_number_of_unmixed_positions():
    exact = draw_mixup(64, unmixed_fraction=0.9).unmixed
    assert len(exact) == len(set(exact.tolist())) == 57
    assert len(draw_mixup(64).unmixed) == 0 and len(draw_mixup(7, unmixed_fraction=1.0).unmixed) == 7
    generator = torch.Generator().manual_seed(0)
    left = [
        1
        - len(draw_mixup(64, unmixed_fraction=0.9, sampling="with_replacement", generator=generator).unmixed.unique())
        / 64
        for _ in range(300)
    ]
    assert sum(left) / 300 == pytest.approx((1 - 1 / 64) ** 57, abs=0.01)  # 0.407 stay mixed


def test_draws_follow_the_generator_and_the_beta_distribution():
    def draw(seed, beta=1.0):
        return draw_mixup(4000, beta=beta, unmixed_fraction=0.5, generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first.lam, other.lam)
    for beta in (0.5, 1.0, 4.0):
        lam = draw(3, beta).lam
        assert lam.mean().item() == pytest.approx(0.5, abs=0.02)
        assert lam.var().item() == pytest.approx(1 / (4 * (2 * beta + 1)), rel=0.08)


def test_rows_are_mixed_anew():
    torch.manual_seed(0)
    data = MixedRows(torch.rand(20, 1, 2, 2), torch.arange(20) % 4, 4)
    inputs, labels = data.__getitems__([3, 4, 5])
    assert inputs.shape == (3, 1, 2, 2) and labels.shape == (3, 4) and len(data) == 20
    torch.testing.assert_close(labels.sum(1), torch.ones(3))
    assert not torch.equal(inputs, data.__getitems__([3, 4, 5])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lam": torch.tensor([0.5, 1.5])}, r"lam: expected shares in \[0, 1\], got 0.5 to 1.5"),
        ({"first": torch.tensor([0, 0])}, r"first: expected a permutation of 2 rows, got \[0, 0\]"),
        ({"second": torch.tensor([0, 2])}, "second: expected a permutation"),
        ({"second": torch.tensor([0])}, "second: expected shape"),
        ({"unmixed": torch.tensor([2])}, r"unmixed: expected positions in \[0, 2\), got \[2\]"),
    ],
    ids=str,
)
def test_bad_mix(change, message):
    index = torch.arange(2)
    draw = MixDraw(torch.tensor([0.5, 0.5]), index, index, torch.empty(0, dtype=torch.long))._replace(**change)
    with pytest.raises(ValueError, match=message):
        mix(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), draw)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta: expected a finite number in"),
        ({"unmixed_fraction": 1.1}, "unmixed_fraction: expected a finite number in"),
        ({"sampling": "some"}, "sampling: expected one of exact, with_replacement"),
    ],
    ids=str,
)
def test_bad_draw(options, message):
    with pytest.raises(ValueError, match=message):
        draw_mixup(4, **options)
