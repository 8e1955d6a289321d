"""Kernels of `kdfast.triton.routing`: plans by a counting sort without atomics, and the moves of rows that they allow.

A plan takes four launches (choice order: seven): a histogram per block of slots, its scan over the blocks, the offsets of the
experts, and the ranks inside each block, which give every slot its place.
"""

import triton
import triton.language as tl


# ---------------------------------------------------------------- plans
@triton.jit
def visited(rows, k, slots, B: tl.constexpr, CHOICE: tl.constexpr):
    """The slots this program visits: in slot order, or all first choices, then all second."""
    t = tl.program_id(0) * B + tl.arange(0, B)
    inside = t < slots
    return ((t % rows) * k + t // rows if CHOICE else t), inside


@triton.jit
def expert_of(ids, keep, slot, inside, experts):
    """The slot's expert; `experts` where it is dropped. An id out of range is dropped: it never is an address."""
    id_ = tl.load(ids + slot, mask=inside, other=-1)
    valid = (id_ >= 0) & (id_ < experts)
    if keep is not None:
        valid = valid & (tl.load(keep + slot, mask=inside, other=0) != 0)
    return tl.where(valid, id_, experts).to(tl.int32)


@triton.jit
def histogram_kernel(
    ids, keep, blocks, rows, k, slots, experts, CHOICE: tl.constexpr, B: tl.constexpr, E: tl.constexpr
):
    """Slots per expert of one block, [blocks, experts]."""
    slot, inside = visited(rows, k, slots, B, CHOICE)
    found = tl.histogram(expert_of(ids, keep, slot, inside, experts), E)
    columns = tl.arange(0, E)
    tl.store(blocks + tl.program_id(0).to(tl.int64) * experts + columns, found, mask=columns < experts)


@triton.jit
def scan_kernel(blocks, totals, n, experts, P: tl.constexpr, E: tl.constexpr):
    """In place: slots of an expert in the blocks before each; and in all of them."""
    columns = tl.program_id(0) * E + tl.arange(0, E)
    before = tl.zeros([E], tl.int32)
    for start in range(0, n, P):
        block = start + tl.arange(0, P)
        at = blocks + block.to(tl.int64)[:, None] * experts + columns[None, :]
        here = (block < n)[:, None] & (columns < experts)[None, :]
        found = tl.load(at, mask=here, other=0)
        tl.store(at, tl.cumsum(found, 0) - found + before[None, :], mask=here)
        before += tl.sum(found, 0)
    tl.store(totals + columns, before, mask=columns < experts)


@triton.jit
def offsets_kernel(totals, counts, offsets, padded_offsets, experts, capacity, block, E: tl.constexpr):
    """Kept slots per expert, and where each expert's rows begin, plain and padded to blocks."""
    columns = tl.arange(0, E)
    here = columns < experts
    count = tl.load(totals + columns, mask=here, other=0)
    if capacity is not None:
        count = tl.minimum(count, capacity)
    padded = (count + block - 1) // block * block
    tl.store(counts + columns, count, mask=here)
    tl.store(offsets + 1 + columns, tl.cumsum(count, 0), mask=here)
    tl.store(padded_offsets + 1 + columns, tl.cumsum(padded, 0), mask=here)
    tl.store(offsets, 0)
    tl.store(padded_offsets, 0)


@triton.jit
def block_experts_kernel(padded_offsets, block_expert, n, block, experts, B: tl.constexpr, E: tl.constexpr):
    """The expert of each block of padded rows: as many experts end before it."""
    b = tl.program_id(0) * B + tl.arange(0, B)
    columns = tl.arange(0, E)
    ends = tl.load(padded_offsets + 1 + columns, mask=columns < experts, other=2147483647)
    first = b * block
    expert = tl.sum((ends[None, :] <= first[:, None]).to(tl.int32), 1)
    tl.store(block_expert + b, tl.where(first < tl.load(padded_offsets + experts), expert, -1), mask=b < n)


@triton.jit
def place_kernel(
    ids, keep, before, offsets, padded_offsets, position, kept, order, inverse, row_slot, rows, k, slots, experts, capacity,
    CHOICE: tl.constexpr, POSITION: tl.constexpr, PLACE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """POSITION: the rank of each slot inside its expert, and whether the capacity keeps it. PLACE: its grouped row."""
    slot, inside = visited(rows, k, slots, B, CHOICE)
    expert = expert_of(ids, keep, slot, inside, experts)
    valid = inside & (expert < experts)
    t = tl.arange(0, B)
    block_start = before + tl.program_id(0).to(tl.int64) * experts
    same = (expert[None, :] == expert[:, None]) & (t[None, :] < t[:, None])  # earlier slots of the same expert
    rank = tl.sum(same.to(tl.int32), 1) + tl.load(block_start + expert, mask=valid, other=0)
    stays = valid
    if capacity is not None:
        stays = valid & (rank < capacity)
    if POSITION:
        tl.store(position + slot, tl.where(valid, rank, -1), mask=inside)
        if not PLACE:
            tl.store(kept + slot, stays.to(tl.int8), mask=inside)
    if PLACE:
        row = tl.load(offsets + expert, mask=stays, other=0) + rank
        padded = tl.load(padded_offsets + expert, mask=stays, other=0) + rank
        tl.store(inverse + slot, tl.where(stays, row, -1), mask=inside)
        tl.store(order + row, slot, mask=stays)
        tl.store(row_slot + padded, slot, mask=stays)


# ---------------------------------------------------------------- moves of rows
# A row's index is loaded as a block of one, so that masks made from it are blocks too.
@triton.jit
def gather_kernel(x, order, out, k, width, tiles, B: tl.constexpr):
    """Part of grouped row r: x[order_r // k], zero past the last kept slot."""
    program = tl.program_id(0)
    r = program // tiles + tl.zeros([1], tl.int32)
    columns = program % tiles * B + tl.arange(0, B)
    slot = tl.load(order + r)
    here = columns < width
    value = tl.load(x + (slot // k).to(tl.int64) * width + columns, mask=here & (slot >= 0), other=0.0)
    tl.store(out + r.to(tl.int64) * width + columns, value, mask=here)


@triton.jit
def combine_kernel(rows, weights, inverse, out, k, width, tiles, DTYPE: tl.constexpr, B: tl.constexpr):
    """Part of y_n: the k rows of its slots, in slot order, in float32 or wider."""
    program = tl.program_id(0)
    n = (program // tiles + tl.zeros([1], tl.int32)).to(tl.int64)
    columns = program % tiles * B + tl.arange(0, B)
    here = columns < width
    total = tl.zeros([B], DTYPE)
    for j in range(0, k):
        r = tl.load(inverse + n * k + j)
        term = tl.load(rows + r.to(tl.int64) * width + columns, mask=here & (r >= 0), other=0.0).to(DTYPE)
        if weights is not None:
            # a dropped slot counts nothing, whatever its weight
            term = term * tl.load(weights + n * k + j, mask=r >= 0, other=0.0)
        total += term
    tl.store(out + n * width + columns, total.to(out.dtype.element_ty), mask=here)


@triton.jit
def combine_backward_kernel(
    grad, rows, weights, order, grad_rows, grad_weights, k, width, DTYPE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Grouped row r of slot (n, j): drows_r = w_nj dy_n and dw_nj = <dy_n, rows_r>; zero past the last kept slot."""
    r = (tl.program_id(0) + tl.zeros([1], tl.int32)).to(tl.int64)
    slot = tl.load(order + r)
    kept = slot >= 0
    w = tl.full([1], 1.0, DTYPE)
    if weights is not None:
        w = tl.load(weights + slot, mask=kept, other=0.0)
    dot = tl.zeros([B], DTYPE)
    for start in range(0, width, B):
        columns = start + tl.arange(0, B)
        here = columns < width
        dy = tl.load(grad + (slot // k).to(tl.int64) * width + columns, mask=here & kept, other=0.0).to(DTYPE)
        if grad_rows is not None:
            tl.store(grad_rows + r * width + columns, (w * dy).to(grad_rows.dtype.element_ty), mask=here)
        if grad_weights is not None:
            dot += dy * tl.load(rows + r * width + columns, mask=here & kept, other=0.0).to(DTYPE)
    if grad_weights is not None:
        tl.store(grad_weights + slot, tl.sum(dot, 0) + tl.zeros([1], DTYPE), mask=kept)
