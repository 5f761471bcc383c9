import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from karla_hf.m3 import M3, orthogonalise
from karla_hf.multi_rate import MultiRateOptimizer, set_update_periods


def naive_multi_rate(parameters, periods, gradients, make):
    """Every group with an optimiser of its own, which steps with the mean of the last `period` gradients."""
    optimizers = [make([parameter]) for parameter in parameters]
    for step in range(1, len(gradients) + 1):
        for number, (parameter, period) in enumerate(zip(parameters, periods, strict=True)):
            if step % period == 0:
                parameter.grad = torch.stack([g[number] for g in gradients[step - period : step]]).mean(0)
                optimizers[number].step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, M3])
def test_equals_one_optimiser_for_every_level(kind):
    generator = torch.Generator().manual_seed(0)
    shapes, periods = [(3, 2), (2, 5), (4, 4)], [1, 3, 4]
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(14)]
    make = lambda params: kind(params, lr=0.1, weight_decay=0.1)  # noqa: E731
    slow = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    naive_multi_rate(slow, periods, gradients, make)
    fast = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    groups = [{"params": [p], "update_period": period} for p, period in zip(fast, periods, strict=True)]
    optimizer = MultiRateOptimizer(make(groups))
    for step, row in enumerate(gradients, 1):
        before = [parameter.detach().clone() for parameter in fast]
        for parameter, gradient in zip(fast, row, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        changed = [not torch.equal(old, new) for old, new in zip(before, fast, strict=True)]
        assert changed == [step % period == 0 for period in periods]
        optimizer.zero_grad()
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_saved_in_the_middle_of_a_period_it_goes_on_as_if_it_had_not_been():
    def make():
        weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))]
        groups = [{"params": weights[:1]}, {"params": weights[1:], "update_period": 4}]
        return weights, MultiRateOptimizer(torch.optim.AdamW(groups, lr=0.1))

    def step(weights, optimizer, number):
        for weight in weights:
            weight.grad = torch.tensor([1.0, -1.0]) * (number + 1)
        optimizer.step()
        optimizer.zero_grad()

    whole, optimizer = make()
    for number in range(11):
        if number == 6:
            saved, values = copy.deepcopy(optimizer.state_dict()), [weight.detach().clone() for weight in whole]
        step(whole, optimizer, number)
    again, other = make()
    for weight, value in zip(again, values, strict=True):
        weight.data.copy_(value)
    other.load_state_dict(saved)
    for number in range(6, 11):
        step(again, other, number)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    with pytest.raises(ValueError, match="The checkpoint's optimiser had no update periods"):
        other.load_state_dict(torch.optim.AdamW(again).state_dict())


def test_a_scheduler_and_a_parameter_without_gradient():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = MultiRateOptimizer(torch.optim.SGD([{"params": weights, "update_period": 2}], lr=1.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(2):
        weights[0].grad = torch.ones(1)
        optimizer.step()
        schedule.step()
    assert weights[0].item() == -0.5  # at the second step's rate
    assert weights[1].item() == 0.0


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fast, self.slow = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

    def forward(self, x, labels):
        return {"loss": (self.slow(self.fast(x)) - labels).square().mean()}


@pytest.mark.parametrize("cut", [3, 4])
def test_with_a_trainer_resumed_at_any_step(tmp_path, cut):
    rows = [{"x": [float(i % 5)], "labels": [float(i % 5) * 2]} for i in range(40)]

    def train(folder, steps, resume=None):
        torch.manual_seed(0)
        model = Line()
        optimizer = set_update_periods(torch.optim.AdamW(model.parameters(), lr=0.01), model, {"^slow": 3})
        arguments = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True,
            save_steps=cut, lr_scheduler_type="constant",
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule))
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train(tmp_path / "whole", 7)
    train(tmp_path / "split", cut)
    again = train(tmp_path / "split", 7, str(tmp_path / "split" / f"checkpoint-{cut}"))
    for (name, ours), theirs in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("periods", "message"),
    [
        (
            {"nothing": 2},
            "`update_periods` has 'nothing', which no trained parameter's name matches; give a part of one",
        ),
        ({"(": 2}, r"`update_periods` has '\(', which is no regular expression"),
        ({"slow": 0}, "`update_period` is 0; give a whole number of steps of at least 1"),
        ({"slow": 1.5}, "`update_period` is 1.5; give a whole number"),
    ],
)
def test_bad_periods_are_named(periods, message):
    model = Line()
    with pytest.raises(ValueError, match=message):
        set_update_periods(torch.optim.SGD(model.parameters(), lr=0.1), model, periods)


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5), (1, 4)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ orthogonalise(matrix) @ right.T
    values = inside.diagonal()
    assert values.min() > 0.3
    assert values.max() < 1.3
    torch.testing.assert_close(inside, torch.diag(values), atol=1e-10, rtol=0)
    torch.testing.assert_close(orthogonalise(matrix.T), orthogonalise(matrix).T)


def test_m3_equals_its_equations():
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(9)]
    weight = torch.nn.Parameter(start.clone())
    optimizer = M3([weight], lr=0.05, betas=(0.8, 0.9, 0.7), alpha=0.5, period=4, weight_decay=0.01)
    expected, m1, v, m2, slow = start.clone(), 0, 0, torch.zeros(3, 4, dtype=torch.float64), 0
    for step, gradient in enumerate(gradients, 1):
        weight.grad = gradient.clone()
        optimizer.step()
        m1 = 0.8 * m1 + 0.2 * gradient
        v = 0.9 * v + 0.1 * gradient**2
        if step % 4 == 0:
            m2 = 0.7 * m2 + 0.3 * sum(gradients[step - 4 : step]) / 4
            slow = orthogonalise(m2)
        update = (orthogonalise(m1) + 0.5 * slow) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        expected -= 0.05 * (0.01 * expected + 0.2 * update / update.square().mean().sqrt())
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-10)


def test_m3_steps_have_one_size_whatever_the_gradients_and_the_time():
    sizes = []
    for scale in (1e-6, 1.0, 1e3):
        weight = torch.nn.Parameter(torch.zeros(4, 6))
        optimizer = M3([weight], lr=1.0, period=5)
        generator = torch.Generator().manual_seed(0)
        for _ in range(50):
            before = weight.detach().clone()
            weight.grad = scale * torch.randn(4, 6, generator=generator)
            optimizer.step()
            sizes.append((weight - before).square().mean().sqrt().item())
    assert max(sizes) < 0.21
    assert min(sizes) > 0.19
    weight.grad = torch.zeros(4, 6)
    M3([weight], lr=1.0).step()
    assert torch.isfinite(weight).all()


def test_m3_refuses_vectors_and_bad_values():
    with pytest.raises(ValueError, match=r"M3 was given a parameter of shape \(3,\), but it trains matrices"):
        M3([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"M3 was given lr -1\.0"):
        M3([torch.nn.Parameter(torch.zeros(3, 3))], lr=-1.0)
