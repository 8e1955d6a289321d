"""Distiller: runs student and teacher on a batch, hands both to a method, trains, evaluates, saves and resumes exactly."""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, DistributedType, send_to_device, set_seed
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, IterableDataset

from kdfast._checks import check_int
from kdfast.losses import LossOutput
from kdfast.methods import Context, Setup, load
from kdfast.methods._protocol import call_model
from kdfast.metrics import accuracy
from kdfast.nn import evaluating
from kdfast.train import checkpoint
from kdfast.train.capture import capture_outputs, split_captures
from kdfast.train.history import History
from kdfast.weights import BestWeights

Batch = Any
Forward = Callable[[nn.Module, Batch], Any]


def labels_of(batch: Batch) -> Tensor | None:
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


class _Net(nn.Module):
    """Both models and the method as one module: one forward, so one wrapper for DDP, one autocast, one state dict."""

    def __init__(self, student, teacher, method, captures, student_forward, teacher_forward) -> None:
        super().__init__()
        self.student = student
        self.trains_teacher = bool(getattr(method, "trains_teacher", False))
        self.asks_teacher = bool(getattr(method, "teacher_each_step", True))
        # In a tuple a module is out of sight of parameters(), state_dict() and train(): the frozen teacher, a plain function.
        self.hidden = (None if self.trains_teacher else teacher, None if isinstance(method, nn.Module) else method)
        if self.trains_teacher:
            self.teacher = teacher
        if isinstance(method, nn.Module):
            self.method = method
        self.captures, self.forwards = captures, (student_forward, teacher_forward)

    @property
    def used_method(self) -> Any:
        return self.hidden[1] or self.method

    def forward(self, batch: Batch, step: int, total_steps: int) -> LossOutput:
        method = self.used_method
        teacher = self.teacher if self.trains_teacher else self.hidden[0]
        batch = method.prepare(batch) if hasattr(method, "prepare") else batch
        context = Context(None, None, labels_of(batch), batch, step=step, total_steps=total_steps)
        if teacher is not None and self.asks_teacher:
            if not self.trains_teacher and teacher.training:  # somebody called .train() on it
                teacher.eval()
            with ExitStack() as stack:
                stack.enter_context(nullcontext() if self.trains_teacher else torch.no_grad())
                context.teacher_features = stack.enter_context(capture_outputs(teacher, self.captures[1]))
                context.teacher = self.forwards[1](teacher, batch)
        with capture_outputs(self.student, self.captures[0]) as context.student_features:
            context.student = self.forwards[0](self.student, batch)
        return method(context)


def make_net(
    student: nn.Module,
    teacher: nn.Module | None,
    method: str | Callable[[Context], LossOutput],
    *,
    options: Mapping[str, Any] | None = None,
    widths: Mapping[str, tuple[int, int]] | None = None,
    capture: Mapping[str, str | tuple[str | None, str | None]] | None = None,
    student_forward: Forward = call_model,
    teacher_forward: Forward | None = None,
) -> _Net:
    """Both models and the method, checked: what `Distiller` and `kdfast.integrations.lightning` train."""
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module) and (model is not None or name == "student"):
            raise TypeError(f"{name}: expected an nn.Module, got {type(model).__name__}")
    if isinstance(method, str):
        kind = load(method)
        method = kind(*([widths or {}] if getattr(kind, "captures", ()) else []), **(options or {}))
    elif options or widths:
        raise ValueError("options, widths: only for a method given by its slug; bind them in the method you pass")
    if getattr(method, "trains_teacher", False) and teacher is None:
        raise ValueError("teacher: this method trains two networks, got None")
    adapt: Any = getattr(method, "adapt", None)
    student = student if adapt is None else adapt(student)
    captures = split_captures(capture or {}, student, teacher, getattr(method, "captures", ()))
    return _Net(student, teacher, method, captures, student_forward, teacher_forward or student_forward)


class Distiller:
    """Trains a student with a teacher and a method, on accelerate.

    Args:
        student: nn.Module; `distiller.student` is what the method makes of it (another head, say).
        teacher: nn.Module in eval mode and under no_grad, or None; trained along when the method says so.
        method: a slug ("kd", see `kdfast methods`), or any callable Context -> LossOutput; a Module is trained along.
        options: keyword arguments of a method given by its slug. widths: for a method that reads features,
            {name: (student channels, teacher channels)}.
        capture: {name: (student path, teacher path)}, dotted module paths; one string when both are alike, None for neither.
        optimizer: an Optimizer, a list of them, or a callable parameters -> Optimizer. Default AdamW(lr=1e-3).
        scheduler: callable (optimizer, total_steps) -> LRScheduler, stepped after each optimizer step.
        accumulate: batches per optimizer step. The step's loss is the mean over all their counted items, on all processes.
        count: batch -> number of items its loss is a mean of; default: labels other than `ignore_index`, else the batch size.
        max_grad_norm: clips the gradient's norm. mixed_precision: "no", "bf16" or "fp16" (accelerate's autocast and scaler).
        student_forward, teacher_forward: (model, batch) -> output; default `call_model` for both.
        metrics: {name: (predictions, labels) -> float}, default accuracy; predict: output -> predictions, default argmax over
            the classes: axis 1 of [B, C, ...], the last of [N, C].
        out: folder for checkpoint/, history.csv, history.json and curves.png. save_every: optimizer steps between checkpoints
            within an epoch (0: at its end only). log_every: steps per row of the history.
        seed: of the batch order (seed and epoch decide it) and, at the start of `fit`, of Python, NumPy and torch.
        trackers: accelerate's `log_with` ("tensorboard", "wandb", ...). accelerator: your own Accelerator; it then decides
            precision and trackers. progress: a bar.

    >>> distiller = Distiller(student, teacher, "kd", options={"temperature": 2.0}, out="runs/kd")
    >>> distiller.fit(train_loader, epochs=10, eval_loader=val_loader, resume=True)
    >>> distiller.save("student.safetensors")
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        method: str | Callable[[Context], LossOutput],
        *,
        options: Mapping[str, Any] | None = None,
        widths: Mapping[str, tuple[int, int]] | None = None,
        capture: Mapping[str, str | tuple[str | None, str | None]] | None = None,
        optimizer: Optimizer | list[Optimizer] | Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer, int], Any] | None = None,
        accumulate: int = 1,
        count: Callable[[Batch], Any] | None = None,
        ignore_index: int = -100,
        max_grad_norm: float | None = None,
        mixed_precision: str = "no",
        student_forward: Forward = call_model,
        teacher_forward: Forward | None = None,
        metrics: Mapping[str, Callable[[Tensor, Tensor], float]] | None = None,
        predict: Callable[[Any], Tensor] | None = None,
        out: str | Path | None = None,
        save_every: int = 0,
        log_every: int = 50,
        seed: int = 0,
        trackers: Any = None,
        accelerator: Accelerator | None = None,
        progress: bool = True,
    ) -> None:
        if accumulate < 1 or log_every < 1 or save_every < 0:
            raise ValueError(
                f"accumulate, log_every: expected >= 1, save_every >= 0; got {accumulate}, {log_every}, {save_every}"
            )
        net = make_net(
            student, teacher, method, options=options, widths=widths, capture=capture, student_forward=student_forward,
            teacher_forward=teacher_forward,
        )  # fmt: skip
        self.accelerator = accelerator or Accelerator(
            mixed_precision=mixed_precision,
            log_with=trackers,
            project_dir=str(out) if out else None,
            # The loader's batch is the whole batch: the same run on any number of processes.
            dataloader_config=DataLoaderConfiguration(split_batches=True),
        )
        self.method: Any = net.used_method
        self.student, self.teacher = net.student, teacher
        if teacher is not None and not net.trains_teacher:
            teacher.eval().to(self.accelerator.device)
        self.net = self.accelerator.prepare(net)
        self.optimizer, self.scheduler, self.accumulate = optimizer, scheduler, accumulate
        self.max_grad_norm, self.ignore_index = max_grad_norm, ignore_index
        self.count = count or self._count_labels
        self.forward, self.teacher_forward = student_forward, teacher_forward or student_forward
        self.metrics = metrics or {
            "accuracy": lambda predictions, labels: accuracy(predictions, labels, ignore_index=ignore_index)
        }
        self.predict = predict or (lambda output: output.argmax(1 if output.dim() > 2 else -1))
        self.out = None if out is None else Path(out)
        self.save_every, self.log_every, self.seed, self.progress = save_every, log_every, seed, progress
        self.trackers = trackers is not None or bool(self.accelerator.log_with)
        self.history = History()
        # Position: epochs done, batches done in this epoch, optimizer steps done, steps of the whole run (0: unknown).
        self.epoch = self.batch = self.step = self.total_steps = 0
        self._optimizers: list[Any] = []
        self._schedulers: list[Any] = []
        self._sums: dict[str, Tensor] = {}  # of the rows since the last line of the history
        self._best: BestWeights | None = None  # with patience
        self._restored: dict[str, Any] = {}  # what `resume` read and `fit` has yet to put back

    def loss(self, batch: Batch) -> LossOutput:
        """Student, teacher and method on one batch: for your own loop. Move the parts' step along by setting `step`."""
        return self.net(send_to_device(batch, self.accelerator.device), self.step, self.total_steps)

    def fit(
        self, loader: DataLoader, epochs: int, *, eval_loader: DataLoader | None = None, resume: bool = False,
        patience: int | None = None,
    ) -> History:  # fmt: skip
        """Trains up to `epochs` epochs in all. resume=True: goes on from the last checkpoint in `out`, if there is one.

        patience: stop after so many epochs in a row without a gain of the first metric on `eval_loader` (higher is better); whether it
            stops or not, the student then is that of the best epoch.
        """
        if patience is not None and (check_int("patience", patience, low=1) and eval_loader is None):
            raise ValueError("patience: expected an eval_loader to see a gain on, got None")
        if patience is not None and getattr(self.method, "trains_teacher", False):
            raise ValueError("patience: the best epochs of two networks are not the same; expected None")
        if patience is None:
            self._best = None
        elif self._best is None:
            self._best = BestWeights(self.student)
        if resume:
            self.resume()
        if getattr(loader, "persistent_workers", False):
            raise ValueError("loader: persistent_workers carry random state that no checkpoint holds; set it to False")
        whole = loader
        if hasattr(self.method, "start"):
            self.method.start(self._setup(whole, eval_loader))
        loader = self._shard(loader, shuffled=True)
        sized = not isinstance(loader.dataset, IterableDataset)
        self.total_steps = epochs * math.ceil(len(loader) / self.accumulate) if sized else 0
        self._build()
        if self.trackers:
            self.accelerator.init_trackers("kdfast", config={"epochs": epochs, "seed": self.seed})
        if self.step == 0:
            set_seed(self.seed, device_specific=True)
        with self._progress() as advance:
            while self.epoch < epochs and not self._stalled(patience):
                self._train_epoch(loader, advance)
                if hasattr(self.method, "after_epoch"):
                    self.method.after_epoch(self._setup(whole, eval_loader))
                if eval_loader is not None:
                    scores = self.evaluate(eval_loader)
                    self._log({f"eval_{name}": value for name, value in scores.items()})
                    if self._best is not None:
                        self._best.offer(self.student, next(iter(scores.values())))
                self.epoch, self.batch = self.epoch + 1, 0
                self._save_checkpoint(checkpoint.rng_state())
        if self._best is not None:
            self.student.load_state_dict(self._best.model.state_dict())
        if self.out is not None and self.accelerator.is_main_process:
            self.history.write(self.out)
        if self.trackers:
            self.accelerator.end_training()
        return self.history

    def _stalled(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations brought no gain."""
        scores = self.history.column(f"eval_{next(iter(self.metrics))}") if patience is not None else []
        return bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= (patience or 0)

    @torch.no_grad()
    def evaluate(self, loader: DataLoader, model: nn.Module | None = None) -> dict[str, float]:
        """The metrics of the student (or another model) over a loader, all processes together; training mode is restored."""
        model = model or self.student
        predictions, labels = [], []
        with evaluating(model):
            for batch in self._shard(loader, shuffled=False):
                with self.accelerator.autocast():
                    output = (self.teacher_forward if model is self.teacher else self.forward)(model, batch)
                predicted, known = self.predict(output), labels_of(batch)
                if known is None:
                    raise ValueError(
                        "loader: expected batches with labels to compare predictions with, got one without"
                    )
                # It cuts the last batch to as many rows as the loader has items left: on one process a graph to its first node.
                if self.accelerator.num_processes > 1:
                    predicted, known = self.accelerator.gather_for_metrics((predicted, known))
                predictions.append(predicted.cpu())
                labels.append(known.cpu())
        if not predictions:
            raise ValueError("loader: expected at least one batch to evaluate on, got none")
        if len({p.shape[1:] for p in predictions}) > 1:  # sequences padded batch by batch
            predictions, labels = [p.flatten() for p in predictions], [y.flatten() for y in labels]
        return {name: metric(torch.cat(predictions), torch.cat(labels)) for name, metric in self.metrics.items()}

    def deploy(self, eval_loader: DataLoader | None = None) -> nn.Module:
        """The model to use after training: the student, or what the method makes of it (heads combined on `eval_loader`)."""
        if not hasattr(self.method, "deploy"):
            return self.student
        return self.method.deploy(self._setup(None, eval_loader))

    def save(self, path: str | Path, model: nn.Module | None = None) -> None:
        """The student's weights (or another model's) as safetensors, from the main process."""
        if self.accelerator.is_main_process:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            save_model(model or self.student, str(path))

    def resume(self) -> bool:
        """Takes weights, optimizers, history and position from the last checkpoint in `out`; False when there is none."""
        folder = None if self.out is None else checkpoint.latest(self.out / "checkpoint")
        if folder is None:
            return False
        state = checkpoint.read(folder, "state")
        self.accelerator.unwrap_model(self.net).load_state_dict(state["net"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch, self.step = state["position"]
        self.history, self._best = History(state["history"]), None
        if state.get("best"):
            self._best = BestWeights(self.student)
            self._best.load_state_dict(state["best"])
        rank = checkpoint.read(folder, f"rank-{self.accelerator.process_index}")
        self._sums = send_to_device(rank["sums"], self.accelerator.device)
        self._restored = {**rank, "optimizers": state["optimizers"], "schedulers": state["schedulers"]}
        return True

    # ---------------------------------------------------------------- one epoch, one step
    def _train_epoch(self, loader: Any, advance: Callable[[], None]) -> None:
        self.net.train()
        loader.set_epoch(self.epoch)
        resumed, self._restored = self._restored, {}
        if "epoch_rng" in resumed:
            checkpoint.set_rng_state(resumed["epoch_rng"])
        epoch_rng = checkpoint.rng_state()
        batches = self._batches(loader)
        if "rng" in resumed and self.batch:  # at the start of an epoch the loader has just drawn from it
            checkpoint.set_rng_state(resumed["rng"])
        while window := list(itertools.islice(batches, self.accumulate)):
            self._train_step(send_to_device(window, self.accelerator.device))
            self.batch += len(window)
            if self.step % self.log_every == 0:
                self._flush()
            if self.save_every and self.step % self.save_every == 0:
                self._save_checkpoint(epoch_rng)
            advance()
        if self._sums:
            self._flush()

    def _batches(self, loader: Any) -> Iterator[Batch]:
        """The epoch's batches, from where it was left.

        Not accelerate's own iterator: it reads one batch ahead, so random numbers drawn by the dataset would come in another
        order after a resume. Workers draw theirs from where the epoch began, so with workers the skipped batches are read again.
        """
        if self.batch and loader.num_workers == 0 and not isinstance(loader.dataset, IterableDataset):
            return iter(skip_first_batches(loader, self.batch).base_dataloader)
        batches = iter(loader.base_dataloader)
        for _ in range(self.batch):
            next(batches)
        return batches

    def _train_step(self, window: list[Batch]) -> None:
        start = time.perf_counter()
        processes = self.accelerator.num_processes
        counts = [torch.as_tensor(self.count(batch), device=self.accelerator.device) for batch in window]
        total = self.accelerator.reduce(torch.stack(counts).sum(), "sum").clamp_min(1)
        for index, (batch, number) in enumerate(zip(window, counts)):
            with nullcontext() if index == len(window) - 1 else self.accelerator.no_sync(self.net):
                output = self.net(batch, self.step, self.total_steps)
                share = number.to(output.loss.dtype) / total
                # DDP takes the mean over processes: times their number it is the sum.
                self.accelerator.backward(output.loss * (share * processes))
            for name, value in {"loss": output.loss.detach(), **output.parts}.items():
                self._sums[name] = self._sums.get(name, 0.0) + value.detach() * share
        if self.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.net.parameters(), self.max_grad_norm)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if not any(optimizer.step_was_skipped for optimizer in self._optimizers):  # fp16 overflow
            for scheduler in self._schedulers:
                scheduler.step()
        self.step += 1
        if hasattr(self.method, "after_step"):
            self.method.after_step(self.student, self.teacher, self.step)
        one = torch.ones((), device=self.accelerator.device)
        self._sums["steps"] = self._sums.get("steps", 0.0) + one / processes
        self._sums["seconds"] = self._sums.get("seconds", 0.0) + one * ((time.perf_counter() - start) / processes)

    def _flush(self) -> None:
        """One row of the history: means over the steps since the last row, the learning rate, milliseconds per step."""
        sums = {name: float(self.accelerator.reduce(value, "sum")) for name, value in self._sums.items()}
        steps, seconds = sums.pop("steps"), sums.pop("seconds")
        row = {name: value / steps for name, value in sums.items()}
        row |= {"lr": self._optimizers[0].param_groups[0]["lr"], "ms_per_step": 1000 * seconds / steps}
        self._sums = {}
        self._log(row)

    def _log(self, row: dict[str, float]) -> None:
        self.history.add(step=self.step, epoch=self.epoch, **row)
        if self.trackers:
            self.accelerator.log(row, step=self.step)

    # ---------------------------------------------------------------- plumbing
    def _setup(self, loader: DataLoader | None, eval_loader: DataLoader | None) -> Setup:
        loaders = {"train": loader, "val": eval_loader}

        def sweep(split: str, plain: bool = True) -> Iterator[Context]:
            chosen = loaders[split]
            if chosen is None:
                raise ValueError(f"eval_loader, loader: the method reads the {split} data here, got None")
            # the data once, in order, whole and as it is: a training loader may draw rows twice, leave some out, augment
            collate = getattr(chosen.collate_fn, "plain", chosen.collate_fn) if plain else chosen.collate_fn
            batches = DataLoader(chosen.dataset, chosen.batch_size, collate_fn=collate)
            yield from self._contexts(batches)

        net = self.accelerator.unwrap_model(self.net)
        return Setup(
            self.student, self.teacher, sweep, eval_loader is not None, net.captures[0], self.forward,
            learning_rate=lambda: self._optimizers[0].param_groups[0]["lr"], step=self.step,
        )  # fmt: skip

    @torch.no_grad()
    def _contexts(self, batches: Iterable[Batch]) -> Iterator[Context]:
        """What a method would see of each batch, without gradient, both models in eval mode."""
        net = self.accelerator.unwrap_model(self.net)
        networks = [("student", self.student, net.captures[0], self.forward)]
        if self.teacher is not None:
            networks.append(("teacher", self.teacher, net.captures[1], self.teacher_forward))
        for batch in batches:
            batch = send_to_device(batch, self.accelerator.device)
            context = Context(None, None, labels_of(batch), batch, step=self.step, total_steps=self.total_steps)
            for name, model, paths, forward in networks:
                with evaluating(model), self.accelerator.autocast(), capture_outputs(model, paths) as features:
                    setattr(context, name, forward(model, batch))
                setattr(context, f"{name}_features", features)
            yield context

    def _count_labels(self, batch: Batch) -> Any:
        labels = labels_of(batch)
        if labels is not None and not labels.is_floating_point():
            return (labels.long() != self.ignore_index).sum()
        values = batch.values() if isinstance(batch, Mapping) else batch
        first = batch if isinstance(batch, Tensor) else next((v for v in values if isinstance(v, Tensor)), None)
        if first is None:
            raise ValueError("count: no tensor in the batch to count by; pass count=batch -> number of items")
        return len(first)

    def _shard(self, loader: DataLoader, *, shuffled: bool) -> Any:
        """This process's share of a loader; a shuffled one in an order that seed and epoch decide."""
        accelerator = self.accelerator
        return prepare_data_loader(
            loader,
            device=accelerator.device,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            split_batches=accelerator.split_batches,
            put_on_device=True,
            dispatch_batches=False,
            use_seedable_sampler=shuffled,
            data_seed=self.seed,
        )

    def _build(self) -> None:
        """Optimizers and schedulers, with what a checkpoint says about them."""
        if not self._optimizers:
            trainable = [p for p in self.net.parameters() if p.requires_grad]
            given = self.optimizer or (lambda parameters: AdamW(parameters, lr=1e-3))
            made = given if isinstance(given, (list, Optimizer)) else given(trainable)
            made = made if isinstance(made, list) else [made]
            held = {id(p) for optimizer in made for group in optimizer.param_groups for p in group["params"]}
            for name in ("method", "teacher"):
                module = getattr(self.accelerator.unwrap_model(self.net), name, None)
                if module is not None and any(p.requires_grad and id(p) not in held for p in module.parameters()):
                    raise ValueError(
                        f"optimizer: holds not all trainable parameters of the {name}; add them, or pass a callable "
                        "parameters -> Optimizer, which gets all of them"
                    )
            self._optimizers = [self.accelerator.prepare(optimizer) for optimizer in made]
        if self.scheduler is not None and not self._schedulers:
            self._schedulers = [self.scheduler(optimizer.optimizer, self.total_steps) for optimizer in self._optimizers]
        # Optimizers last: a new scheduler has just reset their learning rates.
        for name, objects in (("schedulers", self._schedulers), ("optimizers", self._optimizers)):
            saved = self._restored.pop(name, None)
            for target, state in zip(objects, saved or [], strict=bool(saved)):
                target.load_state_dict(state)

    def _save_checkpoint(self, epoch_rng: dict[str, Any]) -> None:
        if self.out is None:
            return
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"out: exact checkpoints are for one process and DDP, got {self.accelerator.distributed_type.value}; "
                "pass out=None and use accelerator.save_state"
            )
        final = self.out / "checkpoint" / f"step-{self.step:010d}-epoch-{self.epoch:06d}"
        temporary = final.with_name(final.name + ".tmp")
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        rank = {"epoch_rng": epoch_rng, "rng": checkpoint.rng_state(), "sums": self._sums}
        checkpoint.write(temporary, f"rank-{self.accelerator.process_index}", rank)
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "net": dict(self.accelerator.unwrap_model(self.net).state_dict()),
                "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
                "schedulers": [scheduler.state_dict() for scheduler in self._schedulers],
                "scaler": None if scaler is None else scaler.state_dict(),
                "position": [self.epoch, self.batch, self.step],
                "history": self.history.rows,
                "best": None if self._best is None else dict(self._best.state_dict()),
            }
            checkpoint.write(temporary, "state", state)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and not final.exists():
            checkpoint.publish(temporary, final)
            self.history.write(self.out, curves=False)

    def _progress(self) -> Any:
        return _bar(self) if self.progress and self.accelerator.is_main_process else nullcontext(lambda: None)


def _bar(distiller: Distiller) -> Any:
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def bar() -> Iterator[Callable[[], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            task = progress.add_task("training", total=distiller.total_steps or None, completed=distiller.step)

            def advance() -> None:
                rows = distiller.history.rows  # the last logged loss: reading a new one would wait for the device
                text = f"epoch {distiller.epoch + 1}" + (
                    f"  loss {rows[-1]['loss']:.4g}" if rows and "loss" in rows[-1] else ""
                )
                progress.update(task, completed=distiller.step, description=text)

            yield advance

    return bar()
