"""Compiles every Triton kernel for GPUs that need not be here, and keeps what each uses: `make triton-table` writes
benchmarks/results/triton/registers.json and docs/triton.md; python_tests/triton/test_ahead_of_time.py compares. CASES="words" for make: only the cases with one of them in their name.

A case is a call of an op on meta tensors, whose launches are recorded instead of made; each is compiled as it would be launched.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdfast.triton import (
    divergence,
    pairwise,
    relation,
    routing,
    selective,
    sinkhorn,
    sinkhorn_kd,
    softmin,
    token_graph,
)
from kdfast.triton.launch import Launch, recording

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "triton" / "registers.json"
PAGE = ROOT / "docs" / "triton.md"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}  # fmt: skip
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Of one kernel: registers of a thread, shared memory in bytes, spilled (bytes of a thread; registers on AMD), warps.
Use = dict[str, Any]


# ---------------------------------------------------------------- cases
def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def divergence_sum(kind: str, shape: tuple[int, ...], *, dtype: torch.dtype = torch.bfloat16, dim: int = -1, temperature: float = 2.0,
                   ce: float = 0.0, smoothing: float = 0.0, teacher: bool = False, weight: bool = True) -> Callable[[], Any]:  # fmt: skip
    dim %= len(shape)
    rows = shape[:dim] + shape[dim + 1 :]
    labels = meta(*rows, dtype=torch.int64) if ce or kind == "dkd" else None
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    row_weight = meta(*rows, dtype=compute) if weight else None
    return lambda: divergence.weighted_sum(
        meta(*shape, dtype=dtype), meta(*shape, dtype=dtype), labels, None, row_weight, kind, 0.3, 1.0, temperature, shape[dim],
        dim, 1.0, ce, smoothing, True, teacher,
    )  # fmt: skip


def divergence_rows(kind: str, shape: tuple[int, ...], dim: int = -1) -> Callable[[], Any]:
    dim %= len(shape)
    rows = shape[:dim] + shape[dim + 1 :]

    def call() -> None:
        student, teacher = meta(*shape), meta(*shape)
        row_temperature = meta(*rows, dtype=torch.float32)
        options = (kind, 0.3, 1.0, 1.0, shape[dim], dim)
        out, stats = divergence.rows(student, teacher, None, row_temperature, *options)
        divergence.rows_backward(out, student, teacher, stats, None, row_temperature, *options, True, True)

    return call


def selective_kl(shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32, normalizer: str = "valid", reliability: str = "label",
                 temperature: float = 1.0, both: bool = True) -> Callable[[], Any]:  # fmt: skip
    return lambda: selective.selective_kl(
        meta(*shape, dtype=dtype), meta(*shape, dtype=dtype), meta(shape[0], *shape[2:], dtype=torch.int64), temperature, 255,
        normalizer, reliability, 1.0, True, both,
    )  # fmt: skip


def routing_scores(rows: int, experts: int, k: int, score: str, *, norm: float, groups: int = 1) -> Callable[[], Any]:
    def call() -> None:
        logits = meta(rows, experts, dtype=torch.float32)
        bias = meta(experts, dtype=torch.float32) if groups > 1 else None
        options = (k, score, norm, 0.0, 2.5, groups, max(groups // 2, 1))
        _, weights, _, mean, lse, alive = routing.scores(logits, bias, None, False, *options)
        ids = meta(rows, k, dtype=torch.int32)
        routing.scores_backward(weights, mean, lse, logits, ids, lse, alive, *options)

    return call


def routing_plan(rows: int, k: int, experts: int, width: int, *, choice: bool = False) -> Callable[[], Any]:
    def call() -> None:
        ids = meta(rows, k, dtype=torch.int32)
        order, inverse, *_ = routing.plan(ids, None, experts, 64, 1024 if choice else 0, choice, False)
        x, weights = meta(rows, width), meta(rows, k, dtype=torch.float32)
        grouped = routing.gather(x, order, k)
        routing.combine(grouped, weights, inverse)
        routing.combine_backward(x, grouped, weights, inverse, order, True, True)

    return call


def pairwise_cost(n: int, m: int, width: int, p: int) -> Callable[[], Any]:
    def call() -> None:
        x, y = meta(1, n, width, dtype=torch.float32), meta(1, m, width, dtype=torch.float32)
        pairwise.cost_backward(pairwise.cost(x, y, p), x, y, p)

    return call


def pairwise_infonce(n: int, m: int, width: int) -> Callable[[], Any]:
    def call() -> None:
        x, y = meta(n, width, dtype=torch.float32), meta(m, width, dtype=torch.float32)
        positive = meta(n, dtype=torch.int64)
        rows, lse, _ = pairwise.infonce_rows(x, y, positive, 10.0, True, True)
        pairwise.infonce_rows_backward(rows, x, y, positive, lse, 10.0, True)

    return call


def relation_mse(sets: int, n: int, width: int, compare: str, *, mask: bool = False) -> Callable[[], Any]:
    x, weight = meta(sets, n, width, dtype=torch.float32), meta(sets, n, dtype=torch.float32)
    kept = meta(sets, n, dtype=torch.bool) if mask else None
    return lambda: relation.relation(x, x, kept, weight, compare, 0.0, 1.0, 0.05, 0.05, not mask, True, True)


def knn_graph(n: int, width: int, k: int) -> Callable[[], Any]:
    return lambda: token_graph.knn_graph(meta(n, width), meta(n, dtype=torch.float32), k, 1.0)


def token_graph_kl(n: int, width: int, k: int) -> Callable[[], Any]:
    def call() -> None:
        tokens, inverse = meta(n, width), meta(n, dtype=torch.float32)
        ends = meta(n * k, dtype=torch.int32), meta(n * k, dtype=torch.int32)
        weights = token_graph.edge_weights(tokens, inverse, *ends, 1.0)
        token_graph.edge_weights_backward(weights, weights, tokens, inverse, *ends, 1.0)
        rows = meta(n, dtype=torch.float32)
        token_graph.sparse_softmax_kl_backward(rows, *ends, weights, *ends, weights, n, False, True, True)

    return call


def transport(*shape: int, tol: float = -1.0) -> Callable[[], Any]:
    def call() -> None:
        cost = meta(*shape, dtype=torch.float32)
        a, b = meta(*shape[:-1], dtype=torch.float32), meta(*shape[:-2], shape[-1], dtype=torch.float32)
        options = (0.1, 2, True, 1.0, 1.0)
        _, plan, f, g, iterations, saved = sinkhorn.solve(cost, a, b, *options, tol, True, True)
        value = meta(*shape[:-2], dtype=torch.float32)
        sinkhorn.backward(cost, a, b, iterations, saved, value, plan, f, g, *options, False)

    return call


def point_softmin(n: int, m: int, width: int, dtype: torch.dtype) -> Callable[[], Any]:
    def call() -> None:
        x, y, h = meta(1, n, width, dtype=dtype), meta(1, m, width, dtype=dtype), meta(1, m, dtype=torch.float64)
        for mean in (False, True):  # a half-step; the transport cost
            s, c = softmin.softmin(x, y, h, 10.0, mean)
            softmin.softmin_backward(s, c if mean else None, x, y, h, s, c, 10.0, True, True, True)

    return call


def sinkhorn_kd_loss(*shape: int) -> Callable[[], Any]:
    return lambda: sinkhorn_kd.sinkhorn_kd(
        meta(*shape), meta(*shape), None, 2.0, 0.1, 2, 1, True, 1.0, False, True, False
    )


LONG, FEW, SHORT = (8192, 128256), (64, 262144), (65536, 1000)
KINDS = (
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "js",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    "alpha",
    "dkd",
    "binary",
)
CASES: dict[str, Callable[[], Any]] = {
    **{f"divergence sum, {kind}, 8192x128256": divergence_sum(kind, LONG) for kind in KINDS},
    "divergence sum, forward_kl, both gradients, 8192x128256": divergence_sum("forward_kl", LONG, teacher=True),
    "divergence sum, jeffreys, both gradients, 8192x128256": divergence_sum("jeffreys", LONG, teacher=True),
    "divergence sum, forward_kl and cross-entropy, 8192x128256": divergence_sum(
        "forward_kl", LONG, ce=0.5, smoothing=0.1
    ),
    "divergence sum, forward_kl, odd width, 8192x50257": divergence_sum("forward_kl", (8192, 50257)),
    "divergence sum, forward_kl, split, 64x262144": divergence_sum("forward_kl", FEW),
    "divergence sum, js, split, 64x262144": divergence_sum("js", FEW),
    "divergence sum, forward_kl, 65536x1000": divergence_sum("forward_kl", SHORT),
    "divergence sum, js, 65536x1000": divergence_sum("js", SHORT),
    "divergence sum, forward_kl, 16384x100": divergence_sum("forward_kl", (16384, 100)),
    "divergence sum, forward_kl, float32 maps, 8x19x512x1024": divergence_sum(
        "forward_kl", (8, 19, 512, 1024), dim=1, dtype=torch.float32
    ),
    "divergence sum, js, maps, 16x150x512x512": divergence_sum("js", (16, 150, 512, 512), dim=1),
    "divergence sum, forward_kl, maps, 2x4096x64x64": divergence_sum("forward_kl", (2, 4096, 64, 64), dim=1),
    "divergence sum, forward_kl, float16, 8192x128256": divergence_sum("forward_kl", LONG, dtype=torch.float16),
    "divergence sum, js, float64, 1024x32000": divergence_sum("js", (1024, 32000), dtype=torch.float64),
    "divergence sum, js, one row in two tiles' place, 8192x8000": divergence_sum("js", (8192, 8000)),
    "divergence rows, js, 8192x128256": divergence_rows("js", LONG),
    "divergence rows, forward_kl, 65536x1000": divergence_rows("forward_kl", SHORT),
    "divergence rows, forward_kl, split, 64x262144": divergence_rows("forward_kl", FEW),
    "selective, one gradient, 8x19x512x1024": selective_kl((8, 19, 512, 1024), both=False),
    "selective, both gradients, T = 4, 8x19x512x1024": selective_kl((8, 19, 512, 1024), temperature=4.0),
    "selective, selected, entropy, bfloat16, 16x150x512x512": selective_kl(
        (16, 150, 512, 512), dtype=torch.bfloat16, normalizer="selected", reliability="entropy"
    ),
    "selective, float16, 16x21x512x512": selective_kl((16, 21, 512, 512), dtype=torch.float16),
    "selective, several tiles, 2x1000x128x128": selective_kl(
        (2, 1000, 128, 128), temperature=2.0, reliability="entropy"
    ),
    "routing scores, sigmoid, 8 groups, 8192x256": routing_scores(8192, 256, 8, "sigmoid", norm=1.0, groups=8),
    "routing scores, softmax, 8192x128": routing_scores(8192, 128, 8, "softmax", norm=0.0),
    "routing plan and moves, 8192 rows of 7168": routing_plan(8192, 8, 256, 7168),
    "routing plan in choice order, 4096 rows of 1024": routing_plan(4096, 2, 64, 1024, choice=True),
    "pairwise cost, p = 1, 64 x 64 over 151936": pairwise_cost(64, 64, 151936, 1),
    "pairwise infonce, 2048 x 4096": pairwise_infonce(2048, 4096, 512),
    "relation, softmax, 64 sets of 197": relation_mse(64, 197, 384, "softmax"),
    "relation, gram, masked, 8 sets of 1024": relation_mse(8, 1024, 384, "gram", mask=True),
    "neighbours, k = 8, 4096 tokens of 384": knn_graph(4096, 384, 8),
    "token graph, edges and KL, 4096 tokens of 384": token_graph_kl(4096, 384, 8),
    "sinkhorn, two iterations with tol, 2048x2048": transport(2048, 2048, tol=1e-3),
    "softmin of points, 20000 x 20000 of 64": point_softmin(20000, 20000, 64, torch.float32),
    "softmin of points, 2048 x 2048 of 3": point_softmin(2048, 2048, 3, torch.float32),
    "softmin of points, bfloat16, 20000 x 20000 of 128": point_softmin(20000, 20000, 128, torch.bfloat16),
    "softmin of points, float64, 20000 x 5000 of 16": point_softmin(20000, 5000, 16, torch.float64),
    "sinkhorn_kd_loss, 64 x 64 over 151936": sinkhorn_kd_loss(64, 151936),
}


# ---------------------------------------------------------------- compilation
def source(launch: Launch) -> ASTSource:
    """The specialisation that a launch would get: sizes of 1 are constants, sizes and addresses of 16 are aligned."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            assert parameter.annotation_type, f"{parameter.name}: a float needs its type in the signature"
            signature[parameter.name] = parameter.annotation_type
        else:
            signature[parameter.name] = parameter.annotation_type or ("i32" if abs(value) < 2**31 else "i64")
            if special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    missing = set(launch.arguments) - {p.name for p in launch.kernel.params}
    assert not missing, f"{launch.kernel.__name__}: unknown arguments {missing}"
    return ASTSource(launch.kernel, signature, constants, attributes)


def compiled(launch: Launch, target: str) -> Any:
    return triton.compile(source(launch), target=TARGETS[target], options=launch.options | {"enable_fp_fusion": True})


def usage(launch: Launch, target: str) -> Use:
    kernel = compiled(launch, target)
    if target.startswith("sm"):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            text = subprocess.run(
                [CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
            ).stdout
        found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        registers, spilled = found["REG"], found["STACK"] + found["LOCAL"]
    else:
        found = {key: int(value) for key, value in re.findall(r"\.([sv]gpr\w*_count):\s+(\d+)", kernel.asm["amdgcn"])}
        registers, spilled = (
            found["vgpr_count"],
            found["vgpr_spill_count"],
        )  # scalar ones go to lanes of vector registers
    return {
        "kernel": launch.kernel.__name__, "registers": registers, "shared": kernel.metadata.shared, "spilled": spilled,
        "warps": launch.options["num_warps"],
    }  # fmt: skip


def uses(case: str, target: str) -> list[Use]:
    """What the launches of a case use, in their order."""
    with recording() as launches:
        CASES[case]()
    assert launches, f"{case}: launched nothing"
    return [usage(launch, target) for launch in launches]


# ---------------------------------------------------------------- the table and its page
def load() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def page(table: dict[str, Any]) -> str:
    lines = [
        INTRODUCTION.format(triton=table["triton"]).strip(),
        "",
        "| call | kernel | warps | " + " | ".join(TARGETS) + " |",
    ]
    lines.append("|---" * (3 + len(TARGETS)) + "|")
    for case, found in table["cases"].items():
        for i, first in enumerate(found["sm_90"]):
            cells = [
                f"{found[t][i]['registers']} / {found[t][i]['shared']} / {found[t][i]['spilled']}" for t in TARGETS
            ]
            lines.append(f"| {case} | `{first['kernel']}` | {first['warps']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


INTRODUCTION = """
# Triton kernels

GPU tensors go to the kernels in `kdfast/triton/`, one file per op beside `kdfast/ops/`: pure Python, no compiler at
installation, NVIDIA and AMD. `kdfast doctor` says whether this machine uses them, `backend="triton"` insists, and ops without a
kernel run the reference. They synchronise with nothing and use no atomics.

**They have not been measured yet.** No GPU was at hand: the kernels are checked under Triton's interpreter against the float64
reference, and by compiling them for four GPUs. So there is no speed here, only what can be counted.

| divergence | passes | bytes read and written for one pair of bf16 logits, loss and student gradient |
|---|---|---|
| rows of up to 8192 classes (4096 in float64), maps of up to 256 (128) | 1 | 6 |
| forward_kl, reverse_kl, jeffreys, alpha, dkd, binary | 2 | 10 |
| js, skew_forward_kl, skew_reverse_kl, tvd; alpha near 0 and 1 | 3 | 14 |
| rows that are kept: forward, and backward for any upstream gradient | 2 + 1 | 8 + 6 |

`selective_kl` reads both maps once up to 256 classes (8192 with the classes last; half in float64): 8 bytes of a float32 logit pair, 4 written for
each gradient, and the labels once more to know by what to divide; `normalizer="selected"` reads the maps twice. Beyond 256
classes: three times. Routing scores read the logits once, a plan takes five launches (eight in choice order), dispatch and
combine read and write each row of the model once. The grouped products of the experts are torch's `grouped_mm`
in bfloat16 with widths that are multiples of 8; what it cannot take runs the reference, which waits for the counts.

`sinkhorn` and `sinkhorn_cost` solve a problem of up to 16384 entries (4096 in float64; sides rounded up to powers of two) in one
launch, and differentiate it in one, several tiny problems to a program: the cost is read twice, whatever n_iters is. Half-steps are
products with exp(-C / epsilon + references) in registers; an iteration whose potentials leave the references' range is done with
exponentials and a maximum. From 64 x 128 on registers spill on sm_90 (up to 88 bytes of a thread there, 376 at 128 x 128), and below it where a gradient
comes through the plan at 64 x 64 (16 bytes) or in float64 (about 250): one launch with spills instead of 2 n_iters without. Larger problems take two launches an iteration, each a read of the cost, which stays in L2 up to some 20 MB; the
reverse as many, and one that makes the cost's gradient from the n_iters (N + M) numbers that arrive at the half-steps. `tol`
freezes problems on the device: their programs return at once. `sinkhorn_kd_loss` is one op, softened rows, `pairwise_cost`, transport
and back. `update="average"`, `reg_type="kl"` and an epsilon per iteration run the reference, which says so.

`sinkhorn_cost_points`, and `sinkhorn_divergence` with p = 2 and up to 128 coordinates, have no table of costs: a half-step is one launch
of `softmin_kernel`, whose tiles make the squared distances from the points with `tl.dot`. It reads the points and one float64
potential of each, and writes the other side's potentials. Float32 points are multiplied without TF32, less the first of y, so that a
distance is good to some 1e-7 of the largest; 16-bit points go to the tensor cores as they are. The reverse of a half-step is a launch
for each side, together four products where the half-step has one: exact through all iterations, or with `grad="envelope"` for the
last one alone. Every `update`, `reg_type` and schedule of epsilon runs here, since the iterations are torch's on N + M potentials;
`tol` freezes problems and saves no work. While a table fits into the L2 cache, or with hundreds of coordinates, `sinkhorn_cost` of
`pairwise_cost` has less to do.

Token graphs hold no n x n matrix: one kernel makes the products of centred tokens tile by tile and keeps the 2k best candidates of
each token in registers, a second ranks them by exact distances and proves the choice (a token without proof looks at all). The
products use no TF32: the proof lives on their error bound. Gradients are gathered over each token's edges, put in order on the
device. Costs of all pairs walk the columns in tiles of pairs (L1 and its sign gradient, squared distances; `pairwise_mmd` through
them); InfoNCE and relations are torch's products on a block of rows that stays in the L2 cache, which one kernel turns into
rows and, in place, into gradients. These products are float32 unless the program allowed torch less
(`torch.set_float32_matmul_precision`).

`make test-triton` runs both checks, in two processes: a kernel defined under the interpreter cannot be compiled. The tests that
need a GPU, a CUDA graph among them, are in `python_tests/gpu` and `python_tests/triton/test_on_a_gpu.py`; they skip without one.

## What each kernel uses
Registers of a thread / shared memory in bytes / spilled (bytes of a thread; registers on gfx942), compiled by Triton {triton} for
the shapes named. Generated by `make triton-table` from `benchmarks/results/triton/registers.json`. CI compiles them again, and an
increase of spills is red.
"""


def main(*words: str) -> None:
    """All cases, or those whose name has one of the words, and what the table lacks."""
    table: dict[str, Any] = {"triton": triton.__version__, "cases": {}}
    kept = load()["cases"] if words else {}
    for case in CASES:
        if case in kept and not any(word in case for word in words):
            table["cases"][case] = kept[case]
            continue
        table["cases"][case] = {target: uses(case, target) for target in TARGETS}
        print(
            case,
            {t: [(u["registers"], u["spilled"]) for u in found] for t, found in table["cases"][case].items()},
            flush=True,
        )
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    PAGE.write_text(page(table))


if __name__ == "__main__":
    main(*sys.argv[1:])
