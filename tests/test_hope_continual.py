import math

import pytest
import torch
from test_continual import CONTROL, DOCUMENTS
from tiny_hope import save_encoder, save_hope, save_trained

from karla_hf.bench import load_bench
from karla_hf.hope_checkpoints import load_hope
from karla_hf.hope_continual import BARE, FLAT, LEVELS, TUNED, compare_hope_streams, mean_forgetting, measure_with
from karla_hf.modeling import delta_hope


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("hope-continual")
    return load_hope(save_trained(root / "trained", save_hope(root / "fresh", save_encoder(root / "encoder"))))


@pytest.fixture(scope="module")
def compared(trained):
    model, tokenizer = trained
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"rates": (1e-4, 1.0), "learning_rates": (1e-7, 3e-3)}
    result = compare_hope_streams(model, tokenizer, DOCUMENTS, CONTROL, ["Other words. " * 20], **options)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not model.has_learned
    return result


def test_the_matrices_are_of_all_learners(compared):
    assert list(compared["matrices"]) == [BARE, LEVELS, FLAT, TUNED]
    assert compared["titles"] == [*DOCUMENTS, "unrelated"]
    for name, matrix in compared["matrices"].items():
        assert len(matrix) == (1 if name == BARE else 3)
        for i, row in enumerate(matrix):
            assert [math.isnan(value) for value in row] == [name != BARE and i < j < 3 for j in range(4)]
    assert len(compared["rows"]) == 1 + 3 * 3
    last = compared["rows"][f"{TUNED}, after sums"]
    assert list(last.values()) == compared["matrices"][TUNED][2]


def test_every_learner_knows_a_document_better_after_reading_it(trained, compared):
    bare = compared["matrices"][BARE][0]
    assert bare == pytest.approx([measure_with(*trained)(text) for text in [*DOCUMENTS.values(), CONTROL]])
    for name in (LEVELS, FLAT, TUNED):
        matrix = compared["matrices"][name]
        assert matrix[0][0] < bare[0]
        assert all(matrix[i][i] != bare[i] for i in range(3))
    assert compared["matrices"][LEVELS] != compared["matrices"][FLAT]


def test_rates_are_chosen_on_other_documents(compared):
    assert compared["rates"] == {LEVELS: 1.0, FLAT: 1.0, TUNED: 3e-3}


def test_forgetting_is_the_mean_rise_of_the_loss(compared):
    for name, value in compared["forgetting"].items():
        matrix = compared["matrices"][name]
        rises = [math.log(matrix[2][j]) - math.log(matrix[j][j]) for j in (0, 1)]
        assert value == pytest.approx(sum(rises) / 2)
    assert mean_forgetting([[2.0, math.nan, 9.0], [2.0, 3.0, 9.0]]) == 0.0


@pytest.fixture
def recall():
    return load_bench("hope_recall")


def test_hebbian_writes_are_the_recurrence_without_erasure(recall):
    generator = torch.Generator().manual_seed(0)
    running, query, key, target = (
        torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in ((6, 4), (9, 4), (9, 4), (9, 6))
    )
    eta, log_alpha = (torch.rand(2, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    output, end = recall.hebbian_chunk(running, query, key, target, eta, -log_alpha)
    state, outputs = running, []
    for t in range(9):
        state = state * (-log_alpha[:, t]).exp()[:, None, None]
        state = state + eta[:, t, None, None] * target[:, t, :, None] * key[:, t, None, :]
        outputs.append((state[:, :4] @ query[:, t, :, None])[..., 0])
    torch.testing.assert_close(output, torch.stack(outputs, dim=1))
    torch.testing.assert_close(end, state)


def test_hebbian_writes_are_gone_afterwards(recall):
    chunk, token = delta_hope._chunk, delta_hope._token
    with recall.hebbian_writes():
        assert delta_hope._chunk is delta_hope._token is recall.hebbian_chunk
    assert (delta_hope._chunk, delta_hope._token) == (chunk, token)


@pytest.mark.parametrize("task", ["written once", "written once among others", "overwritten"])
def test_a_batch_of_recall_asks_for_last_values(recall, task):
    asked, others, more = recall.TASKS[task]
    rows = recall.make_batch(torch.Generator().manual_seed(0), 3, task)
    end = 2 * (asked + more)
    assert rows.shape == (3, end + 2 * asked)
    for row in rows.tolist():
        written, answers = (dict(zip(part[::2], part[1::2], strict=True)) for part in (row[:end], row[end:]))
        assert answers.items() <= written.items()
        assert len(answers) == asked
        assert len(written) == asked + others
        assert list(written) != list(answers)
        assert max(written) < recall.KEYS <= min(written.values())
        assert max(written.values()) < recall.KEYS + recall.VALUES
        if task != "overwritten":
            assert all(row[:end:2].count(key) == 1 for key in answers)


def test_an_untrained_memory_is_overwritten_by_the_delta_rule_only(recall):
    """Keys that are written once are another matter: erasing at full rate costs more than interference does."""
    delta, hebbian = (recall.recall_untrained("overwritten", rate) for rate in (0.5, None))
    assert delta > hebbian + 0.3
    full, hebbian = (recall.recall_untrained("written once", rate) for rate in (1.0, None))
    assert full < hebbian - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("task", "margin"), [("written once among others", 0.03), ("overwritten", 0.15)])
def test_keys_are_recalled_above_hebbian_writes(recall, task, margin, seed):
    delta, hebbian = (recall.learn(task, arm, seed=seed)["recalled"] for arm in (False, True))
    assert delta > hebbian + margin


@pytest.mark.slow
def test_keys_written_once_are_recalled(recall):
    """As many as the heads have dimensions, and nothing else: not above Hebbian writes, see `tests/bench/README.md`."""
    assert recall.learn("written once", False)["recalled"] > 0.9


def test_the_stream_needs_a_trained_hope(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench = load_bench("hope_continual")
    with pytest.raises(FileNotFoundError, match="There is no trained HOPE in outputs/hope-python-docs"):
        bench.run()
