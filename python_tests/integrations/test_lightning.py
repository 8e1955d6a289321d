"""KDModule trains as a loop by hand does, leaves the teacher alone, and keeps it out of the checkpoint."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdfast.losses import LossOutput

lightning = pytest.importorskip("lightning.pytorch", exc_type=ImportError)
KDModule = pytest.importorskip("kdfast.integrations.lightning").KDModule

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own


def parts():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    teacher = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 5)).double()
    data = TensorDataset(torch.randn(24, 6, dtype=torch.float64), torch.randint(5, (24,)))
    return student, teacher, data


def fit(module, data, tmp_path, **options):
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=8), DataLoader(data, batch_size=24))
    return trainer


def test_equals_a_loop_by_hand(tmp_path):
    student, teacher, data = parts()
    module = KDModule(
        student, teacher, "kd", options={"temperature": 3.0}, optimizer=lambda p: torch.optim.SGD(p, lr=0.5)
    )
    start = {name: value.clone() for name, value in student.state_dict().items()}
    trainer = fit(module, data, tmp_path)
    by_hand, teacher = parts()[:2]
    by_hand.load_state_dict(start)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    teacher.eval()

    def loss(x, y):
        s, t = by_hand(x), teacher(x)
        kd = 9 * F.kl_div((s / 3).log_softmax(-1), (t.detach() / 3).softmax(-1), reduction="batchmean")
        return 0.1 * F.cross_entropy(s, y) + 0.9 * kd

    for _ in range(2):
        for x, y in DataLoader(data, batch_size=8):
            optimizer.zero_grad()
            loss(x, y).backward()
            optimizer.step()
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-9, atol=1e-12)
        assert not torch.equal(start[name], value)
    metrics = trainer.callback_metrics
    assert metrics["val_loss"].item() == pytest.approx(loss(*data.tensors).item(), rel=1e-5)
    assert {"train_loss", "train_ce", "train_kd", "val_ce", "val_kd"} <= set(metrics)
    saved = next(tmp_path.rglob("*.ckpt"))
    names = torch.load(saved, weights_only=False)["state_dict"]
    assert len(names) == 4 and all("student" in name for name in names)


class Counting(nn.Module):
    """A method with parameters and a hook after each step."""

    def __init__(self):
        super().__init__()
        self.steps, self.scale = [], nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, context):
        loss = (self.scale * context.student - context.teacher).square().mean()
        return LossOutput(loss, {"mse": loss.detach()})

    def after_step(self, student, teacher, step):
        self.steps.append(step)


def test_methods_with_parameters_and_hooks(tmp_path):
    student, teacher, data = parts()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    method = Counting()
    module = KDModule(student, teacher.train(), method)
    fit(module, data, tmp_path, accumulate_grad_batches=3, enable_checkpointing=False)
    assert method.steps == [1, 2] and method.scale.item() != 1 and not teacher.training
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_methods_that_look_at_the_data_are_refused():
    student, teacher, _ = parts()

    class Looks(Counting):
        def start(self, setup): ...

    with pytest.raises(ValueError, match=r"start\(\).*Distiller"):
        KDModule(student, teacher, Looks())
