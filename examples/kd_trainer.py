"""A smaller causal language model learns from a larger one, in the Trainer of transformers: one process or many.

    python examples/kd_trainer.py --model Qwen/Qwen3-0.6B --teacher_model Qwen/Qwen3-4B --data corpus/ --output_dir runs/kd
    accelerate launch examples/kd_trainer.py ... --kind js --beta 0.5 --bf16 --gradient_accumulation_steps 8
    accelerate launch --use_fsdp examples/kd_trainer.py ...     the teacher is sharded like the student

Everything of KDTrainingArguments and TrainingArguments is an option. Started again it goes on from its last checkpoint.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch.utils.data import Subset
from transformers import AutoTokenizer, HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from kdfast.data.text import collate_rows, token_rows
from kdfast.integrations.transformers import KDTrainer, KDTrainingArguments


@dataclass
class Job:
    model: str  # name or folder of the student, with its tokenizer
    data: str  # a folder of text, JSONL or parquet, or the name of a data set
    max_length: int = 1024
    held_out: int = 100  # rows for evaluation


def main(arguments: list[str]) -> KDTrainer:
    job, args = HfArgumentParser((Job, KDTrainingArguments)).parse_args_into_dataclasses(arguments)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rows = token_rows(job.data, tokenizer, max_length=job.max_length)
    held = min(job.held_out, len(rows) // 10)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = KDTrainer(
        job.model,
        args,
        processing_class=tokenizer,
        train_dataset=Subset(rows, range(held, len(rows))),
        eval_dataset=Subset(rows, range(held)),
        data_collator=partial(collate_rows, pad_id=pad_id),
    )
    before = trainer.evaluate()
    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    after = trainer.evaluate()
    for name in ("loss", "ce", "kd"):
        print(f"{name}: {before[f'eval_{name}']:.4f} before, {after[f'eval_{name}']:.4f} after")
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
