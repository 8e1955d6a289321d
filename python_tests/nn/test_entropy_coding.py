"""rANS and its tables: closed forms, round trips at the cost that the tables promise, streams that hold something else."""

import math
import random
from itertools import pairwise

import pytest

from kdfast.nn.entropy_coding import LOW, decode, encode, quantize_pmf


def test_tables_by_hand():
    assert quantize_pmf([1.0]) == [0, 65536]
    assert quantize_pmf([0.25, 0.75]) == [0, 16384, 65536]
    assert quantize_pmf([0.5, 0.25, 0.0]) == [0, 43690, 65535, 65536]  # the last edge is set: nothing was missing
    # an empty bin takes its unit from the narrowest that can give: here from the right, and from the left
    assert quantize_pmf([0.0, 0.25, 0.75]) == [0, 1, 16384, 65536]
    assert quantize_pmf([0.75, 0.25, 0.0, 0.0]) == [0, 49152, 65534, 65535, 65536]
    # equal givers: the first
    assert quantize_pmf([0.5, 0.0, 0.5]) == [0, 32767, 32768, 65536]


def test_tables_are_strictly_increasing():
    draw = random.Random(0)
    for symbols in (1, 2, 40, 3000):
        edges = quantize_pmf([draw.random() ** 40 for _ in range(symbols)])
        assert edges[0] == 0 and edges[-1] == 65536 and len(edges) == symbols + 1
        assert all(a < b for a, b in pairwise(edges))


def test_round_trip_with_escapes_and_extreme_integers():
    table = quantize_pmf([0.6, 0.3, 0.05, 0.05])  # symbols 0, 1, 2 and the escape
    far = [10**6, -(10**6), 2**70, -(2**70), 10**38, 3, -1, 4, -2]
    symbols = [0, 1, 2, *far, 0, 2]
    stream = encode(symbols, [table] * len(symbols))
    assert decode(stream, [table] * len(symbols)) == symbols
    assert decode(encode([], []), []) == [] and len(encode([], [])) == 4


def test_round_trip_with_a_table_for_each_symbol():
    draw = random.Random(1)
    tables = [quantize_pmf([draw.random() for _ in range(draw.randint(1, 30))]) for _ in range(500)]
    symbols = [draw.randint(-5, len(table) + 5) for table in tables]
    assert decode(encode(symbols, tables), tables) == symbols


def test_the_length_is_that_of_the_tables():
    draw = random.Random(2)
    pmf = [2.0 ** -(i + 1) for i in range(12)]
    table = quantize_pmf(pmf)
    symbols = draw.choices(range(11), pmf[:11], k=5000)
    bits = sum(-math.log2((table[s + 1] - table[s]) / 65536) for s in symbols)
    assert bits <= 8 * len(encode(symbols, [table] * 5000)) <= 1.001 * bits + 32
    certain = [0, 65535, 65536]
    assert len(encode([0] * 1000, [certain] * 1000)) == 4


def test_another_shape_or_table_is_seen():
    table, other = quantize_pmf([0.5, 0.25, 0.25]), quantize_pmf([0.2, 0.2, 0.6])
    stream = encode([0, 1, 1, 0, 7], [table] * 5)
    for wrong, tables in (
        (stream, [table] * 4), (stream, [table] * 6), (stream, [other] * 5), (stream[:-1], [table] * 5), (stream + b"\0", [table] * 5),
        (b"", []), (b"\0\0\0", [table]), (LOW.to_bytes(4, "big"), [table]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="strings, shape: the stream does not hold"):
            decode(wrong, tables)


def test_bad_tables():
    for pmf, message in (
        ([], "expected 1 to 65536 symbols, got 0"), ([1e-9] * 65537, "got 65537"), ([0.0, 0.0], "all of them are 0"),
        ([0.5, -0.1], "not below 0"), ([float("nan")], "finite"), ([float("inf")], "finite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"pmf: .*{message}"):
            quantize_pmf(pmf)
