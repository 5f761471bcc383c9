import copy

import pytest
import torch

from karla_hf.optimizer import RowsAdamW


def make(rows=11, width=3):
    """A table of rows and a dense layer on top of it."""
    return torch.nn.Sequential(torch.nn.Embedding(rows, width, sparse=True), torch.nn.Linear(width, 2)).double()


def groups(model, lr=0.03):
    table, dense = model
    return [{"params": list(dense.parameters()), "lr": lr}, {"params": [table.weight], "lr": 5 * lr, "sparse": True}]


def train(model, optimizers, batches):
    for ids in batches:
        model(ids).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


@pytest.fixture
def batches():
    """Batches with repetitions; row 10 is in none."""
    return [torch.randint(0, 10, (4,)) for _ in range(7)]


def test_step_is_that_of_adamw_and_sparse_adam(batches):
    ours, theirs = make(), None
    theirs = copy.deepcopy(ours)
    train(ours, [RowsAdamW(groups(ours), weight_decay=0.1)], batches)
    dense = torch.optim.AdamW(theirs[1].parameters(), lr=0.03, weight_decay=0.1)
    train(theirs, [dense, torch.optim.SparseAdam([theirs[0].weight], lr=0.15)], batches)
    for first, second in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def test_only_touched_rows_change(batches):
    model = make()
    optimizer = RowsAdamW(groups(model), weight_decay=0.1)
    for ids in batches:  # moments of earlier batches move nothing either
        before = model[0].weight.detach().clone()
        train(model, [optimizer], [ids])
        changed = (model[0].weight != before).any(1).nonzero().flatten()
        assert changed.tolist() == ids.unique().tolist()


def test_state_resumes_exactly(batches):
    whole = make()
    twin = copy.deepcopy(whole)
    train(whole, [RowsAdamW(groups(whole))], batches)
    first = RowsAdamW(groups(twin))
    train(twin, [first], batches[:3])
    second = RowsAdamW(groups(twin, lr=9.0))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(twin, [second], batches[3:])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), twin.parameters(), strict=True))


def test_closure_is_called_and_gradients_stay(batches):
    model = make()
    optimizer = RowsAdamW(groups(model))

    def closure():
        loss = model(batches[0]).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert model[0].weight.grad.is_sparse
    optimizer.zero_grad()
    before = model[0].weight.detach().clone()
    optimizer.step()  # nothing to do
    assert torch.equal(model[0].weight, before)
