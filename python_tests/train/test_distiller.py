"""Distiller: the loss it computes, captures, accumulation, precision, two students, evaluation, errors."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from train import toy

from kdfast.losses import LossOutput, kd_loss
from kdfast.methods import Context, Method, load
from kdfast.nn import replace_head
from kdfast.train import Distiller, capture_outputs


def batch_of(rows=6, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator), torch.arange(rows) % 3


def make(method="kd", **options):
    student, teacher = toy.models(dropout=0.0)
    return Distiller(student, teacher, method, progress=False, **options)


# ---------------------------------------------------------------- the loss
def test_loss_is_the_method_on_both_outputs_with_the_teacher_frozen():
    run = make(options={"temperature": 2.0, "ce_weight": 0.5, "kd_weight": 2.0})
    inputs, labels = batch_of()
    run.teacher.train()  # a stray .train() must not wake the teacher's dropout
    output = run.loss((inputs, labels))
    assert not run.teacher.training
    student = run.student(inputs)
    want = 0.5 * F.cross_entropy(student, labels) + 2 * kd_loss(student, run.teacher(inputs), temperature=2.0)
    torch.testing.assert_close(output.loss, want)
    output.loss.backward()
    assert all(p.grad is None for p in run.teacher.parameters()) and run.student[0].weight.grad.abs().sum() > 0


def test_any_callable_is_a_method_and_sees_the_clock_and_the_batch():
    seen = []

    def method(context):
        seen.append(context)
        return LossOutput(context.student.square().mean(), {})

    run = Distiller(toy.models()[0], None, method, progress=False, log_every=1)
    run.fit(DataLoader(TensorDataset(*batch_of(8)), batch_size=4), 2)
    assert [context.step for context in seen] == [0, 1, 2, 3] and all(context.total_steps == 4 for context in seen)
    assert seen[0].teacher is None and torch.equal(seen[0].batch[0], batch_of(8)[0][:4])
    assert torch.equal(seen[0].labels, batch_of(8)[1][:4])


def test_mapping_batches_and_outputs_with_logits_as_in_transformers():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, values):
            from types import SimpleNamespace

            return SimpleNamespace(logits=self.inner(values))

    model, teacher = Wrapped(), Wrapped()
    inputs, labels = batch_of()
    output = Distiller(model, teacher, "kd").loss({"values": inputs, "labels": labels})
    torch.testing.assert_close(
        output.loss, load("kd")()(Context(model.inner(inputs), teacher.inner(inputs), labels)).loss
    )


def test_prepare_changes_what_both_models_see_and_after_step_sees_the_models():
    class Flipped(Method):
        steps = ()

        def prepare(self, batch):
            return -batch[0], batch[1]

        def forward(self, context):
            assert torch.equal(context.batch[0], -inputs)
            return LossOutput(F.cross_entropy(context.student, context.labels), {"t": context.teacher.detach().sum()})

        def after_step(self, student, teacher, step):
            self.steps += ((student, teacher, step),)

    inputs, labels = batch_of()
    run = make(Flipped(), log_every=1)
    expected = run.teacher(-inputs).sum()
    torch.testing.assert_close(run.loss((inputs, labels)).parts["t"], expected.detach())
    run.fit(DataLoader(TensorDataset(inputs, labels), batch_size=6), 2)
    assert run.method.steps == ((run.student, run.teacher, 1), (run.student, run.teacher, 2))


def test_adapt_makes_the_student_that_is_trained_scored_and_saved():
    class Wider(Method):
        def adapt(self, student):
            return replace_head(student, lambda head: nn.Linear(head.in_features, 4))

        def forward(self, context):
            return LossOutput(context.student.square().mean(), {})

    run = make(Wider())
    assert run.student[4].out_features == 4 and run.net.student is run.student
    run.student.eval()  # so that batch statistics do not move
    inputs, labels = batch_of()
    torch.testing.assert_close(run.loss((inputs, labels)).loss, run.student(inputs).square().mean())


# ---------------------------------------------------------------- captures
def test_captures_reach_the_method_with_gradient_only_on_the_student_side():
    run = toy.distiller(None)
    run.student.eval()
    inputs, labels = batch_of()
    with capture_outputs(run.student, {"h": "2"}) as student, capture_outputs(run.teacher, {"h": "1"}) as teacher:
        run.student(inputs), run.teacher(inputs)
    output = run.loss((inputs, labels))
    gap = (run.method.project(student["h"]) - teacher["h"]).square().mean()
    torch.testing.assert_close(output.parts["gap"], gap.detach())
    output.loss.backward()
    assert run.method.project.weight.grad.abs().sum() > 0 and run.teacher[0].weight.grad is None
    assert not run.student[2]._forward_hooks and not run.teacher[1]._forward_hooks  # none is left behind


def test_an_unknown_path_is_refused_with_near_names():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer3, self.layer4 = nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 3)

        def forward(self, inputs):
            return self.layer4(self.layer3(inputs))

    with pytest.raises(ValueError, match=r"capture\['feat'\]: Deep has no submodule 'layr3'; near names: layer3"):
        Distiller(Deep(), Deep(), "kd", capture={"feat": ("layr3", "layer4")})
    with pytest.raises(ValueError, match=r"no submodule 'xyz'; its children: layer3, layer4"):
        Distiller(Deep(), Deep(), "kd", capture={"feat": "xyz"})
    with pytest.raises(ValueError, match="the method reads hidden; give"):
        Distiller(Deep(), Deep(), toy.Projected({"hidden": (6, 6)}))
    with pytest.raises(ValueError, match="there is no teacher, so no 'layer4'"):
        Distiller(Deep(), None, lambda context: None, capture={"feat": ("layer3", "layer4")})


# ---------------------------------------------------------------- denominators
def test_accumulation_over_uneven_batches_is_one_step_on_the_whole():
    """The mean over 5 + 2 kept rows is not the mean of the two means: batch 1 keeps 5 of 6 labels, batch 2 keeps 2."""
    inputs, labels = batch_of(12)
    labels[[0, 7, 8, 9, 10]] = -100
    weights = []
    for accumulate, size in ((1, 12), (2, 6), (4, 3)):
        student, teacher = toy.models(dropout=0.0)
        student[1] = nn.Identity()  # batch statistics do depend on how the batch is cut
        run = Distiller(
            student.double(), teacher.double(), "kd", accumulate=accumulate, progress=False,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        )  # fmt: skip
        before = student[0].weight.detach().clone()
        run.fit(DataLoader(TensorDataset(inputs.double(), labels), batch_size=size), 1)
        assert run.step == 1
        assert (student[0].weight - before).abs().max() > 1e-3
        weights.append(student[0].weight.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(weights[2], weights[0], rtol=1e-12, atol=1e-13)


def test_count_can_be_given():
    inputs, labels = batch_of(9)
    seen = []

    def method(context):
        seen.append(context.student.shape[0])
        return LossOutput(context.student.sum() * 0 + context.student.shape[0], {})

    run = Distiller(
        toy.models()[0], None, method, accumulate=2, count=lambda batch: 1, log_every=1, progress=False,
    )  # fmt: skip
    run.fit(DataLoader(TensorDataset(inputs, labels), batch_size=6), 1)
    assert seen == [6, 3] and run.history.last("loss") == pytest.approx(
        4.5
    )  # each batch counts one: the mean of 6 and 3


# ---------------------------------------------------------------- precision, clipping, two students
def test_bf16_runs_under_autocast_and_keeps_float32_weights():
    seen = []

    def method(context):
        seen.append(context.student.dtype)
        return load("kd")()(context)

    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        student, teacher = toy.models(dropout=0.0)
        run = Distiller(student, teacher, method, mixed_precision="bf16", log_every=1, progress=False)
        run.fit(toy.loader(), 1, eval_loader=toy.loader())
        assert set(seen) == {torch.bfloat16} and run.student[0].weight.dtype == torch.float32
        assert 0 < run.history.last("loss") < 10 and 0 <= run.history.last("eval_accuracy") <= 1
    finally:
        AcceleratorState._reset_state(True)


def test_max_grad_norm_clips_the_step():
    student, teacher = toy.models(dropout=0.0)
    run = Distiller(
        student, teacher, "kd", options={"ce_weight": 1e4}, max_grad_norm=0.5, progress=False,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
    )  # fmt: skip
    before = torch.cat([p.detach().flatten().clone() for p in student.parameters()])
    run.fit(DataLoader(TensorDataset(*batch_of()), batch_size=6), 1)
    moved = torch.cat([p.detach().flatten() for p in student.parameters()]) - before
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-3)


def test_mutual_training_steps_two_students_each_with_its_own_optimizer():
    a, b = toy.models(dropout=0.0)
    inputs, labels = batch_of()
    optimizers = [torch.optim.SGD(a.parameters(), lr=0.1), torch.optim.SGD(b.parameters(), lr=0.2)]
    run = Distiller(a, b, "mutual", optimizer=optimizers, progress=False, log_every=1)
    b[2] = nn.Identity()
    logits_a, logits_b = a(inputs), b(inputs)
    loss_a = F.cross_entropy(logits_a, labels) + kd_loss(logits_a, logits_b, temperature=1.0)
    loss_b = F.cross_entropy(logits_b, labels) + kd_loss(logits_b, logits_a, temperature=1.0)
    (want_a,) = torch.autograd.grad(loss_a, a[0].weight, retain_graph=True)
    (want_b,) = torch.autograd.grad(loss_b, b[0].weight)
    a[1].reset_running_stats()
    before = a[0].weight.detach().clone(), b[0].weight.detach().clone()
    run.fit(DataLoader(TensorDataset(inputs, labels), batch_size=6), 1)
    torch.testing.assert_close(a[0].weight, before[0] - 0.1 * want_a)
    torch.testing.assert_close(b[0].weight, before[1] - 0.2 * want_b)
    assert {"ce_a", "ce_b", "kd_a", "kd_b"} <= set(run.history.columns())
    assert b.training  # trained along, not frozen


# ---------------------------------------------------------------- evaluation, files, errors
def test_evaluate_is_the_metric_over_all_rows_and_restores_the_mode():
    run = make(
        metrics={"hits": lambda predictions, labels: int((predictions == labels).sum()), "rows": lambda p, y: len(p)}
    )
    inputs, labels = batch_of(10)
    run.student.train()
    got = run.evaluate(DataLoader(TensorDataset(inputs, labels), batch_size=4))
    assert run.student.training
    run.student.eval()
    assert got == {"hits": int((run.student(inputs).argmax(-1) == labels).sum()), "rows": 10}
    teacher = run.evaluate(DataLoader(TensorDataset(inputs, labels), batch_size=4), run.teacher)
    assert teacher["hits"] == int((run.teacher(inputs).argmax(-1) == labels).sum())


def test_fit_writes_csv_json_png_and_the_student(tmp_path):
    run = toy.distiller(tmp_path)
    run.fit(toy.loader(), 2, eval_loader=toy.loader())
    rows = json.loads((tmp_path / "history.json").read_text())
    assert rows == run.history.rows and rows[-1]["eval_accuracy"] == run.history.last("eval_accuracy")
    header, *lines = (tmp_path / "history.csv").read_text().splitlines()
    assert header.split(",")[:3] == ["step", "epoch", "loss"] and len(lines) == len(rows)
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    run.save(tmp_path / "student.safetensors")
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "student.safetensors")["0.weight"], run.student[0].weight)
    with pytest.raises(KeyError, match="eval_iou: the history has step"):
        run.history.last("eval_iou")


def test_any_accelerate_tracker_gets_the_rows():
    from accelerate.tracking import GeneralTracker

    class Recorder(GeneralTracker):
        name, requires_logging_directory, main_process_only = "recorder", False, True
        rows, config = [], None

        @property
        def tracker(self):
            return self.rows

        def store_init_configuration(self, values):
            type(self).config = values

        def log(self, values, step=None, **kwargs):
            self.rows.append((step, values))

    run = make(trackers=Recorder(), log_every=3)
    run.fit(toy.loader(), 1)
    assert Recorder.config["epochs"] == 1
    assert [step for step, _ in Recorder.rows] == [3, 6, 9, 11] and Recorder.rows[0][1]["ce"] > 0


def test_progress_bar_runs(capsys):
    student, teacher = toy.models()
    Distiller(student, teacher, "kd", log_every=5).fit(toy.loader(), 1)
    assert "11/11" in capsys.readouterr().out


def test_bad_arguments_name_themselves():
    student, teacher = toy.models()
    with pytest.raises(TypeError, match=r"student: expected an nn\.Module, got NoneType"):
        Distiller(None, teacher, "kd")
    with pytest.raises(TypeError, match=r"teacher: expected an nn\.Module, got str"):
        Distiller(student, "resnet", "kd")
    with pytest.raises(ValueError, match="accumulate, log_every: expected >= 1"):
        Distiller(student, teacher, "kd", accumulate=0)
    with pytest.raises(ValueError, match="only for a method given by its slug"):
        Distiller(student, teacher, lambda context: None, options={"temperature": 2})
    with pytest.raises(ValueError, match="this method trains two networks, got None"):
        Distiller(student, None, "mutual")
    run = Distiller(
        student, teacher, toy.Projected({"hidden": (8, 16)}), capture={"hidden": ("2", "1")},
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
    )  # fmt: skip
    with pytest.raises(ValueError, match="optimizer: holds not all trainable parameters of the method"):
        run.fit(toy.loader(), 1)
    with pytest.raises(ValueError, match="count: no tensor in the batch"):
        run._count_labels({"labels": None, "name": "x"})


# ---------------------------------------------------------------- early stopping
SCORES = (0.1, 0.5, 0.4, 0.5, 0.3, 0.9)


def stopping(out=None, stop_at=None):
    """A run whose n-th evaluation gives SCORES[n], and the student's weights at each of them."""
    run = make(out=out)
    states = []

    def score(predictions, labels):
        states.append({name: value.clone() for name, value in run.student.state_dict().items()})
        if run.epoch == stop_at:
            raise KeyboardInterrupt
        return SCORES[run.epoch]

    run.metrics = {"accuracy": score}
    return run, states


def test_patience_stops_and_gives_back_the_best():
    loader = DataLoader(TensorDataset(*batch_of(8)), batch_size=4)
    for patience, epochs, best in ((3, 5, 1), (4, 6, 5), (9, 6, 5), (1, 3, 1)):
        run, states = stopping()
        run.fit(loader, 6, eval_loader=loader, patience=patience)
        assert run.epoch == len(states) == epochs
        assert all(torch.equal(value, states[best][name]) for name, value in run.student.state_dict().items())
    run, states = stopping()
    run.fit(loader, 6, eval_loader=loader)
    assert all(torch.equal(value, states[-1][name]) for name, value in run.student.state_dict().items())
    with pytest.raises(ValueError, match="patience: expected an eval_loader"):
        run.fit(loader, 7, patience=1)
    with pytest.raises(ValueError, match="patience: expected an int >= 1, got 0"):
        run.fit(loader, 7, eval_loader=loader, patience=0)
    with pytest.raises(ValueError, match="patience: the best epochs of two networks"):
        make("mutual").fit(loader, 1, eval_loader=loader, patience=1)


def test_patience_resumes_with_its_best(tmp_path):
    loader = DataLoader(TensorDataset(*batch_of(8)), batch_size=4)
    whole, states = stopping()
    whole.fit(loader, 6, eval_loader=loader, patience=3)
    run, _ = stopping(tmp_path, stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        run.fit(loader, 6, eval_loader=loader, patience=3)
    for _ in range(2):  # the second time it is finished, and the best comes back again
        run, _ = stopping(tmp_path)
        run.fit(loader, 6, eval_loader=loader, patience=3, resume=True)
        assert run.epoch == 5
        assert all(torch.equal(value, states[1][name]) for name, value in run.student.state_dict().items())
