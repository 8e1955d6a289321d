"""KDTrainer on a small corpus. As a script: one rank of a test on two processes, ddp.py <out>, with torchrun's variables."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
import lm
import torch

from kdfast.integrations.causal_lm import CausalLMLoss, model_inputs, next_labels, through
from kdfast.integrations.transformers import KDTrainer, KDTrainingArguments

VOCAB = 300


class Rows(torch.utils.data.Dataset):
    """Texts of different lengths, with prompts of different lengths."""

    def __init__(self, n: int = 16, length: int = 18) -> None:
        tokenizer = lm.tokenizer(VOCAB)
        self.tokens = [tokenizer(text)["input_ids"][: length - i % 5] for i, text in enumerate(lm.TEXTS[:n])]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict:
        tokens = self.tokens[i]
        return {"input_ids": tokens, "labels": [-100] * (i % 7) + tokens[i % 7 :], "row_id": i}


def padded(side: str = "right"):
    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        columns: dict[str, list] = {"input_ids": [], "labels": [], "attention_mask": []}
        for row in rows:
            row = row | {"attention_mask": [1] * len(row["input_ids"])}
            for (name, column), fill in zip(columns.items(), (1, -100, 0)):
                pads = [fill] * (length - len(row[name]))
                column.append(pads + row[name] if side == "left" else row[name] + pads)
        return {name: torch.tensor(column) for name, column in columns.items()} | {
            "row_id": torch.tensor([row["row_id"] for row in rows])
        }

    return collate


def trainer(
    out: str | Path,
    *,
    side: str = "right",
    steps: int = 4,
    teacher=None,
    rows: int = 16,
    data_collator=None,
    teacher_cache=None,
    own_rows: bool = False,
    **options,
):
    arguments = {
        "output_dir": str(out), "max_steps": steps, "learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "per_device_train_batch_size": 4, "temperature": 2.0, "kind": "js",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    args = KDTrainingArguments(**arguments | options)
    named = {"train_dataset": Rows(rows), "data_collator": data_collator or padded(side)}
    if teacher is not False:
        named["teacher_model"] = teacher or lm.llama(VOCAB, 48, seed=1).double()
    if teacher_cache is not None:
        named["teacher_cache"] = teacher_cache
    if own_rows:
        named = {"teacher_cache": teacher_cache}
    return KDTrainer(
        lm.llama(VOCAB, 32).double(), args=args, eval_dataset=Rows(11), processing_class=lm.tokenizer(VOCAB), **named
    )


def report(kd: KDTrainer) -> dict:
    kept = ("loss", "ce", "kd", "grad_norm")
    return {
        "steps": [{k: row[k] for k in kept} for row in kd.state.log_history if "loss" in row],
        "eval": kd.evaluate(),
    }


def sharded_gradients(form: str) -> dict:
    """Loss and gradients of this process's half of a batch, both models sharded by FSDP; form None: of the whole batch."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    rank = torch.distributed.get_rank() if form != "none" else 0
    rows = [Rows()[i] for i in range(6)]
    batch = padded()(rows if form == "none" else rows[3 * rank : 3 * rank + 3])
    batch.pop("row_id")
    student, teacher = lm.llama(VOCAB, 32), lm.llama(VOCAB, 48, seed=1).requires_grad_(False)
    criterion, wrappers = CausalLMLoss(kind="js"), [student, teacher]
    if form == "fsdp1":
        wrappers = [FullyShardedDataParallel(m, device_id=torch.device("cpu"), use_orig_params=True) for m in wrappers]
    elif form == "fsdp2":
        for model in wrappers:
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
    for _ in range(2):  # the first call confirms the heads
        student.zero_grad()
        known = criterion.teach(teacher, model_inputs(batch), wrapper=wrappers[1])
        labels = next_labels(batch)

        def run(forward, inputs, known=known, labels=labels):
            said = criterion.readers["student"](student, inputs, forward)
            return criterion.compare(said, known, labels, reduction="sum").loss

        loss = through(wrappers[0], student, run, model_inputs(batch))
        loss.backward()
    assert [reader.reason for reader in criterion.readers.values()] == [None, None]
    if form == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(wrappers[0], with_grads=True):
            grads = {name: p.grad.clone() for name, p in student.named_parameters()}
    else:
        grads = {n: p.grad.full_tensor() if form == "fsdp2" else p.grad for n, p in student.named_parameters()}
    if form != "none":
        torch.distributed.all_reduce(loss := loss.detach().clone())
    return {"loss": loss.item(), "grads": grads}


def sharded_trainer(out: Path, **options) -> KDTrainer:
    """Trained with both models sharded by accelerate's FSDP2, which it starts on accelerators only: it is told that this is one."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType

    begin = Accelerator.__init__

    def begin_sharded(self, *args, **named):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        begin(self, *args, **named)

    settings = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer", "FSDP_RESHARD_AFTER_FORWARD": "true",
    }  # fmt: skip
    with mock.patch.dict(os.environ, settings), mock.patch.object(Accelerator, "__init__", begin_sharded):
        kd = trainer(out, **options)
        assert kd.is_fsdp_enabled and type(kd.teacher).__name__.startswith("FSDP")
        kd.train()
    assert [reader.reason for reader in kd.criterion.readers.values()] == [None, None]
    return kd


if __name__ == "__main__":
    out, processes = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1"))
    kd = trainer(out, per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2, steps=2)
    kd.train()
    found = report(kd) | {"processes": processes}
    if kd.is_world_process_zero():
        (out / "report.json").write_text(json.dumps(found))
        torch.save({k: v.clone() for k, v in kd.model.state_dict().items()}, out / "weights.pt")
    if processes > 1:
        found = report(sharded_trainer(out, per_device_train_batch_size=2, gradient_accumulation_steps=2, steps=2))
        if kd.is_world_process_zero():
            (out / "sharded.json").write_text(json.dumps(found))
        for form in ("fsdp1", "fsdp2"):
            found = sharded_gradients(form)
            if kd.is_world_process_zero():
                torch.save(found, out / f"{form}.pt")
        torch.distributed.destroy_process_group()
