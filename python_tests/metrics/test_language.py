"""Bits per byte: a uniform model's by hand, every token once, the same whatever the windows; peak memory sees what is allocated."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdfast.metrics.language import bits_per_byte, windows_of
from kdfast.metrics.memory import peak_memory

TEXTS = ["abcdefgh", "", "äöü and more"]


def encode(text):
    return list(text.encode())


class Uniform(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(classes))

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


class Bigram(nn.Module):
    """log q(next | token) from a table: needs one token of context, which every window has."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(257, 257)

    def forward(self, input_ids):
        assert not self.training
        return self.table(input_ids)


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token():
    windows = windows_of(TEXTS, encode, start=256, length=5)
    assert windows.n_bytes == 8 + 15
    assert bits_per_byte(Uniform(257), windows) == pytest.approx(math.log2(257), rel=1e-6)
    two_bytes_a_token = windows_of(["abcdefgh"], lambda text: [0, 1, 2, 3], start=256, length=3)
    assert bits_per_byte(Uniform(1024), two_bytes_a_token) == pytest.approx(10 * 4 / 8, rel=1e-6)


@pytest.mark.parametrize("length", [1, 2, 5, 8, 100])
def test_every_token_is_a_label_once_beside_the_one_before(length):
    windows = windows_of(TEXTS, encode, start=256, length=length)
    keep = windows.labels != -100
    pairs = list(zip(windows.input_ids[keep].tolist(), windows.labels[keep].tolist()))
    want = [pair for text in TEXTS for pair in zip([256, *encode(text)], encode(text))]
    assert sorted(pairs) == sorted(want)
    model = Bigram()
    table = model.table.weight.detach().double().log_softmax(-1)
    nats = -sum(table[a, b].item() for a, b in want)
    assert bits_per_byte(model, windows) == pytest.approx(nats / math.log(2) / windows.n_bytes, rel=1e-6)
    assert model.training


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="texts: expected at least one that is not empty"):
        windows_of(["", ""], encode, start=256, length=4)


def test_peak_memory_sees_what_is_freed_again():
    megabytes = 96

    def call():
        block = torch.ones(megabytes << 18)
        return float(block[0])

    peak = peak_memory(call)
    if peak is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert megabytes - 1 <= peak / 2**20 < megabytes + 16  # the kernel adds up pages in batches: 95.84 was seen
