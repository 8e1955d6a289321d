"""The second main job: a teacher language model, then students from labels alone, from the live teacher and from its cache.

Without names it needs no network: a small teacher is trained on the sources of the standard library, smaller students after it.
Every finished piece is a file in `out`, and a piece that was stopped goes on from its last checkpoint. One teacher, its cache and the
text are shared by all arms; a seed is initial weights and order of batches, the same for every arm. The score is bits per byte of
text that no model was trained on (`kdfast.metrics.language`).

Of a text with more rows than a student's steps take, as many are chosen, once for all arms and seeds: they are what the cache holds.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler

from kdfast import __version__, backend_info
from kdfast._extras import needs, processes
from kdfast._files import write_text
from kdfast.data.stdlib_text import corpus_identity, split_of, stdlib_text, train_tokenizer
from kdfast.data.teacher_cache import TeacherCache, cache_teacher
from kdfast.data.text import (
    TokenRows,
    collate_rows,
    differing_tokens,
    load_text,
    load_tokenizer,
    name_tokens,
    token_rows,
    vocabulary,
)
from kdfast.experiment import claim, commit, joined, once
from kdfast.lm_cost import compare_cost
from kdfast.lm_loss import LanguageLoss
from kdfast.lm_report import comparisons, draw, markdown
from kdfast.metrics.comparison import summary
from kdfast.metrics.language import Windows, bits_per_byte, windows_of
from kdfast.ops.divergence import KINDS
from kdfast.ops.sparse_divergence import SPARSE_KINDS, TopKTeacher
from kdfast.train import Distiller

TEACHER = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
STUDENT = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
ARMS = ("ce", "forward_kl", "reverse_kl", "js", "topk_forward_kl", "topk_reverse_kl")
CACHED = "topk_"
SAVE_EVERY = 100  # optimizer steps between checkpoints of a piece
LR, LR_BY_NAME = 4e-3, 2e-5  # from scratch, and for a student that has been trained
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What a run depends on; a folder holds one of them. Names are ids or folders of transformers and datasets, None: embedded."""

    teacher: str | None = None
    student: str | None = None
    data: str | None = None
    arms: tuple[str, ...] = ARMS
    steps: int = 120
    teacher_steps: int = 400
    batch_size: int = 8
    length: int = 128  # tokens of a row
    lr: float | None = None  # of students, LR where it is not given; the small teacher has half of LR
    eval_every: int = 40
    temperature: float = 1.0
    top_k: int = 32
    vocab_size: int = 4096  # of the tokenizer that is trained when no teacher brings one
    # bytes of text that the small teacher sees, students and the cache, and the validation
    teacher_bytes: int = 4_000_000
    student_bytes: int = 400_000
    val_bytes: int = 60_000

    def __post_init__(self) -> None:
        known = ("ce", *(kind for kind in KINDS if kind != "dkd"), *(CACHED + kind for kind in SPARSE_KINDS))
        unknown = [arm for arm in self.arms if arm not in known]
        if self.student is not None and self.teacher is None:
            raise ValueError(f"teacher: expected one with the tokenizer of the student {self.student}, got none")
        if unknown or not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(
                f"kinds: expected different ones of {', '.join(known)}, got {', '.join(self.arms) or 'none'}"
            )
        for name in (
            "steps",
            "teacher_steps",
            "batch_size",
            "length",
            "eval_every",
            "top_k",
            "teacher_bytes",
            "student_bytes",
            "val_bytes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected >= 1, got {getattr(self, name)}")


def run(
    settings: Settings, *, seeds: int = 3, out: str | Path, on_progress: Progress = lambda what, done, total: None
) -> dict[str, Any]:
    """Runs what is not in `out` yet; writes results.json, curves.png, report.md, teacher/ and students/; returns the results.

    Raises:
        ValueError: settings that contradict each other, or an `out` that holds a run with other settings.
        ImportError: without the hf extra.
    """
    needs("transformers", "hf").utils.logging.disable_progress_bar()  # there is one bar, ours
    needs("datasets", "hf").disable_progress_bars()
    if seeds < 1:
        raise ValueError(f"seeds: expected >= 1, got {seeds}")
    out = Path(out)
    claim(out, {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()})
    job = Job(settings, out)
    live = [f"{arm}-{seed}" for seed in range(seeds) for arm in settings.arms if not arm.startswith(CACHED)]
    cached = [f"{arm}-{seed}" for seed in range(seeds) for arm in settings.arms if arm.startswith(CACHED)]
    names = ["teacher", *live, *(["cache", *cached] if cached else []), "cost"]
    make: dict[str, Callable[[], dict[str, Any]]] = {
        "teacher": job.make_teacher,
        "cache": job.make_cache,
        "cost": job.cost,
    }
    make |= {f"{arm}-{seed}": partial(job.train_arm, arm, seed) for arm in settings.arms for seed in range(seeds)}
    pieces: dict[str, dict[str, Any]] = {}
    for name in names:
        on_progress(name, len(pieces), len(names))
        pieces[name] = once(out / "runs" / f"{name}.json", make[name])
        shutil.rmtree(out / "runs" / name, ignore_errors=True)  # the checkpoint of a finished piece
    on_progress("report", len(names), len(names))
    results = _results(job, seeds, pieces)
    draw(results, out / "curves.png")
    write_text(out / "results.json", json.dumps(results, indent=1))
    write_text(out / "report.md", markdown(results))
    return results


class Job:
    """The text, the models and the pieces of a run; text and teacher are read when the first piece asks."""

    def __init__(self, settings: Settings, out: Path) -> None:
        self.settings, self.out = settings, out

    # ---------------------------------------------------------------- text
    @cached_property
    def documents(self) -> dict[str, list[str]]:
        """{"teacher", "student", "val"}: documents each."""
        s = self.settings
        if s.data is None:
            return {
                "teacher": stdlib_text("train", max_bytes=s.teacher_bytes),
                "student": stdlib_text("train", max_bytes=s.student_bytes),
                "val": stdlib_text("val", max_bytes=s.val_bytes),
            }
        texts = load_text(s.data)
        if "text" not in texts.column_names:
            raise ValueError(f"data: expected a column 'text', got {', '.join(texts.column_names)}")
        parts: dict[str, list[str]] = {"train": [], "val": []}
        size = 0
        for text in texts["text"]:
            parts[split_of(text)].append(text)  # by the hash of the text: a copy is never on the other side
        val: list[str] = []
        for text in parts["val"]:
            size += len(text.encode())
            if val and size > s.val_bytes:
                break
            val.append(text)
        if not val or not parts["train"]:
            raise ValueError(f"data: expected enough documents to keep one in 20 for validation, got {len(texts)}")
        return {"teacher": parts["train"], "student": parts["train"], "val": val}

    @cached_property
    def tokenizer(self) -> Any:
        s = self.settings
        if s.teacher is not None:
            _ = self.agreed
            return load_tokenizer(s.teacher)
        folder = self.out / "tokenizer"
        if not (folder / "tokenizer_config.json").exists():
            train_tokenizer(self.documents["teacher"], s.vocab_size).save_pretrained(folder)
        return load_tokenizer(folder)

    @cached_property
    def agreed(self) -> int | None:
        """Student and teacher mean the same tokens by the first so many ids; None: by all.

        What the student alone has after the teacher's ids is in no text here, which the teacher's tokenizer has read.
        """
        s = self.settings
        if s.student is None or s.teacher is None:
            return None
        ours, theirs = load_tokenizer(s.student), load_tokenizer(s.teacher)
        differing = differing_tokens(ours, theirs)
        if not differing:
            return None
        first = min(differing)
        if first <= vocabulary(theirs)[-1][0]:
            raise ValueError(
                f"student: {s.student} has another tokenizer than {s.teacher}, here and there {name_tokens(differing)}; "
                "their tokens cannot be compared one by one"
            )
        return first

    def rows(self, part: str) -> TokenRows:
        return token_rows(self.documents[part], self.tokenizer, max_length=self.settings.length, packing=True)

    @cached_property
    def student_rows(self) -> TokenRows:
        """What every student reads and the cache holds: all rows, or as many as the steps take."""
        rows, s = self.rows("student"), self.settings
        epochs, per_epoch = _epochs(s.steps, s.eval_every)
        wanted = epochs * per_epoch * s.batch_size
        if wanted >= len(rows):
            return rows
        # of no seed: more seeds in the same folder go on with the same cache
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:wanted].sort().values
        return TokenRows(rows.table.select(chosen.tolist()))

    @cached_property
    def validation(self) -> Windows:
        tokenizer = self.tokenizer
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError(
                "teacher: its tokenizer has no begin or end token to predict the first token of a text from"
            )
        return windows_of(
            self.documents["val"],
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            start,
            self.settings.length,
        )

    # ---------------------------------------------------------------- models
    def model(self, name: str | None, widths: dict[str, int], seed: int, dtype: str = "auto") -> nn.Module:
        """A model of transformers by name, or a small Llama with the tokenizer's vocabulary and initial weights of the seed."""
        transformers = needs("transformers", "hf")
        if name is not None:
            return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        config = transformers.LlamaConfig(
            vocab_size=len(self.tokenizer), max_position_embeddings=max(self.settings.length, 128), tie_word_embeddings=True,
            bos_token_id=self.tokenizer.bos_token_id, eos_token_id=self.tokenizer.eos_token_id, pad_token_id=None, **widths,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return transformers.AutoModelForCausalLM.from_config(config)

    def student(self, seed: int) -> nn.Module:
        return self.model(self.settings.student, STUDENT, seed, "float32")  # bfloat16 would round steps of 2e-5 away

    @cached_property
    def teacher(self) -> nn.Module:
        """Trained: from its name, or from the folder its training wrote."""
        name = self.settings.teacher or str(self.out / "teacher")
        return self.model(name, TEACHER, 0).eval().requires_grad_(False).to(processes().device)

    # ---------------------------------------------------------------- pieces
    def make_teacher(self) -> dict[str, Any]:
        s = self.settings
        if s.teacher is not None:
            row = {"bits_per_byte": bits_per_byte(self.teacher, self.validation), "curve": []}
            return row | {"parameters": count_parameters(self.teacher), "commit": commit()}
        model = self.model(None, TEACHER, 0)
        loss = LanguageLoss(None)
        row = self.fit("teacher", model, None, loss, self.rows("teacher"), 0, s.teacher_steps, LR / 2)
        return row

    def make_cache(self) -> dict[str, Any]:
        s, work = self.settings, []
        start = time.perf_counter()
        cache = cache_teacher(
            self.teacher, self.student_rows, self.out / "cache", tokenizer=self.tokenizer, top_k=s.top_k, temperature=s.temperature,
            vocab_size=self.classes(self.student(0)), batch_size=s.batch_size, on_progress=lambda done, total: work.append(total),
        )  # fmt: skip
        seconds = time.perf_counter() - start
        totals = cache.manifest["totals"]
        tokens = totals["tokens"]
        return {
            "per_token": cache.top_k, "kept_mass": cache.kept_mass, "rows": len(cache), "tokens": tokens,
            "bytes_per_token": totals["bytes"] / tokens,
            "tokens_per_second": max(work, default=0) / seconds, "commit": commit(),
        }  # fmt: skip

    @cached_property
    def cache(self) -> TeacherCache:
        return TeacherCache(self.out / "cache", tokenizer=self.tokenizer, temperature=self.settings.temperature)

    def listed(self, batch: Any) -> TopKTeacher:
        """The teacher of a batch, from the cache."""
        rows = self.cache.rows(batch["row_id"], batch["input_ids"])
        device = batch["input_ids"].device
        return self.cache.pop_teacher({name: value.to(device) for name, value in rows.items()})

    def train_arm(self, arm: str, seed: int) -> dict[str, Any]:
        s = self.settings
        student, lr = self.student(seed), s.lr or (LR if s.student is None else LR_BY_NAME)
        return self.fit(
            f"{arm}-{seed}", student, self.taught(arm), self.loss(arm, student), self.student_rows, seed, s.steps, lr
        )

    def taught(self, arm: str) -> nn.Module | None:
        return None if arm == "ce" or arm.startswith(CACHED) else self.teacher

    def loss(self, arm: str, student: nn.Module) -> LanguageLoss:
        if arm == "ce":
            return LanguageLoss(None)
        cached = arm.startswith(CACHED)
        return LanguageLoss(
            arm.removeprefix(CACHED), self.listed if cached else None, temperature=self.settings.temperature,
            vocab_size=self.classes(student, cached),
        )  # fmt: skip

    def fit(
        self,
        name: str,
        model: Any,
        teacher: nn.Module | None,
        loss: LanguageLoss,
        rows: Any,
        seed: int,
        steps: int,
        lr: float,
    ) -> dict[str, Any]:
        """Trains `model`, validates every `eval_every` steps, saves it as a folder of transformers."""
        s = self.settings
        epochs, per_epoch = _epochs(steps, s.eval_every)
        sampler = RunOrder(len(rows), per_epoch * s.batch_size, seed)
        loader = DataLoader(rows, s.batch_size, sampler=sampler, collate_fn=collate_rows)
        work = self.out / "runs" / name
        distiller = _Language(
            model, teacher, loss, optimizer=lambda parameters: AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.95)),
            scheduler=warm_and_down, max_grad_norm=1.0, student_forward=loss.student_forward,
            teacher_forward=loss.teacher_forward, out=work, save_every=SAVE_EVERY,
            log_every=max(1, min(s.eval_every, per_epoch)), seed=seed, progress=False,
        )  # fmt: skip
        distiller.windows = self.validation
        distiller.fit(loader, epochs, eval_loader=loader, resume=True)
        folder = self.out / ("teacher" if name == "teacher" else f"students/{name}")
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        history = distiller.history.rows
        ms = median(row["ms_per_step"] for row in history if "ms_per_step" in row)
        curve = [[row["step"], row["eval_bits_per_byte"]] for row in history if "eval_bits_per_byte" in row]
        return {
            "bits_per_byte": curve[-1][1], "curve": curve, "ms_per_step": ms, "steps": distiller.step,
            "tokens_per_second": 1000 * s.batch_size * s.length / ms, "parameters": count_parameters(model), "commit": commit(),
        }  # fmt: skip

    def cost(self) -> dict[str, Any]:
        s, student = self.settings, self.student(0).to(processes().device)
        batch = collate_rows([self.student_rows[i % len(self.student_rows)] for i in range(s.batch_size)])
        return compare_cost(student, self.teacher, batch, self.classes(student)) | {"commit": commit()}

    def classes(self, student: Any, cached: bool = False) -> int:
        """Those both models have and mean the same by: a head may be padded, a tokenizer have tokens added."""
        teacher: Any = None if cached else self.teacher
        known = self.cache.vocab_size if cached else teacher.get_output_embeddings().weight.shape[0]
        own = student.get_output_embeddings().weight.shape[0]
        return min(known, own) if self.agreed is None else min(known, own, self.agreed)


class RunOrder(Sampler[int]):
    """Ids of `rows` rows, so many an epoch; over all epochs none comes again before every one has come. Seed and epoch decide it."""

    def __init__(self, rows: int, per_epoch: int, seed: int) -> None:
        self.rows, self.per_epoch, self.seed, self.epoch = rows, per_epoch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[int]:
        order: list[int] = []
        for at in range(self.epoch * self.per_epoch, (self.epoch + 1) * self.per_epoch):
            turn, place = divmod(at, self.rows)
            if not order or place == 0:
                generator = torch.Generator().manual_seed(1_000_003 * self.seed + turn)
                order = torch.randperm(self.rows, generator=generator).tolist()
            yield order[place]


class _Language(Distiller):
    """Evaluates in bits per byte."""

    windows: Windows

    def evaluate(self, loader: Any, model: nn.Module | None = None) -> dict[str, float]:
        return {"bits_per_byte": bits_per_byte(model or self.student, self.windows)}


def _epochs(steps: int, eval_every: int) -> tuple[int, int]:
    """(epochs, steps of each): an evaluation ends an epoch."""
    epochs = max(1, round(steps / eval_every))
    return epochs, max(1, steps // epochs)


def warm_and_down(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Linear up over a twentieth of the steps, then linear down to a tenth."""
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        return (step + 1) / warm if step < warm else 1.0 - 0.9 * (step - warm) / max(1, steps - warm)

    return LambdaLR(optimizer, factor)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _results(job: Job, seeds: int, pieces: dict[str, dict[str, Any]]) -> dict[str, Any]:
    s = job.settings
    of_arm = {arm: [pieces[f"{arm}-{seed}"] for seed in range(seeds)] for arm in s.arms}
    scores = {arm: [row["bits_per_byte"] for row in rows] for arm, rows in of_arm.items()}
    validation, transformers = job.validation, needs("transformers", "hf")
    results = {
        "score": "bits per byte",
        "settings": asdict(s) | {"arms": list(s.arms)},
        "seeds": list(range(seeds)),
        "teacher": {key: value for key, value in pieces["teacher"].items() if key != "commit"},
        "student": {"parameters": of_arm[s.arms[0]][0]["parameters"]},
        "arms": {
            arm: {
                "bits_per_byte": scores[arm], **summary(scores[arm]), "ms_per_step": median(row["ms_per_step"] for row in rows),
                "tokens_per_second": median(row["tokens_per_second"] for row in rows), "curves": [row["curve"] for row in rows],
            }
            for arm, rows in of_arm.items()
        },
        "comparisons": comparisons(scores),
        "cost": {key: value for key, value in pieces["cost"].items() if key != "commit"},
        "text": {
            "student": corpus_identity(job.documents["student"]),
            "val": corpus_identity(job.documents["val"]) | {"tokens": int((validation.labels != -100).sum())},
        },
        "versions": {
            "kdfast": __version__, "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        },
        "machine": {"system": platform.platform(), "processor": platform.machine(), "threads": torch.get_num_threads()},
        "backend": backend_info(),
        "commit": joined(row.get("commit") for row in pieces.values()),
    }  # fmt: skip
    if "cache" in pieces:
        results["cache"] = {key: value for key, value in pieces["cache"].items() if key != "commit"}
    return results
