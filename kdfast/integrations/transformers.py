"""The Trainer of `transformers` with a teacher: KDTrainer and KDTrainingArguments.

    args = KDTrainingArguments("runs/kd", teacher_model="Qwen/Qwen3-4B", kind="js", temperature=1.0)
    KDTrainer("Qwen/Qwen3-0.6B", args=args, train_dataset=rows, processing_class=tokenizer).train()

The Trainer trains; this gives it the loss. Every step's loss is a mean over all tokens that count in all its micro-batches on all
processes; an evaluation's loss is the mean over all tokens that count in the data set.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

try:
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
except ImportError as error:
    raise ImportError(
        f"kdfast.integrations.transformers needs the 'hf' extra ({error}): pip install 'kdfast[train,hf]'"
    ) from error

from kdfast.data.text import differing_tokens, name_tokens
from kdfast.integrations.causal_lm import IGNORE, TARGETS, CausalLMLoss, States, model_inputs, next_labels, through
from kdfast.integrations.on_policy import sampled_batch
from kdfast.integrations.sharding import shard_like_student
from kdfast.ops.sparse_divergence import SampledTeacher, TopKTeacher

logger = logging.getLogger(__name__)
LISTS = ("teacher_ids", "teacher_log_probs", "teacher_tail")  # columns of a row of a TeacherCache


@dataclass
class KDTrainingArguments(TrainingArguments):
    """TrainingArguments and what is distilled. One of teacher_model and teacher_cache, unless KDTrainer gets the teacher itself."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "teacher_model_init_kwargs",
    ]

    teacher_model: str | None = field(default=None, metadata={"help": "Name or folder of the teacher."})
    teacher_cache: str | None = field(
        default=None, metadata={"help": "Folder of a teacher cache; rows of the data need their row_id."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "For from_pretrained of the student, when it is given by name."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "For from_pretrained of the teacher, when it is given by name."}
    )
    kind: str = field(default="forward_kl", metadata={"help": "Divergence, see kdfast.ops.divergence."})
    beta: float = field(default=0.5, metadata={"help": "Its parameter (js: 0 is forward KL, 1 reverse KL)."})
    temperature: float = field(default=1.0, metadata={"help": "Of both distributions in the divergence."})
    ce_weight: float = field(default=0.5, metadata={"help": "Factor of cross-entropy with the labels."})
    kd_weight: float = field(default=0.5, metadata={"help": "Factor of the divergence."})
    scale_t2: bool = field(default=True, metadata={"help": "Multiply the divergence by the squared temperature."})
    vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "Compare the first so many classes. None: all, or len(tokenizer) if the models differ in size."
        },
    )
    chunk_rows: int | None = field(default=None, metadata={"help": "Rows of logits held at a time. None: chosen."})
    use_logits: bool = field(default=False, metadata={"help": "Make all logits, to compare; slower and larger."})
    on_policy: float = field(
        default=0.0,
        metadata={"help": "Share of steps on sequences that the student samples; there is no cross-entropy in them."},
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Length of sampled answers at most."})
    sampling_temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling."})


class KDTrainer(Trainer):
    """A Trainer whose loss is ce_weight CE + kd_weight T^2 D(teacher, student), from hidden states and output layers.

    Batches hold `input_ids`, `labels` (not shifted, -100 where nothing is learned) and what else the models take. Padding may be
    on either side; packed rows have -100 or a `position_ids` of 0 at the first token of each document. Logs have the parts "ce" and
    "kd" (T^2 in it, weights not) beside the loss; evaluation has `eval_ce` and `eval_kd`. With `compute_metrics` the evaluation
    makes all logits, as Trainer does.

    Args:
        model: a causal language model, or its name or folder.
        teacher_model: the teacher, instead of `args.teacher_model`; frozen, on the student's device, sharded with FSDP if it is.
        teacher_cache: a `TeacherCache` or its folder, instead of `args.teacher_cache`. Without a train_dataset its rows are trained on;
            a part of them, and others for evaluation, are `Subset`s of it. Batches of another data set hold `row_id`, and are padded on the right.
        teacher_processing_class: the teacher's tokenizer, checked to mean the same tokens as `processing_class` by the first
            `vocab_size` ids (None: by all). With a teacher given by name it is loaded.
        Others: as in Trainer.
    Raises:
        ValueError: no teacher or two, or the student itself; vocabularies of two sizes without `vocab_size` or a tokenizer that says where they agree;
            tokenizers that differ (see `kdfast.losses.uld_loss`); label smoothing, `compute_loss_func`, nn.DataParallel.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        args: KDTrainingArguments | None = None,
        *positional: Any,
        teacher_model: nn.Module | str | Path | None = None,
        teacher_cache: Any = None,
        teacher_processing_class: Any = None,
        **options: Any,
    ) -> None:
        args = args or KDTrainingArguments("tmp_trainer")
        teacher: Any = args.teacher_model if teacher_model is None else teacher_model
        teacher_cache = args.teacher_cache if teacher_cache is None else teacher_cache
        if (teacher is None) == (teacher_cache is None):
            raise ValueError(
                f"teacher_model, teacher_cache: expected one of them, got {'none' if teacher is None else 'both'}"
            )
        if args.label_smoothing_factor or options.get("compute_loss_func") is not None:
            raise ValueError(
                "label_smoothing_factor, compute_loss_func: this trainer has its own loss, so expected neither"
            )
        if teacher is model and isinstance(model, nn.Module):
            raise ValueError(
                "teacher_model: expected another model than the student, which a frozen teacher would freeze"
            )
        if not 0 <= args.on_policy <= 1:
            raise ValueError(f"on_policy: expected a share of the steps from 0 to 1, got {args.on_policy}")
        if args.on_policy and teacher is None:
            raise ValueError("on_policy: no cache has scored what the student will sample; expected a teacher_model")
        if isinstance(model, (str, Path)):
            # In float32: small steps round away in bfloat16 weights (bf16=True computes in bfloat16).
            wanted: Any = args.model_init_kwargs or {}
            model = load_model(model, {"dtype": "float32", **wanted})
        if isinstance(teacher, (str, Path)):
            if teacher_processing_class is None and options.get("processing_class") is not None:
                teacher_processing_class = AutoTokenizer.from_pretrained(teacher)
            teacher = load_model(teacher, args.teacher_model_init_kwargs)
        if teacher_cache is not None:
            teacher_cache = open_cache(teacher_cache)
            if not positional:
                if options.get("train_dataset") is None:
                    options["train_dataset"] = teacher_cache
                if options.get("data_collator") is None and is_of_cache(options["train_dataset"]):
                    options["data_collator"] = teacher_cache.collate
        super().__init__(model, args, *positional, **options)
        if args.n_gpu > 1:
            raise ValueError(
                f"n_gpu: expected one process for each GPU (torchrun, accelerate launch), got {args.n_gpu} in one"
            )
        if args.on_policy and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "on_policy: sampling needs the whole student on each process, got it sharded (TRL has servers for that)"
            )
        # compute_loss divides by num_items_in_batch
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.teacher_cache, self.teacher = teacher_cache, None
        if teacher_cache is not None:
            if teacher_cache.temperature != args.temperature:
                raise ValueError(
                    f"temperature: expected that of the cache, {teacher_cache.temperature}, got {args.temperature}"
                )
            teacher_cache.check_tokenizer(self.processing_class)
        classes = self._classes(teacher, teacher_processing_class)
        self.criterion = CausalLMLoss(
            kind=args.kind, beta=args.beta, temperature=args.temperature, ce_weight=args.ce_weight, kd_weight=args.kd_weight,
            scale_t2=args.scale_t2, vocab_size=classes, chunk_rows=args.chunk_rows, use_logits=args.use_logits,
        )  # fmt: skip
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            self.teacher = shard_like_student(teacher, self.accelerator)
        self._seen: dict[
            str, Tensor
        ] = {}  # mode -> sums of (ce, kd, tokens, tokens with ce) since the last log or evaluation
        self._all_logits = True

    def _classes(self, teacher: nn.Module | None, teacher_tokenizer: Any) -> int | None:
        """How many classes are compared: None for all of them."""
        tokenizer, classes = self.processing_class, self.args.vocab_size
        if teacher is None:
            size, known = head_size(self.model), self.teacher_cache.vocab_size
            if size is not None and size < (classes or known):
                raise ValueError(
                    f"teacher_cache: its lists are of {known} classes, the student has {size}; make the cache with vocab_size={size}"
                )
            if classes is not None and classes < known:
                raise ValueError(f"vocab_size: expected at least the {known} classes of the cache, got {classes}")
            return classes
        sizes: Any = [head_size(model) for model in (self.model, teacher)]
        if tokenizer is not None and teacher_tokenizer is not None:
            check_same_tokens(tokenizer, teacher_tokenizer, classes)
        if classes is not None or None in sizes or sizes[0] == sizes[1]:
            return classes
        if tokenizer is None or len(tokenizer) > min(sizes):
            raise ValueError(
                f"vocab_size: the student has {sizes[0]} classes and the teacher {sizes[1]}; expected how many of the first are the "
                "same tokens in both, len(tokenizer) of padded vocabularies"
            )
        logger.warning(
            "student and teacher have %d and %d classes; comparing the %d of the tokenizer", *sizes, len(tokenizer)
        )
        return len(tokenizer)

    # ---------------------------------------------------------------- batches
    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: Any = sorted({*self._signature_columns, *TARGETS, *LISTS})

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self._samples_now():
            model = self.accelerator.unwrap_model(self.model_wrapped)
            batches = [self._sampled(model, batch) for batch in batches]
            count = self._get_num_items_in_batch(batches, device)
        return batches, count

    def _samples_now(self) -> bool:
        """Whether this step is on-policy: the same on all processes and after a resume."""
        if self.args.on_policy <= 0:
            return False
        generator = torch.Generator().manual_seed(self.args.seed + 7919 * self.state.global_step)
        return bool(torch.rand((), generator=generator) < self.args.on_policy)

    def _sampled(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        tokenizer = self.processing_class
        return sampled_batch(
            model, self._prepare_inputs(batch), max_new_tokens=self.args.max_new_tokens,
            temperature=self.args.sampling_temperature, pad_token_id=getattr(tokenizer, "pad_token_id", None),
        )  # fmt: skip

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Counts what the loss keeps; Trainer's own count would have the first token after left padding in it."""
        if any(batch.get("labels") is None and batch.get("shift_labels") is None for batch in batch_samples):
            return None  # prompts alone, before the student has answered them
        counted = [next_labels(batch) for batch in batch_samples]
        return super()._get_num_items_in_batch([{"labels": y, "shift_labels": y} for y in counted], device)

    # ---------------------------------------------------------------- the loss
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels, student = next_labels(inputs), self.accelerator.unwrap_model(model)
        training, known = student.training, self._teach(inputs)
        ce_weight = 0.0 if inputs.get("on_policy") else None  # its labels are its own

        def run(forward: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor], Any]:
            said = self.criterion.readers["student"](
                student, inputs, forward, all_logits=return_outputs and self._all_logits
            )
            loss, parts = self.criterion.compare(
                said, known, labels, reduction="sum" if training else "none", ce_weight=ce_weight
            )
            return loss, parts, said.outputs

        loss, parts, outputs = through(model, student, run, model_inputs(inputs))
        kept = (labels != IGNORE).sum(-1)  # [B]
        wide = torch.float32 if kept.device.type == "mps" else torch.float64
        ce, kd = parts["ce"].to(wide), parts["kd"].to(wide)
        if training:
            tokens = kept.sum().to(wide)
            scored = torch.zeros_like(tokens) if ce_weight == 0 else tokens  # sampled answers have no cross-entropy
            self._note("train", torch.stack((ce, kd, tokens, scored)))
        else:  # by sequences, since a loader on several processes repeats some to fill its last batch
            rows = torch.stack((ce.sum(-1), kd.sum(-1), kept.to(wide), kept.to(wide)), -1)  # [B, 4]
            self._note("eval", self.accelerator.gather_for_metrics(rows).sum(0))
            loss = loss.sum()
        if num_items_in_batch is None:
            loss = loss / kept.sum().clamp_min(1)
        else:  # no item in any micro-batch: 0 and not 0 / 0
            count = torch.as_tensor(num_items_in_batch, device=loss.device).clamp_min(1)
            loss = loss / count
            if (
                self.args.average_tokens_across_devices
            ):  # DDP takes the mean of processes, whose tokens are all in the count
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _teach(self, inputs: Mapping[str, Any]) -> States | TopKTeacher | SampledTeacher:
        if self.teacher_cache is not None:
            return self._cached(inputs)
        with self.accelerator.autocast():
            return self.criterion.teach(
                self.accelerator.unwrap_model(self.teacher), model_inputs(inputs), wrapper=self.teacher
            )

    def _cached(self, inputs: Mapping[str, Any]) -> TopKTeacher:
        """The cache's lists of a batch, which came along with its rows or are found by their row_id."""
        if LISTS[0] not in inputs:
            if inputs.get("row_id") is None:
                raise ValueError(f"batch: expected row_id, the rows' places in the cache, got only {', '.join(inputs)}")
            learned = (next_labels(inputs) != IGNORE).cpu()
            inputs = self.teacher_cache.rows(inputs["row_id"].tolist(), inputs["input_ids"])
            without = learned & (inputs[LISTS[0]] < 0).all(-1)
            if bool(without.any()):
                row, token = without.nonzero()[0].tolist()
                raise ValueError(
                    f"labels: token {token} of row {row} is learned, but had no label when the cache was made"
                )
        lists = self._prepare_inputs({name: inputs[name] for name in LISTS})
        return TopKTeacher(lists[LISTS[0]], lists[LISTS[1]], lists[LISTS[2]], self.teacher_cache.temperature)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ):
        self._all_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._all_logits = True

    # ---------------------------------------------------------------- logs
    def _note(self, mode: str, sums: Tensor) -> None:
        self._seen[mode] = self._seen.get(mode, 0) + sums.detach()

    def _means(self, sums: Tensor) -> dict[str, float]:
        ce, kd, tokens, scored = sums.tolist()
        return {"ce": ce / max(scored, 1), "kd": kd / max(tokens, 1)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        sums = self._seen.pop("train", None) if "loss" in logs else None
        if sums is not None:
            logs = logs | self._means(self.accelerator.reduce(sums, "sum"))
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        self._seen.pop("eval", None)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        if (sums := self._seen.pop("eval", None)) is not None:
            means = self._means(sums)
            weights = {"ce": self.args.ce_weight, "kd": self.args.kd_weight}
            means["loss"] = sum(w * means[name] for name, w in weights.items() if w != 0)  # 0 times infinity is not 0
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output


# ---------------------------------------------------------------- small parts
def load_model(name: str | Path, options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, **(options or {}))


def open_cache(cache: Any) -> Any:
    if not isinstance(cache, (str, Path)):
        return cache
    from kdfast.data.teacher_cache import TeacherCache

    return TeacherCache(cache)


def is_of_cache(data: Any) -> bool:
    """Whether its rows bring their lists along: a TeacherCache, or a Subset of one."""
    from kdfast.data.teacher_cache import TeacherCache

    while isinstance(data, Subset):
        data = data.dataset
    return isinstance(data, TeacherCache)


def head_size(model: Any) -> int | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    return None if weight is None else weight.shape[0]


def check_same_tokens(tokenizer: Any, teacher_tokenizer: Any, classes: int | None = None) -> None:
    """A divergence compares class i with class i: of the first `classes` ids (None: of all) the same one has to be the same token.

    Tokens added to one of the two differ at the end; the error says which `vocab_size` leaves them out. That is not done unasked,
    since such a token could not be a label then.
    """
    differing = differing_tokens(tokenizer, teacher_tokenizer)
    if classes is not None:
        differing = {index: tokens for index, tokens in differing.items() if index < classes}
    if not differing:
        return
    first = min(differing)
    added: list[dict[str, int]] = [getattr(one, "get_added_vocab", dict)() for one in (tokenizer, teacher_tokenizer)]
    one_sided = all(
        sum(token is not None for token in two) == 1 and all(t is None or t in known for t, known in zip(two, added))
        for two in differing.values()
    )
    way = f"vocab_size={first} leaves the added ones out, which then cannot be labels; " if one_sided else ""
    raise ValueError(
        f"teacher_processing_class: expected the tokens of processing_class, got {len(differing)} that differ, here and there "
        f"{name_tokens(differing)}; {way}kdfast.losses.uld_loss compares models with two tokenizers"
    )
