import math

import pytest
import torch
from transformers import LlamaConfig

from karla_hf.bench import load_bench
from karla_hf.head_arms import MlpHead, TaskHead, Trained, accuracy, train_head
from karla_hf.tasks import TASKS, TEST_ROWS, TRAIN_ROWS, VALIDATION_ROWS, TaskStates, task_rows


TEXT = LlamaConfig(hidden_size=16, intermediate_size=8, num_attention_heads=2, num_hidden_layers=2, vocab_size=12)
SMALL = {
    "ctm_hidden_size": 16, "ctm_num_heads": 2, "ctm_num_neurons": 0, "ctm_stream_size": 16, "ctm_source_layers": [0, 2],
}  # fmt: skip


@pytest.fixture(scope="module")
def easy():
    """The answer is what the first position shows; the last knows nothing."""
    number = TRAIN_ROWS + VALIDATION_ROWS + TEST_ROWS
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (number, 1), generator=generator)
    digits = torch.nn.functional.one_hot(torch.arange(10), 16).float()
    sources = torch.randn(number, 3, 2, 16, generator=generator)
    sources[:, 0] = 3 * digits[labels]
    return TaskStates(sources, labels, digits, 0.0)


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_right(name):
    for prompt, answer in task_rows(name, 50):
        body = prompt.rstrip("= ")
        assert int(answer) == (body.count("1") if name == "count" else eval(body))  # digits and signs alone
    assert task_rows(name, 5) == task_rows(name, 50)[:5]


def test_a_head_reads_what_an_mlp_cannot_see(easy):
    torch.manual_seed(0)
    head = train_head(TaskHead(TEXT, 2, **SMALL), easy, passes=4, seed=0)
    mlp = train_head(MlpHead(16, 8), easy, passes=4, seed=0)
    assert head.test > 0.8
    assert head.test == head.test_by_tick[1]
    assert mlp.test < 0.3


def test_infinite_warmup_keeps_floats(easy):
    torch.manual_seed(0)
    head = TaskHead(TEXT, 1, **SMALL)
    train_head(head, easy, passes=1, seed=0, ternary_warmup=math.inf, batch_size=500)
    assert {module.ternary_share for module in head.modules() if hasattr(module, "ternary_share")} == {0.0}


def test_a_fresh_head_answers_as_the_backbone(easy):
    right = (easy.sources[:100, -1:, -1] @ easy.digits.T).argmax(-1) == easy.labels[:100]
    assert accuracy(TaskHead(TEXT, 3, **SMALL), easy, 0, 100) == pytest.approx([right.float().mean().item()] * 3)


def test_the_bench_gives_means_over_seeds_and_a_figure(tmp_path):
    bench = load_bench("thinking")
    runs = [Trained(0.4, 0.5, [0.1, 0.5], 2.0, 7), Trained(0.4, 0.7, [0.3, 0.7], 4.0, 7)]
    result = bench.table({"Karla's head": {"chain": runs}}, {"chain": 1.0})
    row = result["rows"]["Karla's head"]
    assert row == pytest.approx({"parameters": 7, "chain": 0.6, "chain ±": 0.02**0.5, "chain s": 3.0})
    assert result["test_by_tick"] == {"chain": pytest.approx([0.2, 0.6])}
    bench.draw(result, tmp_path / "thinking.png")
    assert (tmp_path / "thinking.png").stat().st_size > 1000


def test_every_arm_of_the_bench_can_be_built():
    bench = load_bench("thinking")
    text = LlamaConfig(
        hidden_size=576, intermediate_size=8, num_attention_heads=9, num_hidden_layers=30, vocab_size=12
    )
    sizes = {arm: sum(p.numel() for p in bench.new_head(text, arm, 0)[0].parameters()) for arm in bench.HEADS}
    assert sizes["Karla's head"] == sizes["· 1 tick"] == sizes["· float weights"]
    assert sizes["· MLP on the last state"] == pytest.approx(sizes["Karla's head"], rel=0.01)
