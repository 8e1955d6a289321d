"""The catalogue: which papers, what each needs and is made of, and whether it is here. Literal rows, read by `kdfast methods`."""

from __future__ import annotations

import difflib
from typing import NamedTuple


class Row(NamedTuple):
    """One method.

    slug: its name and its file `kdfast/methods/<slug>.py`. number: in the list of papers, 0 for the baselines.
    arxiv: the id as text (2402.10 is not 2402.1). year: of the first version.
    task: the small offline problem that fits it. needs: what it wants beside the student, its inputs and labels.
    ops: the ops of `kdfast.ops` on its hot path. parts: what it shares with other methods.
    status: "ready" (the file is here and tested) or "planned".
    """

    slug: str
    number: int
    title: str
    arxiv: str
    year: int
    task: str
    needs: tuple[str, ...]
    ops: tuple[str, ...]
    parts: tuple[str, ...]
    status: str


# fmt: off
CATALOGUE: tuple[Row, ...] = (
    Row(
        "cnn_vit_bsd", 1, "A Good Student is Cooperative and Reliable: CNN-Transformer Collaborative Learning for Semantic Segmentation",
        "2307.12574", 2023, task="canvases", needs=("two students", "features", "pixel labels"), ops=("selective",), parts=("mutual training", "who teaches whom"), status="ready",
    ),
    Row(
        "nd_loss", 2, "Improving Knowledge Distillation via Regularizing Feature Norm and Direction",
        "2305.17007", 2023, task="digits", needs=("teacher", "features", "class means"), ops=("divergence",), parts=(), status="ready",
    ),
    Row(
        "knowledge_concentration", 3, "Knowledge Concentration: Learning 100K Object Classifiers in a Single CNN",
        "1711.07607", 2017, task="digit_tree", needs=("several teachers", "multi-hot labels"), ops=(), parts=(), status="ready",
    ),
    Row(
        "trg", 4, "Knowledge Distillation via Token-level Relationship Graph",
        "2306.12442", 2023, task="digit_maps", needs=("teacher", "token features"), ops=("token_graph", "pairwise", "divergence"), parts=("Gram relation", "all-pairs contrast"), status="ready",
    ),
    Row(
        "makd", 5, "Multi-aspect Knowledge Distillation with Large Language Model",
        "2501.13341", 2025, task="aspect_digits", needs=("aspect probabilities",), ops=(), parts=(), status="ready",
    ),
    Row(
        "hyperformer", 6, "HyperFormer: Enhancing Entity and Relation Interaction for Hyper-Relational Knowledge Graph Completion",
        "2308.06512", 2023, task="digit_graph", needs=("statements of a graph",), ops=("routing",), parts=("gate and balance terms",), status="ready",
    ),
    Row(
        "dho", 7, "Simple Semi-supervised Knowledge Distillation from Vision-Language Models via Dual-Head Optimization",
        "2505.07675", 2025, task="digit_few", needs=("teacher", "unlabelled data", "two heads"), ops=("divergence",), parts=("dual head",), status="ready",
    ),
    Row(
        "kd3", 8, "Distribution Shift Matters for Knowledge Distillation with Webly Collected Images",
        "2307.11469", 2023, task="web_digits", needs=("teacher", "features", "unlabelled data"), ops=("pairwise",), parts=("mixing", "all-pairs contrast"), status="ready",
    ),
    Row(
        "ff_g2m", 9, "Extracting Low-/High-Frequency Knowledge from Graph Neural Networks and Injecting it into MLPs",
        "2305.10758", 2023, task="digit_nodes", needs=("graph teacher", "edges"), ops=("divergence",), parts=(), status="ready",
    ),
    Row(
        "general_knowledge_transfer", 10, "Fantastic Gains and Where to Find Them: On the Existence and Prospect of General Knowledge Transfer between Any Pretrained Model",
        "2310.17653", 2023, task="digits", needs=("trained student", "teacher"), ops=("divergence", "pairwise"), parts=("who teaches whom", "weight averaging"), status="ready",
    ),
    Row(
        "dynamic_ykd", 11, "Dynamic Y-KD: A Hybrid Approach to Continual Instance Segmentation",
        "2303.06015", 2023, task="canvases", needs=("teacher of the old classes", "regions"), ops=("divergence",), parts=("weight averaging",), status="planned",
    ),
    Row(
        "tgeo_kd", 12, "Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation",
        "2312.15112", 2023, task="digits", needs=("teacher", "validation batches"), ops=("divergence",), parts=(), status="ready",
    ),
    Row(
        "mix_kd", 13, "Understanding the Role of Mixup in Knowledge Distillation: An Empirical Study",
        "2211.03946", 2022, task="mixed_digits", needs=("teacher",), ops=("divergence",), parts=("mixing",), status="ready",
    ),
    Row(
        "kd_data_pruning", 14, "Distilling the Knowledge in Data Pruning",
        "2403.07854", 2024, task="relabelled_digits", needs=("teacher", "scores of samples"), ops=("divergence",), parts=(), status="ready",
    ),
    Row(
        "lad", 15, "Make a Strong Teacher with Label Assistance: A Novel Knowledge Distillation Approach for Semantic Segmentation",
        "2407.13254", 2024, task="canvas_cnns", needs=("teacher that reads labels", "pixel labels"), ops=("divergence",), parts=("channel-wise KD", "best epoch", "stages"), status="ready",
    ),
    Row(
        "sinkd", 16, "Sinkhorn Distance Minimization for Knowledge Distillation",
        "2402.17110", 2024, task="digits", needs=("teacher",), ops=("divergence", "sinkhorn"), parts=(), status="ready",
    ),
    Row(
        "dhkd", 17, "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head",
        "2411.08937", 2024, task="digits", needs=("teacher", "two heads"), ops=("divergence",), parts=("dual head",), status="ready",
    ),
    Row(
        "mdcs", 18, "MDCS: More Diverse Experts with Consistency Self-distillation for Long-tailed Recognition",
        "2308.09922", 2023, task="digit_tail", needs=("several heads", "two views", "class counts"), ops=("divergence",), parts=("who teaches whom",), status="ready",
    ),
    Row(
        "entropic_student", 19, "Supervised Compression for Resource-Constrained Edge Computing Systems",
        "2108.11898", 2021, task="large_digits", needs=("teacher", "features"), ops=("divergence",), parts=("stages",), status="ready",
    ),
    Row(
        "mst_distill", 20, "MST-Distill: Mixture of Specialized Teachers for Cross-Modal Knowledge Distillation",
        "2507.07015", 2025, task="two_view_digits", needs=("several teachers", "two modalities"), ops=("divergence", "routing"), parts=("who teaches whom", "gate and balance terms", "stages"), status="ready",
    ),
    Row(
        "lelp", 21, "Linear Projections of Teacher Embeddings for Few-Class Distillation",
        "2409.20449", 2024, task="digit_parity", needs=("teacher", "teacher embeddings"), ops=("divergence",), parts=(), status="ready",
    ),
    Row(
        "scalekd", 22, "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers",
        "2411.06786", 2024, task="digit_patches", needs=("teacher with a last stage", "features"), ops=("divergence",), parts=("query attention",), status="ready",
    ),
    Row(
        "bd_kd", 23, "BD-KD: Balancing the Divergences for Online Knowledge Distillation",
        "2212.12965", 2022, task="noisy_digits", needs=("two students",), ops=("divergence",), parts=("mutual training",), status="ready",
    ),
    Row(
        "transkd", 24, "TransKD: Transformer Knowledge Distillation for Efficient Semantic Segmentation",
        "2202.13393", 2022, task="canvas_stages", needs=("teacher", "stage maps", "patch embeddings", "pixel labels"), ops=(), parts=("channel-wise KD", "best epoch", "query attention"), status="ready",
    ),
    Row(
        "mgd", 25, "Multi-Granularity Distillation Scheme Towards Lightweight Semi-Supervised Semantic Segmentation",
        "2208.10169", 2022, task="canvases", needs=("two teachers", "unlabelled data"), ops=("divergence", "pairwise"), parts=("mixing", "Gram relation"), status="planned",
    ),
    Row(
        "proc_kd", 26, "Prototype-guided Cross-task Knowledge Distillation for Large-scale Models",
        "2212.13180", 2022, task="other_digits", needs=("teacher of another task", "token features"), ops=("divergence",), parts=("prototypes",), status="ready",
    ),
    Row(
        "scalearn", 27, "ScaLearn: Simple and Highly Parameter-Efficient Task Transfer by Learning to Scale",
        "2310.01217", 2023, task="digits", needs=("trained adapters",), ops=(), parts=("weight averaging",), status="planned",
    ),
    Row(
        "oadp", 28, "Object-Aware Distillation Pyramid for Open-Vocabulary Object Detection",
        "2303.05892", 2023, task="canvases", needs=("image encoder", "regions"), ops=("pairwise",), parts=("Gram relation", "query attention"), status="planned",
    ),
    Row(
        "knowledge_capacity", 29, "Physics of Language Models: Part 3.3, Knowledge Capacity Scaling Laws",
        "2404.05405", 2024, task="biographies", needs=("token labels",), ops=("divergence",), parts=(), status="planned",
    ),
    Row(
        "twin_merging", 30, "Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging",
        "2406.15479", 2024, task="digits", needs=("trained experts",), ops=("routing",), parts=("weight averaging",), status="planned",
    ),
    Row(
        "neurocomparatives", 31, "NeuroComparatives: Neuro-Symbolic Distillation of Comparative Knowledge",
        "2305.04978", 2023, task="comparisons", needs=("language model", "constraints"), ops=(), parts=(), status="planned",
    ),
    Row(
        "speech_separation", 32, "Advances in Speech Separation: Techniques, Challenges, and Future Trends",
        "2508.10830", 2025, task="mixtures", needs=("teacher", "waveforms"), ops=("pairwise", "sinkhorn"), parts=(), status="planned",
    ),
    Row(
        "rotnet", 33, "Unsupervised Representation Learning by Predicting Image Rotations",
        "1803.07728", 2018, task="digit_turns", needs=("unlabelled images",), ops=(), parts=("rotations",), status="ready",
    ),
    Row(
        "know2vec", 34, "Know2Vec: A Black-Box Proxy for Neural Network Retrieval",
        "2412.16251", 2024, task="digit_models", needs=("trained models",), ops=("pairwise",), parts=("all-pairs contrast",), status="planned",
    ),
    Row(
        "lsskd", 35, "A Layered Self-Supervised Knowledge Distillation Framework for Efficient Multimodal Learning on the Edge",
        "2506.07055", 2025, task="digit_stages", needs=("auxiliary heads", "earlier predictions"), ops=("divergence",), parts=("rotations",), status="ready",
    ),
    Row(
        "switch_dit", 36, "Switch Diffusion Transformer: Synergizing Denoising Tasks with Sparse Mixture-of-Experts",
        "2403.09176", 2024, task="digit_diffusion", needs=("diffusion time steps",), ops=("routing",), parts=("gate and balance terms",), status="ready",
    ),
    Row(
        "s_kan", 37, "Activation Space Selectable Kolmogorov-Arnold Networks",
        "2408.08338", 2024, task="digits", needs=("labels",), ops=(), parts=("stages",), status="planned",
    ),
    Row(
        "gdcan", 38, "Generalized Domain Conditioned Adaptation Network",
        "2103.12339", 2021, task="two_domain_digits", needs=("unlabelled target data", "features"), ops=("pairwise",), parts=(), status="planned",
    ),
)

# Not of the list: what the papers are compared with.
BASELINES: tuple[Row, ...] = (
    Row(
        "kd", 0, "Distilling the Knowledge in a Neural Network",
        "1503.02531", 2015, task="digits", needs=("teacher",), ops=("divergence",), parts=(), status="ready",
    ),
    Row(
        "dkd", 0, "Decoupled Knowledge Distillation",
        "2203.08679", 2022, task="digits", needs=("teacher",), ops=("divergence",), parts=(), status="ready",
    ),
    Row(
        "mutual", 0, "Deep Mutual Learning",
        "1706.00384", 2017, task="canvases", needs=("two students",), ops=("divergence",), parts=("mutual training",), status="ready",
    ),
)
# fmt: on


def find(slug: str) -> Row:
    """The row of a slug; ValueError with near names for an unknown one."""
    rows = {row.slug: row for row in (*BASELINES, *CATALOGUE)}
    if slug not in rows:
        near = difflib.get_close_matches(slug, rows, n=3, cutoff=0.4)
        raise ValueError(f"method: there is no {slug!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return rows[slug]
