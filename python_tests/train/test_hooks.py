"""start and deploy: what a method may look at before and after training, and that what it kept is saved and resumed."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from train import toy

from kdfast.data.task import Augmented
from kdfast.losses import LossOutput
from kdfast.methods import Context, Method, load


class Means(Method):
    """KD, and the mean of a teacher feature over the training data, known only once the data is."""

    captures = ("hidden",)

    def __init__(self):
        super().__init__()
        self.kd, self.calls = load("kd")(), []
        self.register_buffer("mean", torch.empty(0))

    def start(self, setup):
        contexts = list(setup.sweep("train"))
        self.calls.append((setup, sum(len(context.labels) for context in contexts)))
        if not setup.resumed:
            features = torch.cat([context.teacher_features["hidden"] for context in contexts])
            self.mean = features.mean(0)

    def forward(self, context: Context) -> LossOutput:
        return self.kd(context)

    def deploy(self, setup):
        correct = sum((context.student.argmax(-1) == context.labels).sum() for context in setup.sweep("val"))
        return nn.Sequential(setup.student, nn.Identity()) if correct >= 0 else setup.student


def loader():
    data = toy.Noisy(noise=0.0)
    # twice as many draws as rows: a pass over it would count rows twice
    return DataLoader(data, 4, sampler=RandomSampler(data, num_samples=8, replacement=True))


def test_start_sees_the_data_once_and_deploy_gives_the_model(tmp_path):
    run = toy.distiller(tmp_path, method=Means(), accumulate=1, scheduler=None)
    run.fit(loader(), 1)
    ((setup, rows),) = run.method.calls
    assert rows == 44 and not setup.resumed and not setup.has_val and setup.capture == {"hidden": "2"}
    data = toy.Noisy(noise=0.0)
    want = torch.relu(run.teacher[0](data.points)).mean(0)
    torch.testing.assert_close(run.method.mean, want)
    assert not run.method.mean.requires_grad and run.student.training
    with pytest.raises(ValueError, match="eval_loader, loader: the method reads the val data here, got None"):
        run.deploy()
    assert run.deploy(loader())[0] is run.student


def test_buffers_made_by_start_are_resumed(tmp_path):
    first = toy.distiller(tmp_path, method=Means(), accumulate=1, scheduler=None)
    first.fit(loader(), 1)
    again = toy.distiller(tmp_path, method=Means(), accumulate=1, scheduler=None)
    again.fit(loader(), 2, resume=True)
    assert again.method.calls[0][0].resumed and again.step == 2 * first.step
    assert torch.equal(again.method.mean, first.method.mean)


def test_without_hooks_the_student_is_deployed(tmp_path):
    run = toy.distiller(tmp_path)
    assert run.deploy() is run.student
    run.save(tmp_path / "other.safetensors", nn.Linear(1, 2))
    assert (tmp_path / "other.safetensors").stat().st_size > 0


class Epochs(nn.Module):
    """Notes where the run is after each epoch, and which rows a sweep sees as they are and augmented."""

    def __init__(self):
        super().__init__()
        self.kd, self.seen = load("kd")(), []

    def forward(self, context):
        return self.kd(context)

    def after_epoch(self, setup):
        sums = [
            sum(context.batch[0].sum().item() for context in setup.sweep("train", plain=plain))
            for plain in (True, False)
        ]
        self.seen.append((setup.step, setup.has_val, *sums))


def test_after_each_epoch_a_method_may_look_at_the_data(tmp_path):
    data = toy.Noisy(size=8, noise=0.0)
    collate = Augmented(None, lambda batch: [torch.ones_like(batch[0]), batch[1]])
    run = toy.distiller(tmp_path, method=Epochs(), accumulate=1, scheduler=None)
    original = run.evaluate
    run.evaluate = lambda loader: run.method.seen.append("evaluated") or original(loader)
    run.fit(DataLoader(data, 4, collate_fn=collate), 2, eval_loader=DataLoader(data, 4))
    first, *rest = run.method.seen
    assert first == (2, True, pytest.approx(data.points.sum().item(), abs=1e-4), 48)
    assert [one if one == "evaluated" else one[0] for one in rest] == ["evaluated", 4, "evaluated"]
