"""Vectors of mst_distill: stage 3 with a vector or a dense gate, or a feature mask in evaluation mode."""

from torch.func import functional_call

from kdfast.methods.mst_distill import GateNet, balance_loss, mst_loss, route
from kdfast.nn import FeatureMask


def run(inputs, params):
    return mask(inputs, params) if "x" in inputs else stage3(inputs, params)


def stage3(inputs, params):
    student, teachers, target = (inputs[name] for name in ("student_logits", "teacher_logits", "target"))
    names = [name for name in inputs if name.split(".")[0] in ("fc1", "fc2", "fc", "conv_point", "conv_depthwise")]
    net = GateNet(student.shape[1], len(teachers), dense=student.dim() == 4).double()
    for part in ("conv_point", "conv_depthwise"):
        if hasattr(net, part) and f"{part}.bias" not in inputs:
            getattr(net, part).bias = None
    gate = functional_call(net, {name: inputs[name] for name in names}, (student,))
    top_k, mode = params.get("k", 1), params.get("lb_mode", "KL")
    balance = None if mode is None else mode.lower()
    options = {"top_k": top_k, "balance": balance, "temperature": params.get("temperature", 4.0)}
    weights = {
        "w_task": params.get("w_task", 1.0),
        "w_kl": params.get("w_kl", 1.0),
        "w_balance": params.get("w_lb", 1.0),
    }

    def total(**changed):
        return mst_loss(
            student, teachers, gate, target, **options, **{name: float(w) for name, w in (weights | changed).items()}
        ).loss

    none = dict.fromkeys(weights, 0.0)
    probs = gate.softmax(-1)
    return {
        "gate_probs": probs,
        "topk_index": route(gate, top_k),
        "balance_loss": balance_loss(probs, balance),
        "distill_loss": total(**none | {"w_kl": 1.0}),
        "task_loss": total(**none | {"w_task": 1.0}),
        "total": total(),
    }


def mask(inputs, params):
    x = inputs["x"]
    maps = x.dim() == 4 and "conv_depthwise.weight" in inputs
    net = (
        FeatureMask(x.shape[1], heads=params.get("num_heads", 3), hidden=params.get("hidden_dim"), spatial=maps)
        .double()
        .eval()
    )
    ours = {
        "conv_depthwise.weight": "reduce.0.weight",
        "conv_point.weight": "reduce.1.weight",
        "bn.weight": "reduce.2.weight",
        "bn.bias": "reduce.2.bias",
    }
    given = {
        ours.get(name, name): value
        for name, value in inputs.items()
        if ours.get(name, name) in dict(net.named_parameters())
    }
    return {
        "mask": functional_call(net, given, (x,)),
        "masked_feature": functional_call(Masked(net), {f"mask.{name}": value for name, value in given.items()}, (x,)),
    }


class Masked(FeatureMask):
    """The masked feature instead of the mask."""

    def __init__(self, mask):
        super(FeatureMask, self).__init__()
        self.mask = mask

    def forward(self, x):
        return self.mask.apply_to(x)
