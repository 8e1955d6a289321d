"""Integers to bytes: 16-bit frequency tables, rANS, and an escape for integers that no table holds. Plain Python, exact.

A table is a list of n + 2 edges 0 = c_0 < ... < c_{n+1} = 2^16: the symbols 0 .. n - 1, then the escape symbol. An integer v outside is
the escape symbol followed by r = -2v - 1 (v < 0) or 2 (v - n): the number of its 4-bit digits, in steps of 15 as long as a
step is 15, then the digits, lowest first, each of 1/16 probability.

rANS (J. Duda, arXiv:1311.2540) with a state in [2^23, 2^31) that gives its low bytes away:
    x -> (x // f) 2^16 + x mod f + c      codes a symbol of the interval [c, c + f); the decoder undoes it, last symbol first.
A stream is the final state in four bytes and the bytes given away; a decoder that ends anywhere but at the first state has
read something else than was written.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

PRECISION, DIGIT = 16, 4
ONE, LOW = 1 << PRECISION, 1 << 23
LAST_DIGIT = (1 << DIGIT) - 1


def quantize_pmf(pmf: Sequence[float]) -> list[int]:
    """Edges [len(pmf) + 1] of probabilities rounded to multiples of 2^-16, none of them 0: what is missing is taken, a unit at a time, from
    the narrowest symbol that is wider than one unit, the first of such.

    >>> quantize_pmf([0.5, 0.25, 0.0])
    [0, 43690, 65535, 65536]
    """
    if not 0 < len(pmf) <= ONE:
        raise ValueError(f"pmf: expected 1 to {ONE} symbols, got {len(pmf)}")
    if not all(0 <= p < math.inf for p in pmf):
        raise ValueError("pmf: expected finite probabilities, not below 0")
    counts = [math.floor(p * ONE + 0.5) for p in pmf]
    total = sum(counts)
    if total == 0:
        raise ValueError("pmf: expected some probability, all of them are 0")
    edges = [0, *accumulate((count << PRECISION) // total for count in counts)]
    edges[-1] = ONE
    for i in range(len(pmf)):
        if edges[i] < edges[i + 1]:
            continue
        widths = ((after - before, k) for k, (before, after) in enumerate(pairwise(edges)))
        giver = min((width, k) for width, k in widths if width > 1)[1]
        between, step = (range(giver + 1, i + 1), -1) if giver < i else (range(i + 1, giver + 1), 1)
        for k in between:
            edges[k] += step
    return edges


def encode(symbols: Iterable[int], tables: Iterable[Sequence[int]]) -> bytes:
    """The stream of integers, each with its own table."""
    intervals: list[tuple[int, int]] = []  # (start, width) of what is coded, in order
    for symbol, edges in zip(symbols, tables, strict=True):
        escape = len(edges) - 2
        inside = 0 <= symbol < escape
        k = symbol if inside else escape
        intervals.append((edges[k], edges[k + 1] - edges[k]))
        if not inside:
            rest = -2 * symbol - 1 if symbol < 0 else 2 * (symbol - escape)
            digits = -(-rest.bit_length() // DIGIT)
            steps = [LAST_DIGIT] * (digits // LAST_DIGIT) + [digits % LAST_DIGIT]
            values = [*steps, *((rest >> (DIGIT * i)) & LAST_DIGIT for i in range(digits))]
            intervals += [(value << (PRECISION - DIGIT), 1 << (PRECISION - DIGIT)) for value in values]
    state, out = LOW, bytearray()
    for start, width in reversed(intervals):
        while state >= width << 15:  # (LOW / 2^16) 2^8 width: the next state would reach 2^31
            out.append(state & 255)
            state >>= 8
        state = (state // width << PRECISION) + state % width + start
    out += state.to_bytes(4, "little")
    return bytes(reversed(out))


def decode(stream: bytes, tables: Iterable[Sequence[int]]) -> list[int]:
    """The integers of a stream, one for each table; ValueError when the stream holds anything else."""
    reader = _Reader(stream)
    symbols = []
    for edges in tables:
        k, escape = reader.take(edges), len(edges) - 2
        if k == escape:
            digits = step = reader.take(_DIGITS)
            while step == LAST_DIGIT:
                step = reader.take(_DIGITS)
                digits += step
            rest = sum(reader.take(_DIGITS) << (DIGIT * i) for i in range(digits))
            k = -((rest + 1) >> 1) if rest & 1 else escape + (rest >> 1)
        symbols.append(k)
    if reader.state != LOW or reader.at != len(stream):
        raise _wrong()
    return symbols


_DIGITS = range(0, ONE + 1, 1 << (PRECISION - DIGIT))  # the table of a digit


class _Reader:
    def __init__(self, stream: bytes) -> None:
        if len(stream) < 4:
            raise _wrong()
        self.stream, self.at, self.state = stream, 4, int.from_bytes(stream[:4], "big")

    def take(self, edges: Sequence[int]) -> int:
        """The next symbol of a table."""
        low = self.state & (ONE - 1)
        k = bisect_right(edges, low) - 1
        self.state = (edges[k + 1] - edges[k]) * (self.state >> PRECISION) + low - edges[k]
        while self.state < LOW:
            if self.at == len(self.stream):
                raise _wrong()
            self.state = self.state << 8 | self.stream[self.at]
            self.at += 1
        return k


def _wrong() -> ValueError:
    return ValueError("strings, shape: the stream does not hold as many integers of these tables; it was written with another shape or table")  # fmt: skip
