"""Two tokenizers over one text: rows that are paired have read the same characters, and all such rows are found."""

import lm
import pytest
import torch

from kdfast.data.alignment import align_texts, aligned_rows
from kdfast.losses import uld_loss
from kdfast.methods.sinkd import multi_level_ot_loss

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")


def test_by_hand():
    #        dist|illation is| fun|.        distill|ation| is| f|un|.
    student = [(0, 4), (4, 12), (12, 15), (15, 19), (19, 20)]
    teacher = [(0, 7), (7, 12), (12, 15), (15, 17), (17, 19), (19, 20)]
    assert aligned_rows(student, teacher).tolist() == [[1, 1], [2, 2], [3, 4]]
    end = [(20, 20)]  # an end-of-text token on both sides: the last rows predict it
    assert aligned_rows(student + end, teacher + end).tolist() == [[1, 1], [2, 2], [3, 4], [4, 5]]
    start = [(0, 0)]  # a special token in front covers nothing
    assert aligned_rows(start + student, teacher).tolist() == [[2, 1], [3, 2], [4, 4]]
    # one on both sides: the last of them has read as much as the other's
    assert aligned_rows(start + student, start + start + teacher).tolist() == [[0, 1], [2, 3], [3, 4], [4, 6]]
    # an empty text: the start predicts the end
    assert aligned_rows(start + start, start + start).tolist() == [[0, 0]]
    assert aligned_rows(start + start, start).tolist() == aligned_rows(start, start).tolist() == []
    # a character of several bytes in two tokens (2, 3), (2, 3): read at the second
    assert aligned_rows([(0, 2), (2, 3), (2, 3), (3, 5)], [(0, 3), (3, 4), (4, 5)]).tolist() == [[2, 0]]
    assert aligned_rows([(0, 3)], [(0, 1), (1, 3)]).tolist() == []
    assert aligned_rows(torch.zeros(0, 2), [(0, 1), (1, 3)]).tolist() == []
    with pytest.raises(ValueError, match="teacher_offsets"):
        aligned_rows(student, [1, 2, 3])


def beginning(size: int):
    """`lm.tokenizer` that puts a begin-of-text token, id `size`, in front of a text and the end after it."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer.from_str(lm.tokenizer(size).backend_tokenizer.to_str())
    bare.add_special_tokens(["<bos>"])
    special = [("<bos>", size), ("<eos>", 0)]
    bare.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="module")
def aligned():
    texts = ["Größe — naïve 日本語 😀 text, with   spaces\n\tand tabs", *lm.TEXTS[:3]]
    tokenizers = lm.tokenizer(300), lm.tokenizer(500)
    prompts = ["", "Q: why?\n", "  ", "import this"]
    return texts, prompts, tokenizers, align_texts(texts, *tokenizers, prompts=prompts, max_length=90)


def test_paired_rows_have_read_the_same_text(aligned):
    texts, prompts, tokenizers, found = aligned
    _, i, j = found.rows.unbind(-1)
    assert len(found.rows) > 60 and (i != j).any()
    for text, row, other in found.rows.tolist():
        read = [
            tokenizer.decode(side["input_ids"][text, : k + 1])
            for tokenizer, side, k in zip(tokenizers, (found.student, found.teacher), (row, other))
        ]
        assert read[0] == read[1] and (prompts[text] + texts[text]).startswith(read[0])


@pytest.mark.parametrize("start", [False, True])
def test_every_such_row_is_paired(aligned, start):
    """Against the definition: all pairs whose bytes so far are equal, of learned tokens."""
    texts, prompts, tokenizers, found = aligned
    if start:
        tokenizers = beginning(300), beginning(500)
        found = align_texts(texts, *tokenizers, prompts=prompts, max_length=90)
        assert [0, 0, 0] in found.rows.tolist() and [1, 0, 0] not in found.rows.tolist()  # a prompt's start
    paired = {tuple(row) for row in found.rows.tolist()}
    for b in range(len(texts)):
        reads = []
        for tokenizer, side in zip(tokenizers, (found.student, found.teacher)):
            ids, labels = side["input_ids"][b].tolist(), side["labels"][b].tolist()
            so_far = {}
            for k in range(int(side["attention_mask"][b].sum()) - 1):
                text = tokenizer.decode(ids[: k + 1], skip_special_tokens=True)
                if labels[k + 1] != -100 and "\ufffd" not in text:  # a whole number of characters
                    so_far[text] = k
            reads.append(so_far)
        for text in reads[0].keys() & reads[1].keys():
            assert (b, reads[0][text], reads[1][text]) in paired


def test_a_model_reads_its_start_token_as_in_normal_use():
    """What the tokenizer gives for the text is what the model gets, so its logits are those it was trained for."""
    tokenizer, other, texts = beginning(300), lm.tokenizer(500), lm.TEXTS[:3]
    found = align_texts(texts, tokenizer, other)
    for b, text in enumerate(texts):
        length = int(found.student["attention_mask"][b].sum())
        assert found.student["input_ids"][b, :length].tolist() == tokenizer(text)["input_ids"]
    ids, mask, labels = (found.student[name] for name in ("input_ids", "attention_mask", "labels"))
    assert (labels[:, 0] == -100).all() and torch.equal(labels[:, 1:] != -100, mask[:, 1:].bool())
    model, normal = lm.llama(301), tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(ids, mask).logits, model(normal["input_ids"], normal["attention_mask"]).logits)
    bare = align_texts(texts, tokenizer, other, add_start=False)
    assert torch.equal(bare.student["input_ids"], ids[:, 1:])  # the models of `other` have none either
    assert torch.equal(bare.rows + torch.tensor([0, 1, 0]), found.rows) and len(found.rows) > 60
    cut = align_texts(texts, tokenizer, other, max_length=5)
    assert torch.equal(cut.student["input_ids"], ids[:, :5])
    templated = align_texts(["b"], tokenizer, other, prompts=["<bos>a"])  # a chat template wrote it
    assert templated.student["input_ids"][0].tolist() == tokenizer("ab")["input_ids"]


@pytest.mark.parametrize("prompts", [None, ["", "Q: why?\n", "import this"]], ids=["no prompts", "prompts"])
@pytest.mark.parametrize("starts", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_rows_of_the_answers_stand_beside_each_other(starts, prompts):
    """One text in one tokenizer of two kinds: the t-th row of both predicts the same token, and each pair is of them."""
    texts = ["", *lm.TEXTS[1:3]]
    tokenizers = [beginning(300) if start else lm.tokenizer(300) for start in starts]
    found = align_texts(texts, *tokenizers, prompts=prompts)
    pairs = set()
    for b in range(len(texts)):
        i, j = (mask[b].nonzero().flatten() for mask in found.masks)
        nothing_read = not (prompts or texts)[b]
        learned = len(tokenizers[0].encode(texts[b], add_special_tokens=False)) + 1
        assert len(i) == len(j) == (learned if all(starts) or (prompts and prompts[b]) else learned - 1)
        assert not nothing_read or len(i) == all(starts) or texts[b]
        assert torch.equal(found.student["labels"][b, i + 1], found.teacher["labels"][b, j + 1])
        assert (found.student["labels"][b, i + 1] != -100).all()
        pairs |= {(b, *pair) for pair in zip(i.tolist(), j.tolist())}
    assert {tuple(row) for row in found.rows.tolist()} <= pairs
    assert len(found.rows) == len(
        pairs
    )  # one tokenizer: all rows, but those inside a character, of which there is none


def test_models_with_two_tokenizers_are_distilled(aligned):
    """ULD on the paired rows and the sequence-level transport on the answers: finite, with a gradient that lowers them."""
    found = aligned[3]
    student, teacher = lm.llama(300, 32), lm.llama(500, 48, seed=1)
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    b, i, j = found.rows.unbind(-1)
    with torch.no_grad():
        teacher_logits = teacher(found.teacher["input_ids"], found.teacher["attention_mask"]).logits
    losses = []
    for _ in range(6):
        logits = student(found.student["input_ids"], found.student["attention_mask"]).logits
        uld = uld_loss(logits[b, i], teacher_logits[b, j])
        sequence = multi_level_ot_loss(logits, teacher_logits, *found.masks, top_k=20)
        losses.append((uld.item(), sequence.loss.item()))
        optimizer.zero_grad()
        (uld + sequence.loss).backward()
        optimizer.step()
    assert losses[-1][0] < 0.9 * losses[0][0] and losses[-1][1] < losses[0][1]
    assert torch.tensor(losses).isfinite().all()


def test_tokenizers_without_offsets_or_end():
    slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(ValueError, match=r"student_tokenizer.*fast"):
        align_texts(["a"], slow, lm.tokenizer(300))
    with pytest.raises(ValueError, match="prompts: expected one for each of 1 texts"):
        align_texts(["a"], lm.tokenizer(300), lm.tokenizer(300), prompts=[])
