"""Digits for diffusion: ranges, fixed held-out noise, the score."""

import pytest
import torch

pytest.importorskip("sklearn")

from kdfast.data.digit_diffusion import TIMESTEPS, diffusion_splits, explained
from kdfast.nn.diffusion import DiffusionSchedule


def test_splits():
    splits, again = diffusion_splits(0), diffusion_splits(0)
    images = splits["student"].__getitems__([0, 1])["images"]
    assert images.shape == (2, 1, 8, 8) and images.min() >= -1 and images.max() <= 1 and images.min() == -1
    assert len(splits["student"]) == 1297 and len(splits["val"]) == 800 and len(splits["test"]) == 1200
    rows = list(range(800))
    first, second = (s["val"].__getitems__(rows) for s in (splits, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(set(first["timesteps"].tolist())) == list(range(TIMESTEPS))
    clean = DiffusionSchedule(TIMESTEPS).predict_start(first["x"], first["timesteps"], first["labels"])
    early = first["timesteps"] < 90
    assert clean[early].min() > -1.1 and clean[early].max() < 1.1
    assert len(diffusion_splits(1)["student"]) == 1297


def test_score():
    noise = torch.randn(1000)
    assert explained(noise, noise) == 1.0
    assert explained(torch.zeros(1000), noise) == pytest.approx(0, abs=0.15)
