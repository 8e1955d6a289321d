"""What every method of the catalogue must do, on its own task: one row more, these tests more.

Each is built as `kdfast distill --method <slug>` builds it and trained for a few steps.
"""

import dataclasses
import io
import pickle

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from kdfast import methods
from kdfast.catalogue import BASELINES, CATALOGUE, find
from kdfast.data import TASKS, load_task
from kdfast.experiment import arms_of, distiller_of
from kdfast.losses import LossOutput

READY = [row.slug for row in (*BASELINES, *CATALOGUE) if row.status == "ready"]
STEPS = 3  # of an epoch
OPTIONS = {"kd3": {"cutoff": 0.05}}  # the teachers here are not trained, and sure of nothing


class Stop(Exception):
    """What ends a run after its first epoch."""


@pytest.fixture(scope="module", params=READY)
def built(request):
    """(task, arm, splits) of a method on its task."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    task = dataclasses.replace(load_task(find(request.param).task), batch_size=16)
    yield task, arms_of(task, request.param, OPTIONS.get(request.param, {}))[-1], task.splits(0)
    torch.set_num_threads(before)


def make(built, **changes):
    task, arm, _ = built
    return distiller_of(task, arm, 0, **changes)


def loader(built):
    task, _, splits = built
    torch.manual_seed(0)
    return task.train_loader(splits["student"], STEPS)


def bits(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def fit(built, run, **options):
    return run.fit(loader(built), 2, eval_loader=built[0].eval_loader(built[2]["val"]), **options)


@pytest.fixture(scope="module")
def trained(built, tmp_path_factory):
    """(a run of two epochs, the state of its models before, the state of everything after)."""
    run = make(built)
    before = {
        name: bits(model) for name, model in (("student", run.student), ("teacher", run.teacher)) if model is not None
    }
    fit(built, run)
    return run, before, bits(run.net)


def test_its_task_is_here_and_holds_what_it_reads(built):
    task, arm, _ = built
    kind = methods.load(arm.method)
    assert task.name in TASKS and find(arm.method).task == task.name
    assert set(getattr(kind, "captures", ())) <= set(task.layers) or arm.student is not None


def test_the_loss_is_finite_and_its_parts_are_detached(built, trained):
    run, *_ = trained
    run.net.train()
    output = run.loss(next(iter(loader(built))))
    assert isinstance(output, LossOutput) and output.loss.shape == () and output.loss.isfinite()
    assert output.parts and all(not part.requires_grad and part.isfinite().all() for part in output.parts.values())


def test_the_student_learns_and_a_frozen_teacher_stays(trained):
    run, before, _ = trained
    now = bits(run.student)
    assert any(not torch.equal(now[name], old) for name, old in before["student"].items())
    if run.teacher is not None:
        same = all(torch.equal(value, before["teacher"][name]) for name, value in bits(run.teacher).items())
        assert same != bool(getattr(run.method, "trains_teacher", False))
        assert not any(p.grad is not None and p.grad.any() for p in run.teacher.parameters()) or not same


def test_interrupted_between_epochs_it_ends_at_the_same_bits(built, trained, tmp_path):
    first, resumed = make(built, out=tmp_path), make(built, out=tmp_path)
    train = first._train_epoch

    def once(*arguments):
        if first.epoch == 1:
            raise Stop
        train(*arguments)

    first._train_epoch = once
    with pytest.raises(Stop):
        fit(built, first)
    fit(built, resumed, resume=True)
    want, got = trained[2], bits(resumed.net)
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def test_what_it_deploys_predicts_and_is_saved(built, trained, tmp_path):
    run, *_ = trained
    task, _, splits = built
    val = task.eval_loader(splits["val"])
    model = run.deploy(val)
    assert isinstance(model, torch.nn.Module)
    score = run.evaluate(val, model)
    assert set(score) == set(task.metrics)
    run.save(tmp_path / "student.safetensors", model)
    assert (tmp_path / "student.safetensors").stat().st_size > 0


def test_the_method_pickles_and_refuses_a_wrong_option(built):
    task, arm, _ = built
    kind = methods.load(arm.method)
    widths = [task.widths] if getattr(kind, "captures", ()) else []
    method = kind(*widths, **arm.options)
    again = pickle.loads(pickle.dumps(method))
    assert again.state_dict().keys() == method.state_dict().keys()
    torch.save(method.state_dict(), io.BytesIO())
    with pytest.raises(TypeError):
        kind(*widths, **{**arm.options, "temprature": 2.0})
