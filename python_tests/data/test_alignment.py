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
    # a character of several bytes in two tokens (2, 3), (2, 3): read at the second
    assert aligned_rows([(0, 2), (2, 3), (2, 3), (3, 5)], [(0, 3), (3, 4), (4, 5)]).tolist() == [[2, 0]]
    assert aligned_rows([(0, 3)], [(0, 1), (1, 3)]).tolist() == []
    assert aligned_rows(torch.zeros(0, 2), [(0, 1), (1, 3)]).tolist() == []
    with pytest.raises(ValueError, match="teacher_offsets"):
        aligned_rows(student, [1, 2, 3])


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


def test_every_such_row_is_paired(aligned):
    """Against the definition: all pairs whose bytes so far are equal, of learned tokens."""
    texts, _, tokenizers, found = aligned
    paired = {tuple(row) for row in found.rows.tolist()}
    for b in range(len(texts)):
        reads = []
        for tokenizer, side in zip(tokenizers, (found.student, found.teacher)):
            ids, labels = side["input_ids"][b].tolist(), side["labels"][b].tolist()
            so_far = {}
            for k in range(int(side["attention_mask"][b].sum()) - 1):
                text = tokenizer.decode(ids[: k + 1])
                if labels[k + 1] != -100 and "\ufffd" not in text:  # a whole number of characters
                    so_far[text] = k
            reads.append(so_far)
        for text in reads[0].keys() & reads[1].keys():
            assert (b, reads[0][text], reads[1][text]) in paired


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
        sequence = multi_level_ot_loss(
            logits, teacher_logits, found.student["labels"] != -100, found.teacher["labels"] != -100, top_k=20
        )
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
