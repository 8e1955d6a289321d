"""One rank of test_expert_parallel.py: a shared-out layer against the whole one, which every rank computes too."""

import copy
import sys

import torch
import torch.distributed as dist

from kdfast.nn import SparseMoE, expert_parallel, expert_parameter_names


def close(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}")


def compare(rank: int, world: int, mask_of_last: bool, **options) -> None:
    torch.manual_seed(0)
    whole = SparseMoE(6, 10, num_experts=8, top_k=2, z_weight=0.1, balance_weight=0.5, **options).double().train()
    layer = expert_parallel(copy.deepcopy(whole), sync_stats=True)
    assert layer.w1.shape[0] == 8 // world
    rows = torch.randn(world, 7, 6, dtype=torch.float64)
    factor = torch.randn(world, 7, 6, dtype=torch.float64)
    mask = torch.ones(world, 7, dtype=torch.bool)
    if mask_of_last:  # a rank without a row still takes part
        mask[-1] = False

    x = rows.clone().requires_grad_()
    y = whole(x, mask=mask)
    z_losses = []
    for r in range(world):  # the z loss is a mean over each rank's rows
        whole_z = copy.deepcopy(whole)
        whole_z(x[r].detach(), mask=mask[r])
        z_losses.append(whole_z.aux_parts["z"])
    logits = torch.nn.functional.linear(x, whole.gate.weight, whole.gate.bias).logsumexp(-1).square()
    z_term = sum((logits[r] * mask[r]).sum() / mask[r].sum().clamp_min(1) for r in range(world)) / world
    balance = whole.aux_loss - 0.1 * (logits * mask).sum() / mask.sum()
    total = (y * factor).sum() / world + balance + 0.1 * z_term
    total.backward()

    own = rows[rank].clone().requires_grad_()
    y_own = layer(own, mask=mask[rank])
    close("y", y_own, y[rank].detach())
    close("balance", layer.aux_parts["balance"], whole.aux_parts["balance"])
    close("z", layer.aux_parts["z"], z_losses[rank])
    ((y_own * factor[rank]).sum() + layer.aux_loss).backward()
    close("x", own.grad, world * x.grad[rank])
    share = 8 // world
    assert expert_parameter_names(layer) == [n for n in ("w1", "b1", "w2", "b2", "w3") if getattr(layer, n) is not None]
    for name, parameter in layer.named_parameters():
        want = dict(whole.named_parameters())[name].grad
        if name in expert_parameter_names(layer):
            close(name, parameter.grad, want[rank * share : (rank + 1) * share])
        else:
            mean = parameter.grad.clone()
            dist.all_reduce(mean)
            close(name, mean / world, want)


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for options in (
        {},
        {"gated": True, "activation": "silu"},
        {"balance": "uniform_kl", "num_shared": 1, "bias": False},
    ):
        for mask_of_last in (False, True):
            compare(rank, world, mask_of_last, **options)
    for bad, text in (
        (dict(num_experts=9), "multiple of the"),
        (dict(num_experts=8, balance="first_choice"), "sync_stats"),
    ):
        try:
            expert_parallel(SparseMoE(4, 4, top_k=2, **bad), sync_stats=True)
        except ValueError as error:
            assert text in str(error)
        else:
            raise AssertionError(f"{bad} was accepted")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.exit(0)
