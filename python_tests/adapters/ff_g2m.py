"""Vectors of ff_g2m: the labels' term, both terms over given edges, their total."""

from kdfast.methods.ff_g2m import (
    EdgeTargets,
    ff_g2m_loss,
    high_frequency_kd,
    low_frequency_kd,
    prepare_high,
    prepare_low,
)


def run(inputs, params):
    s, t = inputs["student_logits"], inputs["teacher_logits"]
    tau, tau_low, lam = params.get("tau", 1.5), params.get("tau_low", 1.0), params.get("lambda", 0.1)
    normalise = params.get("normalise", "edge")
    with_loops, without = inputs["edge_index_with_self_loops"], inputs["edge_index_no_loops"]
    low = low_frequency_kd(s, t, with_loops, tau_low=tau_low, normalise=normalise)
    high = high_frequency_kd(s, t, without, tau=tau, normalise=normalise)
    targets = EdgeTargets(
        prepare_low(t, with_loops, tau_low=tau_low, normalise=normalise), prepare_high(t, without, normalise=normalise)
    )
    given = s, targets, inputs["labels"], inputs.get("train_index")
    total = ff_g2m_loss(*given, tau=tau, tau_low=tau_low, lam=lam).loss
    nll = ff_g2m_loss(s, EdgeTargets(None, None), *given[2:], lam=1.0).loss
    return {"label_nll": nll, "low_frequency": low, "high_frequency": high, "total": total}
