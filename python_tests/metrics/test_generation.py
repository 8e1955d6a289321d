import pytest
import torch

from kdfast.metrics import frechet_distance


def test_frechet_distance_of_known_gaussians():
    """Equal sets: 0. A shift: its square. A factor c about the mean: (c - 1)^2 tr S. Diagonal: sum (s_a - s_b)^2."""
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(20, rel=1e-9)
    centred = x - x.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * float(torch.cov(x.T).trace()), rel=1e-9)
    assert frechet_distance(x.float(), x[:100]) == pytest.approx(frechet_distance(x[:100], x), rel=1e-5)
    one = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [4.0]])  # deviations sqrt 2 and 2 sqrt 2, means 1 and 2
    assert frechet_distance(*one) == pytest.approx(1 + 2)


def test_frechet_distance_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"at least two rows, got \(1, 3\)"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3))
