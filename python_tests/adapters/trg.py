"""Vectors of trg: the local, global and contextual terms, and their total over sampled tokens."""

import torch.nn.functional as F

from kdfast.losses import token_context_loss, token_contrast_loss, token_graph_loss
from kdfast.methods.trg import trg_relations
from kdfast.ops import knn_graph, relation_table

GRAPH = ("k", "sigma", "orientation", "direction", "normalize")
TOTAL = (*GRAPH, "tau", "similarity", "reduction")
TERMS = {"inner": "alpha", "local": "beta", "global": "gamma"}


def run(inputs, params):
    s, t = inputs["s"], inputs["t"]

    def project(tokens):
        return F.linear(tokens, inputs["weight"], inputs.get("bias"))

    if "index" in inputs:
        options = {name: params[name] for name in TOTAL if name in params}

        def total(weights):
            return trg_relations(s, t, project, index=inputs["index"], **options, **weights).loss

        outputs = {"loss": total({weight: params.get(weight, 1.0) for weight in TERMS.values()})}
        none = dict.fromkeys(TERMS.values(), 0.0)
        return outputs | {f"loss_{name}": total(none | {weight: 1.0}) for name, weight in TERMS.items()}
    if "weight" in inputs:
        options = {name: params[name] for name in ("tau", "similarity") if name in params}
        return reductions(token_contrast_loss(project(s), t, reduction="none", **options))
    if s.dim() == 3:
        tables = {"cs_student": relation_table(s), "cs_teacher": relation_table(t)}
        return {"loss": token_context_loss(s, t)} | tables
    options = {"k": 8, "normalize": False} | {name: params[name] for name in GRAPH if name in params}
    outputs = reductions(token_graph_loss(s, t, reduction="none", **options))
    for name, tokens in (("student", s), ("teacher", t)):
        tokens = F.normalize(tokens, dim=-1) if options["normalize"] else tokens
        neighbours, weights = knn_graph(tokens, options["k"], sigma=options.get("sigma", 1.0))
        dense = tokens.new_zeros(len(tokens), len(tokens)).scatter(1, neighbours.long(), weights)
        outputs[f"adjacency_{name}"] = dense.T if options.get("orientation") == "column" else dense
        outputs[f"knn_{name}"] = neighbours.sort(1).values
    return outputs


def reductions(rows):
    return {"rows": rows, "loss_sum": rows.sum(), "loss_mean": rows.mean()}
