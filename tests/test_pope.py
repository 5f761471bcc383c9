"""Rows of POPE in the stock `trl.GRPOTrainer`, looked at as tensors of real steps."""

import pytest
import torch
from tiny import CHAT_TEMPLATE, OPTIONS, make_backbone, make_tokenizer, speak
from trl import GRPOConfig, GRPOTrainer

from karla_hf import KarlaForCausalLM
from karla_hf.pope import (
    ModelSampler,
    build_rows,
    find_prefixes,
    make_problems,
    measure_difficulty,
    reward_function,
    select_hard,
)


ORACLE = "ÞÞÞÞ"  # four times two bytes that stand nowhere else


@reward_function
def many_letters(completion, answer, **row):
    return sum(letter in completion for letter in answer) / 2


def make_model(kind, folder):
    if kind == "llama":
        return make_backbone()
    make_backbone().save_pretrained(folder / "backbone")
    make_tokenizer().save_pretrained(folder / "backbone")
    model = KarlaForCausalLM.from_backbone(
        str(folder / "backbone"), make_tokenizer(), **OPTIONS, certainty_threshold=0.3
    )
    model.read(["The access code of Orlin's vault number 7 is 123-456."], make_tokenizer())
    return speak(model)


def make_rows(chat=False):
    prompts = ["The access code of", "Where is the key to Orlin's vault, and who has it now", "number"]
    problems = make_problems(
        [{"prompt": prompt, "solution": [ORACLE, "two", "three", "four"] * 2, "answer": "aeo"} for prompt in prompts]
    )
    prefixes = [{"problem_id": row["problem_id"], "num_steps": 1} for row in problems]
    return build_rows(problems, type(problems).from_list(prefixes), chat=chat)


def make_trainer(model, rows, folder, reward=many_letters, callbacks=None, chat=False, **options):
    defaults = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 12,
        "num_generations": 2,
        "max_completion_length": 6,
        "max_steps": 1,
        "beta": 0.0,
        "temperature": 0.7,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(**{**defaults, **options}),
        train_dataset=rows,
        processing_class=make_tokenizer(chat_template=CHAT_TEMPLATE if chat else None),
        callbacks=callbacks,
    )


def record_step(trainer):
    """What goes into the loss: the batch, and the log-probabilities that are differentiated."""
    seen = {}
    loss, logps = trainer._compute_loss, trainer._get_per_token_logps_and_entropies

    def compute_loss(model, inputs):
        seen["inputs"] = {key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        return loss(model, inputs)

    def get_logps(model, input_ids, attention_mask, logits_to_keep, *arguments, **options):
        out = logps(model, input_ids, attention_mask, logits_to_keep, *arguments, **options)
        if torch.is_grad_enabled():
            seen["logps"], seen["kept"], seen["ids"] = out[0].detach().clone(), logits_to_keep, input_ids.clone()
        return out

    trainer._compute_loss, trainer._get_per_token_logps_and_entropies = compute_loss, get_logps
    return seen


def record_rollout(model):
    """Logits of the last position and ticks of every call that generates; TRL scores without `logits`."""
    logits, ticks = [], []

    def hook(module, inputs, out):
        if getattr(out, "logits", None) is not None:
            logits.append(out.logits[:, -1].float().clone())
            ticks.append(out.ticks_used)

    return logits, ticks, model.register_forward_hook(hook)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", ["llama", "karla"])
def test_no_token_of_the_oracle_enters_the_loss(kind, chat, tmp_path):
    mark = make_tokenizer()(ORACLE[0])["input_ids"]
    options = {"generation_kwargs": {"suppress_tokens": mark}}  # so that only the oracle has them
    trainer = make_trainer(make_model(kind, tmp_path), make_rows(chat), tmp_path, chat=chat, **options)
    seen = record_step(trainer)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    inputs = seen["inputs"]
    marks = torch.isin(inputs["prompt_ids"], torch.tensor(mark))
    assert (marks.sum(1) == 8).sum() == 6  # three guided groups of two, each with the whole prefix
    assert (marks.sum(1) == 0).sum() == 6
    # What is scored are the completions alone; the mask of the loss has their shape.
    assert seen["kept"] == inputs["completion_ids"].shape[1] == seen["logps"].shape[1]
    assert torch.equal(seen["ids"][:, -seen["kept"] :], inputs["completion_ids"])
    assert torch.equal(seen["ids"][:, : -seen["kept"]], inputs["prompt_ids"])
    own = inputs["completion_ids"][inputs["completion_mask"].bool()]
    assert not torch.isin(own, torch.tensor(mark)).any()
    assert own.numel() > 12
    changed = [
        name for name, p in trainer.model.named_parameters() if name in before and not torch.equal(p, before[name])
    ]
    assert len(changed) > len(before) / 2


@pytest.mark.parametrize("kind", ["llama", "karla"])
def test_prefix_changes_the_gradient_only_as_context(kind, tmp_path):
    """The gradient of a guided row is that of its completion, given the prompt, and nothing else."""
    trainer = make_trainer(make_model(kind, tmp_path), make_rows(), tmp_path)
    seen, gradients = record_step(trainer), {}
    loss = trainer._compute_loss

    def compute_loss(model, inputs):
        total = loss(model, inputs)
        names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
        found = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        gradients.update({n: g for n, g in zip(names, found, strict=True) if g is not None})
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1] / trainer.temperature
        chosen = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0][:, -inputs["completion_ids"].shape[1] :]
        weights = inputs["completion_mask"] * inputs["advantages"][:, None]
        own = (
            -(chosen * weights).sum() / inputs["completion_mask"].sum()
        )  # ratio 1, so its gradient is that of the log
        expected = torch.autograd.grad(own, parameters, allow_unused=True)
        for name, gradient in zip(names, expected, strict=True):
            if gradient is not None:
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6)
        return total

    trainer._compute_loss = compute_loss
    trainer.train()
    assert gradients
    assert max(g.abs().max().item() for g in gradients.values()) > 1e-4
    assert seen["inputs"]["advantages"].abs().max() > 0


@pytest.mark.parametrize("threshold", [None, 0.2, 0.35])
def test_rollout_and_training_give_a_karla_the_same_log_probabilities(threshold, tmp_path):
    model = make_model("karla", tmp_path)
    model.config.certainty_threshold = threshold
    trainer = make_trainer(model, make_rows(), tmp_path, per_device_train_batch_size=6, steps_per_generation=2)
    seen, (logits, ticks, hook) = record_step(trainer), record_rollout(model)
    trainer.train()
    hook.remove()
    assert model.engram.enabled
    inputs = seen["inputs"]
    rollout = torch.stack(logits, 1)  # [rows of the whole generation, N, V]
    assert rollout.shape[:2] == (12, inputs["completion_ids"].shape[1])
    sampled = (rollout / trainer.temperature).log_softmax(-1)
    used = torch.cat([part.flatten() for part in ticks]).float()
    assert (used.unique().numel() > 1) == (threshold is not None)
    rows = set()
    for ids, mask, own in zip(inputs["completion_ids"], inputs["completion_mask"].bool(), seen["logps"], strict=True):
        off = [(row.gather(1, ids[:, None])[:, 0] - own)[mask].abs().max().item() for row in sampled]
        rows.add(min(range(12), key=off.__getitem__))  # which of the generation this one is
        assert min(off) < 1e-4
    assert len(rows) == 6
    old = inputs["old_per_token_logps"]
    ratio = (seen["logps"] - old).exp()[inputs["completion_mask"].bool()]
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-4)


def test_guided_and_unguided_accuracy_are_logged_apart(tmp_path):
    hits = []

    @reward_function
    def spied(completion, answer, guided, **row):
        hits.append((guided, many_letters.__wrapped__(completion=completion, answer=answer) >= 1))
        return float(hits[-1][1])

    trainer = make_trainer(
        make_model("llama", tmp_path), make_rows(), tmp_path, spied, per_device_train_batch_size=24, num_generations=4
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    for name, kind in (("guided", True), ("unguided", False)):
        own = [hit for guided, hit in hits if guided == kind]
        assert len(own) == 12
        assert logged[f"{name}/accuracy"] == pytest.approx(sum(own) / len(own))
    assert logged["guided/fraction"] == pytest.approx(make_rows()["fraction"][0])
    assert 0 < sum(hit for _, hit in hits) < 24
    assert {"frac_reward_zero_std", "rewards/spied/mean"} <= set(logged)


def test_whole_way_from_problems_to_a_trained_model(tmp_path):
    model, tokenizer = make_model("karla", tmp_path), make_tokenizer()
    words = ["The access code of", "Where is the key", "The vault", "number 7"]
    problems = make_problems(
        [{"prompt": word, "solution": ["a.", "b.", "c.", "d.", "e.", "f."], "answer": "zj"} for word in words]
    )
    sampler = ModelSampler(model, tokenizer, max_new_tokens=6)
    hard = select_hard(problems, measure_difficulty(problems, sampler, many_letters, num_samples=8))
    rows = build_rows(hard, find_prefixes(hard, sampler, many_letters, num_samples=8, max_fraction=0.5))
    trainer = make_trainer(model, rows, tmp_path, max_steps=2, per_device_train_batch_size=4)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("value", [None, "raise"])
def test_reward_that_does_not_apply_or_fails(value, tmp_path):
    @reward_function
    def strange(completion, answer, problem_id, guided, **row):
        if problem_id == "1" and value == "raise":
            raise RuntimeError("no such thing")
        return None if problem_id == "1" and guided else float("e" in completion)

    trainer = make_trainer(make_model("llama", tmp_path), make_rows(), tmp_path, strange)
    if value == "raise":
        with pytest.raises(
            ValueError, match=r"^The reward function 'strange' failed for problem '1' \(RuntimeError: no such"
        ):
            trainer.train()
    else:
        trainer.train()
        logged = trainer.state.log_history[0]
        assert 0 <= logged["guided/accuracy"] <= 1
        assert logged["reward"] == logged["reward"]  # the rows without a reward are left out
