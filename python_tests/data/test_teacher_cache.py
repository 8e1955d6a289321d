"""The cache of a causal LM's lists: exact within the stated error, the model's own logits, and the command that makes it."""

import functools
import json

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from data import cache_run
from lm import TEXTS, llama, tokenizer

from kdfast.data import text
from kdfast.data.teacher_cache import CacheError, TeacherCache, cache_teacher, language, lists
from kdfast.losses import linear_distillation_loss, sparse_kd_loss
from kdfast.ops.sparse_divergence import TopKTeacher

K = cache_run.OPTIONS["top_k"]


@pytest.fixture(scope="module")
def rows():
    return cache_run.rows()


@torch.no_grad()
def logits_of(batch):
    return llama()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


# ---------------------------------------------------------------- what is stored
@pytest.mark.parametrize("form", lists.FORMS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_that_of_the_live_lists_within_the_stated_error(form, temperature, rows, tmp_path):
    """Lists, tail and labels of every token; then |loss(cache) - loss(live)| <= the error of the log-probabilities."""
    cache = cache_teacher(
        llama(), rows, tmp_path, tokenizer=tokenizer(), top_k=K, temperature=temperature, log_probs=form, batch_size=8
    )
    ids = [7, 0, len(rows) - 1, 22, 21]
    batch = cache.rows(ids)
    want = text.collate_rows([rows[i] for i in ids], cache.pad_id)
    logits = logits_of(want)
    for name, value in want.items():
        assert torch.equal(batch[name], value), name
    teacher = cache.pop_teacher(batch)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "row_id"} and teacher.temperature == temperature

    kept = torch.stack([lists.has_list(labels) for labels in batch["labels"]])
    live_ids, live, live_tail = lists.top_k_lists(logits[kept], K, temperature)
    assert torch.equal(teacher.ids[kept], live_ids.int()) and (teacher.ids[~kept] == -1).all()
    error = (teacher.log_probs[kept].float() - live).abs()
    bound = lists.log_prob_error(live, form) + 1e-5  # of two batches in float32
    assert (error <= bound).all() and error.max() > 1e-4 and bound.max() < 0.05
    torch.testing.assert_close(teacher.tail[kept], live_tail, rtol=1e-5, atol=1e-7)

    student = torch.randn(*kept.shape, 300, generator=torch.Generator().manual_seed(1))
    for kind in ("forward_kl", "reverse_kl", "js"):
        options = {"kind": kind, "temperature": temperature, "mask": kept}
        got = sparse_kd_loss(student, teacher, **options)
        full = torch.full((*kept.shape, K), -1, dtype=torch.long), torch.zeros(*kept.shape, K), torch.ones(kept.shape)
        for whole_rows, values in zip(full, (live_ids, live, live_tail)):
            whole_rows[kept] = values
        exact = sparse_kd_loss(student, TopKTeacher(*full, temperature), **options)
        # log p moves by e, that of the renormalised p by 2 e at most, so sum p' log(p'/q) by (e^2e - 1) sum p |log(p/q)| + 2 e,
        # and that sum is below KL + 2: the part with p < q is at most 1
        e = bound.max()
        assert abs(got - exact) <= (2 * e).expm1() * (exact + 2) + 2 * e and exact > 0.01
        with pytest.raises(
            ValueError, match=rf"temperature: expected {temperature}, at which the teacher's list was taken"
        ):
            sparse_kd_loss(student, teacher, kind=kind, temperature=2.0)


def test_the_stated_error_holds_and_is_reached():
    """Peaked, flat, tied and nearly empty rows. A form whose error were half would make this fail."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.0, 0.1, 1.0, 5.0, 20.0, 60.0]).repeat(200)[:, None]
    logits = torch.randn(1200, 70_000, generator=generator)[:, :2000] * scales
    logits[:6, 5:] = -torch.inf  # five classes exist
    ids, log_probs, tail = lists.top_k_lists(logits, 64, 1.0)
    for form in lists.FORMS:
        back_ids, back, back_tail = lists.unpack_lists(lists.pack_lists(ids, log_probs, tail, form, 151_936))
        assert torch.equal(back_ids.long(), ids) and torch.equal(back_tail, tail)
        there = ids >= 0
        assert there[:6].sum(1).tolist() == [5] * 6 and there[6:].all() and (tail[:6] == 0).all()
        stated = lists.log_prob_error(log_probs.where(there, log_probs.amin()), form)
        stated[:6] = lists.log_prob_error(log_probs[:6, :5], form).new_zeros(6, 64).fill_(1.0)
        share = ((back.float() - log_probs).abs() / (stated + 1e-6)).where(there, 0.0)
        assert 0.9 < share.max() <= 1
        assert (back[:6, :5].float() - log_probs[:6, :5]).abs().amax() <= lists.log_prob_error(
            log_probs[:6, :5], form
        ).amax()


def test_ids_of_every_size_survive():
    ids = torch.tensor([[0, 1, 65_535, 65_536, 151_935, 262_143, (1 << 24) - 1, -1]])
    log_probs, tail = torch.linspace(-1, -9, 8)[None], torch.tensor([0.25])
    for form in lists.FORMS:
        stored = lists.pack_lists(ids, log_probs, tail, form, 1 << 24)
        assert torch.equal(lists.unpack_lists(stored)[0].long(), ids)
        assert sum(t.numel() * t.element_size() for t in stored.values()) == lists.list_bytes(8, form, 1 << 24)
        small = lists.pack_lists(ids[:, :3], log_probs[:, :3], tail, form, 1 << 16)
        assert torch.equal(lists.unpack_lists(small)[0].long(), ids[:, :3]) and "ids_high" not in small


def test_tail_has_its_digits():
    """1 - sum p would be 0 or noise here."""
    logits = torch.tensor([[30.0, 10.0, 1.0, 0.0]])
    tail = lists.top_k_lists(logits, 2, 1.0)[2]
    want = logits.double().softmax(-1)[0, 2:].sum()
    assert tail.item() == pytest.approx(want.item(), rel=1e-5) and want < 1e-12


# ---------------------------------------------------------------- models
SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.5, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize("in_parts", [True, False], ids=["softcap", "own"])
def test_lists_are_of_the_models_own_logits(in_parts, rows, tmp_path, monkeypatch):
    """From hidden states in chunks, with what Gemma does after its head; and of a model that does what no configuration tells."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL, final_logit_softcapping=2.0)).eval()
    if not in_parts:
        forward = model.forward

        def shifted(**inputs):
            output = forward(**inputs)
            output.logits = output.logits + torch.linspace(0, 3, output.logits.shape[-1])
            return output

        model.forward = shifted
    chunks, original = [], language.top_k_lists
    monkeypatch.setattr(language, "top_k_lists", lambda z, *rest: chunks.append(len(z)) or original(z, *rest))
    monkeypatch.setattr(language, "CHUNK_BYTES", 4 * 300 * 50)
    cache = cache_teacher(model, rows, tmp_path, top_k=4, batch_size=8)
    batch = cache.rows([5, 9, 30])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    kept = torch.stack([lists.has_list(labels) for labels in batch["labels"]])
    want = logits.log_softmax(-1).topk(4)
    assert (want.values.std() > 0.05) and sum(chunks) == cache.manifest["totals"]["lists"] and max(chunks) == 50
    torch.testing.assert_close(batch["teacher_log_probs"][kept].float(), want.values[kept], rtol=2**-10, atol=1e-4)
    assert (batch["teacher_ids"][kept] == want.indices[kept]).float().mean() > 0.99  # of two equal ones either


def test_a_cut_vocabulary_is_the_whole_softmax(rows, tmp_path):
    cache = cache_teacher(llama(), rows[:4], tmp_path, top_k=4, vocab_size=280, log_probs="float16")
    batch = cache.rows(range(4))
    logits = logits_of(batch)[..., :280]
    kept = torch.stack([lists.has_list(labels) for labels in batch["labels"]])
    want = logits.log_softmax(-1).topk(4)
    assert torch.equal(batch["teacher_ids"][kept].long(), want.indices[kept])
    torch.testing.assert_close(batch["teacher_log_probs"][kept].float(), want.values[kept], rtol=2**-10, atol=1e-4)
    with pytest.raises(CacheError, match="was made from token ids, without one to compare with"):
        TeacherCache(tmp_path, tokenizer=tokenizer())


def test_bad_arguments_and_broken_teachers(rows, tmp_path):
    run = functools.partial(cache_teacher, llama(), rows, tmp_path / "a")
    for options, message in (
        ({"top_k": 0}, "top_k: expected an int >= 1"),
        ({"top_k": 301}, "top_k: expected at most the vocabulary's 300 classes"),
        ({"vocab_size": 301}, "vocab_size: expected at most the model's 300, got 301"),
        ({"temperature": 0.0}, "temperature: expected a finite number in"),
        ({"log_probs": "int4"}, "log_probs: expected one of float16, uint8, got 'int4'"),
        ({"packing": True}, "packing: an option of text, and the data are rows of tokens already"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options)
    with pytest.raises(ValueError, match="data: expected at least one row, got none"):
        cache_teacher(llama(), [], tmp_path / "a")
    with pytest.raises(TypeError, match="model: expected a causal LM of transformers, got Linear"):
        cache_teacher(torch.nn.Linear(2, 2), rows, tmp_path / "a")
    with pytest.raises(ValueError, match="labels that are the tokens or -100, in row 1"):
        cache_teacher(llama(), [rows[0], {**rows[1], "labels": rows[1]["labels"] + 1}], tmp_path / "a")
    with pytest.raises(ValueError, match=r"token ids below the model's 280, row \d+ has others"):
        cache_teacher(llama(280), rows, tmp_path / "c", rows_per_shard=40)
    broken = llama()
    with torch.no_grad():
        broken.model.embed_tokens.weight[rows[6]["input_ids"][0]] = torch.nan  # a token that begins few documents
    first = next(i for i, row in enumerate(rows) if rows[6]["input_ids"][0] in row["input_ids"][:-1])
    with pytest.raises(ValueError, match=f"model: expected finite logits, got NaN or infinity in row {first}$"):
        cache_teacher(broken, rows, tmp_path / "b", batch_size=1, rows_per_shard=1)


def test_training_from_the_cache_is_training_from_the_teacher(rows, tmp_path):
    """The gradient of the head of a student, through linear_distillation_loss with shift."""
    cache = cache_teacher(llama(), rows, tmp_path, top_k=300, log_probs="float16")  # every class: the exact KL
    batch = cache.rows(range(6))
    teacher = cache.pop_teacher(batch)
    student = llama(hidden=16, seed=3)
    hidden = student.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state.detach()
    head = student.lm_head.weight.detach()
    grads = []
    for source in (teacher, logits_of(batch)):
        weight = head.clone().requires_grad_()
        linear_distillation_loss(hidden, weight, source, batch["labels"], shift=1).loss.backward()
        grads.append(weight.grad)
    assert grads[1].abs().max() > 1e-2
    torch.testing.assert_close(*grads, rtol=0.01, atol=1e-3 * grads[1].abs().max().item())
    with pytest.raises(ValueError, match=r"temperature: expected 1\.0, at which the teacher's list was taken, got 2.0"):
        linear_distillation_loss(hidden, head, teacher, batch["labels"], temperature=2.0, shift=1)


# ---------------------------------------------------------------- the command
def test_the_command(tmp_path, capsys):
    from kdfast import cli

    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in TEXTS))
    base = [
        "cache-teacher",
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "a.jsonl"),
        "--out",
        str(tmp_path / "out"),
    ]

    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*base, *arguments])
        return stopped.value.code, *capsys.readouterr()

    options = ["--top-k", "8", "--max-length", "32", "--packing", "--batch-size", "4"]
    for again in (False, True):  # the second finds it finished
        code, printed, errors = call(*options)
        assert code == 0, errors
        assert again or ("tokens/s" in printed and "ETA" in printed)
        cache = TeacherCache(
            tmp_path / "out", tokenizer=text.load_tokenizer(tmp_path / "model"), top_k=8, temperature=1.0
        )
        totals = cache.manifest["totals"]
        assert f"{totals['tokens']:,} tokens in {len(cache):,} rows x 41 bytes = " in printed and " are free" in printed
        assert f"{totals['lists']:,} lists of 8 that hold {cache.kept_mass:.2%} of the mass" in printed
        assert f"cache: {tmp_path / 'out'}\n" in printed
    estimated = 41 * totals["tokens"]
    assert totals["bytes"] < estimated + 2048 * len(cache.manifest["shards"])  # headers
    assert cache.manifest["about"]["model"] == str(tmp_path / "model")
    want = text.token_rows(TEXTS, tokenizer(), max_length=32, packing=True)
    for i in (0, len(want) - 1):
        assert torch.equal(cache[i]["input_ids"], want[i]["input_ids"]) and torch.equal(
            cache[i]["labels"], want[i]["labels"]
        )
    code, _, errors = call(*options, "--temperature", "2")
    assert code == 2 and "holds a cache with temperature 1.0, this run has 2.0" in errors
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    code, _, errors = call(*options)
    assert code == 2 and "error: " in errors  # a pickle is not loaded
