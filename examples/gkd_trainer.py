"""TRL's GKDTrainer with kdfast's loss in place of its own: the student learns on given answers and on its own (on-policy).

    python examples/gkd_trainer.py --model Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-4B --data chats.jsonl \
        --output_dir runs/gkd --lmbda 0.5 --beta 0.5

Each line of the data has "messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]. Everything of
GKDConfig is an option. `KDTrainer(on_policy=...)` trains this objective without logits (docs/trainers.md).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from datasets import load_dataset
from transformers import AutoTokenizer, HfArgumentParser
from trl.experimental.gkd import GKDConfig, GKDTrainer

from kdfast.integrations.trl import generalized_jsd_loss


class FusedGKDTrainer(GKDTrainer):
    generalized_jsd_loss = staticmethod(generalized_jsd_loss)  # the one changed line


@dataclass
class Job:
    model: str  # name or folder of the student, with its tokenizer and chat template
    data: str  # a JSONL file of conversations


def main(arguments: list[str]) -> FusedGKDTrainer:
    job, args = HfArgumentParser((Job, GKDConfig)).parse_args_into_dataclasses(arguments)
    trainer = FusedGKDTrainer(
        job.model,
        teacher_model=args.teacher_model_name_or_path,
        args=args,
        processing_class=AutoTokenizer.from_pretrained(job.model),
        train_dataset=load_dataset("json", data_files=job.data, split="train"),
    )
    trainer.train()
    trainer.save_model()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} at the end")
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
