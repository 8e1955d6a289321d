"""CausalLMLoss: what hidden states and heads give is what a plain loop over all logits gives, value and every gradient."""

from __future__ import annotations

import logging

import lm
import pytest
import torch
import torch.nn.functional as F
from torch import nn

transformers = pytest.importorskip("transformers")

from kdfast.integrations.causal_lm import CausalLMLoss, next_labels  # noqa: E402
from kdfast.losses import TopKTeacher  # noqa: E402

VOCAB = 300
ACROSS = 1e-6  # between two forwards: norms and rotary angles of the models are float32 whatever the weights are


def rows_of(n: int = 3, length: int = 20, side: str = "right") -> dict[str, torch.Tensor]:
    """A padded batch of n texts of different lengths; the first tokens of each are a prompt."""
    tokenizer = lm.tokenizer(VOCAB)
    texts = [tokenizer(text)["input_ids"][: length - 4 * i] for i, text in enumerate(lm.TEXTS[:n])]
    batch: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    for i, tokens in enumerate(texts):
        pads, prompt = length - len(tokens), i
        row = (tokens, [1] * len(tokens), [-100] * prompt + tokens[prompt:])
        for values, value, fill in zip(batch.values(), row, (1, 0, -100)):
            values.append([fill] * pads + value if side == "left" else value + [fill] * pads)
    return {name: torch.tensor(values) for name, values in batch.items()}


def plain_loss(student, teacher, batch, *, kind="forward_kl", temperature=1.0, classes=None, reduction="mean"):
    """0.5 CE + 0.5 T^2 D from all logits, with F.kl_div and F.cross_entropy, row by row as one would write it."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    x = student(**inputs).logits[:, :-1, :classes]
    with torch.no_grad():
        z = teacher(**inputs).logits[:, :-1, :classes]
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    keep = (batch["labels"][:, 1:] != -100) & (mask[:, :-1] != 0)
    x, z, y = x[keep], z[keep], batch["labels"][:, 1:][keep]
    log_q, log_p = F.log_softmax(x / temperature, -1), F.log_softmax(z / temperature, -1)
    if kind == "reverse_kl":
        kd = F.kl_div(log_p, log_q, log_target=True, reduction="sum")
    elif kind == "js":
        m = ((log_p.exp() + log_q.exp()) / 2).log()
        kd = (
            F.kl_div(m, log_p, log_target=True, reduction="sum") + F.kl_div(m, log_q, log_target=True, reduction="sum")
        ) / 2
    else:
        kd = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    total = 0.5 * F.cross_entropy(x, y, reduction="sum") + 0.5 * temperature**2 * kd
    return total if reduction == "sum" else total / len(y)


def gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)))


def check_equal(got: torch.Tensor, want: torch.Tensor, model: nn.Module, rtol: float = 1e-9) -> None:
    assert want.item() > 0.1
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-12)
    got_grads, want_grads = gradients(got, model), gradients(want, model)
    largest = max(g.abs().max().item() for g in want_grads.values() if g is not None)
    assert largest > 1e-3
    for name, grad in want_grads.items():
        assert (grad is None) == (got_grads[name] is None), name
        if grad is not None:
            torch.testing.assert_close(
                got_grads[name], grad, rtol=100 * rtol, atol=rtol * largest, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.fixture(scope="module")
def pair():
    return lm.llama(VOCAB, 32).double(), lm.llama(VOCAB, 48, seed=1).double()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_the_plain_loop(pair, kind, side):
    batch = rows_of(side=side)
    criterion = CausalLMLoss(kind=kind, temperature=2.0)
    for _ in range(2):  # the first call confirms the heads on logits of the models, the second makes none
        loss, parts = criterion(*pair, batch)
        check_equal(loss, plain_loss(*pair, batch, kind=kind, temperature=2.0), pair[0])
    torch.testing.assert_close(0.5 * parts["ce"] + 0.5 * parts["kd"], loss.detach())
    assert [reader.reason for reader in criterion.readers.values()] == [None, None]


def test_no_logits_are_made(pair):
    batch, criterion = rows_of(), CausalLMLoss()
    criterion(*pair, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for reader, model in zip(criterion.readers.values(), pair):
        rows, head, outputs = reader(model, inputs)
        assert outputs.logits.shape == (3, 0, VOCAB) and outputs.past_key_values is None
        assert head.weight is model.lm_head.weight and rows.shape == (3, 20, model.config.hidden_size)
        assert reader(model, inputs, all_logits=True).outputs.logits.shape == (3, 20, VOCAB)


def test_padding_sides_agree(pair):
    criterion = CausalLMLoss()
    losses = [criterion(*pair, rows_of(side=side)).loss for side in ("right", "left")]
    check_equal(losses[0], losses[1], pair[0], rtol=ACROSS)


def test_packed_documents_equal_separate_ones(pair):
    """Two documents in one row, told apart by position_ids: no attention across, and nothing predicts a first token."""
    tokens = [lm.tokenizer(VOCAB)(text)["input_ids"][:n] for text, n in zip(lm.TEXTS, (9, 12))]
    packed = {
        "input_ids": torch.tensor([[*tokens[0], *tokens[1]]]),
        "position_ids": torch.tensor([[*range(9), *range(12)]]),
        "labels": torch.tensor([[-100, *tokens[0][1:], -100, *tokens[1][1:]]]),
    }
    criterion = CausalLMLoss()
    together = criterion(*pair, packed, reduction="sum").loss
    apart = sum(
        criterion(*pair, {"input_ids": torch.tensor([t]), "labels": torch.tensor([t])}, reduction="sum").loss
        for t in tokens
    )
    check_equal(together, apart, pair[0], rtol=ACROSS)
    unmarked = packed | {"labels": packed["input_ids"]}
    assert torch.equal(next_labels(unmarked), next_labels(packed))


def tiny(family: str, **options):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.3, pad_token_id=1,
        bos_token_id=None, eos_token_id=0, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).double().eval()


# family -> its options, and what must have been read: (scale, softcap, a bias)
FAMILIES = {
    "Llama": (dict(tie_word_embeddings=True), (1.0, None, False)),
    "Qwen3": (dict(), (1.0, None, False)),
    "Gemma2": (dict(final_logit_softcapping=3.0, query_pre_attn_scalar=8), (1.0, 3.0, False)),
    "Cohere": (dict(logit_scale=0.25), (0.25, None, False)),
    "Granite": (dict(logits_scaling=4.0), (0.25, None, False)),
    "Phi": (dict(), (1.0, None, True)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_read_right(pair, family):
    options, (scale, softcap, bias) = FAMILIES[family]
    student, batch, criterion = tiny(family, **options), rows_of(), CausalLMLoss(kind="reverse_kl")
    if bias:
        nn.init.normal_(student.lm_head.bias)
    for pair_ in ((student, pair[1]), (pair[0], student)):  # as a student and as a teacher
        criterion = CausalLMLoss(kind="reverse_kl")
        for _ in range(2):
            check_equal(criterion(*pair_, batch).loss, plain_loss(*pair_, batch, kind="reverse_kl"), pair_[0])
        assert [reader.reason for reader in criterion.readers.values()] == [None, None]
        reader = criterion.readers["student" if pair_[0] is student else "teacher"]
        _, head, _ = reader(student, {"input_ids": batch["input_ids"]})
        assert head is not None and (head.scale, head.softcap, head.bias is not None) == (scale, softcap, bias)


class Tripled(nn.Module):
    """A model whose config does not say what happens to its logits."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **inputs):
        outputs = self.model(**inputs)
        outputs.logits = outputs.logits * 3
        return outputs

    def get_output_embeddings(self):
        return self.model.lm_head


class OtherLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1.0


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("odd", ["logits", "layer", "compiled"])
def test_falls_back_to_logits_and_says_why(pair, which, odd, caplog):
    model = lm.llama(VOCAB, 32, seed=5).double()
    if odd == "logits":
        model, reason = Tripled(model), "its logits are not its output layer's"
    elif odd == "compiled":
        model, reason = torch.compile(model, backend="eager"), "it is compiled"
    else:
        model.lm_head.__class__, reason = OtherLinear, "OtherLinear, not an nn.Linear"
    models = (model, pair[1]) if which == "student" else (pair[0], model)
    batch, criterion = rows_of(), CausalLMLoss(temperature=2.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            check_equal(criterion(*models, batch).loss, plain_loss(*models, batch, temperature=2.0), models[0])
    messages = [record.message for record in caplog.records if record.name.startswith("kdfast")]
    assert len(messages) == 1 and reason in messages[0] and messages[0].startswith(which)


def test_compiled_and_partitioned_heads_are_left_alone():
    for break_it, reason in (
        (lambda model: setattr(model, "_compiled_call_impl", model.forward), "it is compiled"),
        (lambda model: setattr(model.lm_head.weight, "ds_id", 0), "ZeRO-3"),
        (lambda model: model.set_output_embeddings(nn.Identity()), "Identity, not an nn.Linear"),
    ):
        model, reader = lm.llama(VOCAB, 32), CausalLMLoss().readers["student"]
        break_it(model)
        assert reader._head_module(model) is None and reason in reader.reason


@pytest.mark.parametrize("use_logits", [False, True])
def test_teacher_with_a_padded_vocabulary(pair, use_logits):
    teacher, batch = lm.llama(VOCAB + 20, 48, seed=2).double(), rows_of()
    criterion = CausalLMLoss(vocab_size=VOCAB, use_logits=use_logits)
    check_equal(criterion(pair[0], teacher, batch).loss, plain_loss(pair[0], teacher, batch, classes=VOCAB), pair[0])
    with pytest.raises(ValueError, match=rf"{VOCAB}.*{VOCAB + 20}"):
        CausalLMLoss(use_logits=use_logits)(pair[0], teacher, batch)


@pytest.mark.parametrize("use_logits", [False, True])
def test_known_teachers(pair, use_logits):
    """Logits and a full list of classes give what the teacher itself gives."""
    batch = rows_of()
    logits = pair[1](**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits.detach()
    log_probs, ids = logits.log_softmax(-1).topk(VOCAB - 1)
    criterion = CausalLMLoss(kind="reverse_kl", use_logits=use_logits)
    for known in (logits, TopKTeacher(ids, log_probs)):
        want = plain_loss(*pair, batch, kind="reverse_kl")
        check_equal(criterion(pair[0], known, batch).loss, want, pair[0], rtol=1e-6)


def test_labels_are_asked_for(pair):
    with pytest.raises(ValueError, match=r"labels.*input_ids"):
        CausalLMLoss()(*pair, {"input_ids": torch.tensor([[1, 2, 3]])})
