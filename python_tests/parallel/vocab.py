"""One rank of the vocabulary-parallel test: vocab.py <out>, with torchrun's variables. Runs every case on its slice of the heads."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
from kdfast.losses import SampledTeacher, TopKTeacher, linear_distillation_loss
from kdfast.ops import linear_chunks
from kdfast.ops.vocab_parallel import SPLIT_KINDS

N, D, DT, V = 9, 6, 7, 22


def data(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    labels = torch.randint(V - 3, (N,), generator=g)
    labels[2] = labels[7] = -100
    return draw(N, D), draw(V, D), draw(V), draw(N, DT), draw(V, DT), draw(V), labels


def listed(teacher_hidden, teacher_weight, temperature):
    log_probs = (teacher_hidden @ teacher_weight.T / temperature).log_softmax(-1)
    top, ids = log_probs.topk(4, -1)
    tokens = torch.multinomial(log_probs.exp(), 6, True, generator=torch.Generator().manual_seed(1))
    return TopKTeacher(ids, top, None, temperature), SampledTeacher(tokens, None, temperature)


def cases():
    """name -> (source of the teacher, options)"""
    found = {}
    for kind in SPLIT_KINDS:
        for beta in (0.3,) if kind in ("forward_kl", "reverse_kl", "tvd", "binary") else (0.3, 0.0, 1.0):
            found[f"{kind} {beta}"] = ("hidden", {"kind": kind, "beta": beta})
    found |= {
        "temperature": ("hidden", {"kind": "js", "temperature": 2.0}),
        "reverse, temperature": ("hidden", {"kind": "reverse_kl", "temperature": 2.0}),
        "rows": ("hidden", {"kind": "reverse_kl", "reduction": "none"}),
        "rows of js": ("hidden", {"kind": "js", "reduction": "none"}),
        "cap": ("hidden", {"kind": "alpha", "beta": 0.5, "softcap": 3.0, "logit_scale": 0.7}),
        "teacher": ("hidden", {"kind": "js", "teacher_grad": True}),
        "teacher of forward": ("hidden", {"kind": "forward_kl", "teacher_grad": True}),
        "vocab_size": ("hidden", {"kind": "tvd", "vocab_size": V - 3}),
        "vocab_size, logits": ("logits", {"kind": "js", "vocab_size": V - 3, "teacher_grad": True}),
        "a rank without classes": ("hidden", {"kind": "js", "vocab_size": V // 4, "ce_weight": 0.0}),
        "ce alone": ("hidden", {"kd_weight": 0.0}),
        "logits": ("logits", {"kind": "skew_forward_kl", "beta": 0.1, "teacher_grad": True}),
        "top-k": ("top-k", {"kind": "reverse_kl", "temperature": 2.0}),
        "top-k js": ("top-k", {"kind": "js", "reduction": "none", "temperature": 2.0}),
        "sampled": ("sampled", {"temperature": 2.0}),
    }
    return found


def run(source, options, rank=0, world=1, group=None, dtype=torch.float64):
    """Loss, parts, gradients; those of head slices come back as slices."""
    h, w, b, ht, wt, bt, labels = data(dtype)
    ends = [round(V * i / world) for i in range(world + 1)]
    if world > 1:
        ends[1] -= 1  # slices of different sizes
    at = slice(ends[rank], ends[rank + 1])
    h, ht = h.requires_grad_(), ht.requires_grad_()
    w, b, wt, bt = (t[at].clone().requires_grad_() for t in (w, b, wt, bt))
    leaves = [h, w, b]
    extra = {"student_bias": b}
    if source == "hidden":
        teacher, extra = ht, extra | {"teacher_weight": wt, "teacher_bias": bt}
        if options.get("teacher_grad"):
            leaves += [ht, wt, bt]
    elif source == "logits":
        full = data(dtype)
        teacher = (full[3] @ full[4].T)[:, at].clone().requires_grad_()
        leaves.append(teacher)
    else:
        full = data(dtype)
        teacher = listed(full[3], full[4], options["temperature"])[source == "sampled"]
    out = linear_distillation_loss(h, w, teacher, labels, **extra, chunk_rows=4, process_group=group, **options)
    upstream = (
        torch.linspace(0.5, 2.0, N, dtype=out.loss.dtype) if out.loss.dim() else torch.tensor(1.7, dtype=out.loss.dtype)
    )
    grads = torch.autograd.grad(out.loss, leaves, upstream)
    return {
        "loss": out.loss.detach(),
        "kd": out.parts["kd"],
        "ce": out.parts["ce"],
        **{f"grad {i}": g for i, g in enumerate(grads)},
    }


def by_default_chunks(rank, world, group):
    """Rows enough for several chunks of the default size, which for 10 classes would be of 32 rows and for 12 of 16."""
    before, linear_chunks.CHUNK_BYTES = linear_chunks.CHUNK_BYTES, 4 * 10 * 32
    h, w, *_, labels = data()
    h, labels = h.repeat(6, 1), labels.repeat(6)
    ends = [round(V * i / world) - (i == 1 and world > 1) for i in range(world + 1)]
    part = w[ends[rank] : ends[rank + 1]]
    try:
        return linear_distillation_loss(h, part, h.flip(1), labels, teacher_weight=part, process_group=group).loss
    finally:
        linear_chunks.CHUNK_BYTES = before


def raises(rank, group):
    """Heads of two sizes on one rank: every rank says so instead of waiting for the others."""
    h, w, *_, labels = data()
    wt = torch.randn(len(w) + rank, D, dtype=torch.float64)
    try:
        linear_distillation_loss(h, w, h, labels, teacher_weight=wt, process_group=group)
    except ValueError as error:
        return str(error)
    return "no error"


def raises_for_a_learned_weight(group):
    h, w, *_, labels = data()
    weight = torch.ones(N, dtype=torch.float64, requires_grad=True)
    try:
        linear_distillation_loss(h, w, h, labels, teacher_weight=w, weight=weight, process_group=group)
    except ValueError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    results = {name: run(source, options, rank, world, group) for name, (source, options) in cases().items()}
    results["bf16"] = run("hidden", {"kind": "js"}, rank, world, group, torch.bfloat16)
    with torch.no_grad():
        h, w, *_, labels = data()
        part = w.tensor_split(world)[rank]
        silent = linear_distillation_loss(
            h, part, h, labels, teacher_weight=part, process_group=group, ce_weight=1.0
        ).loss
        assert not silent.requires_grad
        F.cross_entropy(h @ w.T, labels)
    found = {"results": results, "by default": by_default_chunks(rank, world, group), "error": raises(rank, group)}
    found["error of a weight"] = raises_for_a_learned_weight(group)
    torch.save(found, f"{sys.argv[1]}/rank-{rank}.pt")
    dist.destroy_process_group()
