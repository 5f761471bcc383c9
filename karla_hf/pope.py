"""POPE: oracle prefixes that open hard problems, as data for the stock `trl.GRPOTrainer` (arXiv 2601.18779).

problems = make_problems(rows)                                  # prompt, solution in steps, answer
sampler = ModelSampler(model, tokenizer, max_new_tokens=256)
difficulty = measure_difficulty(problems, sampler, exact_reward, file="difficulty.jsonl")
hard = select_hard(problems, difficulty)
prefixes = find_prefixes(hard, sampler, exact_reward, file="prefix.jsonl")
trainer = GRPOTrainer(model, exact_reward, train_dataset=build_rows(hard, prefixes), processing_class=tokenizer)
trainer.train()
evaluate(hard, ModelSampler(model, tokenizer, max_new_tokens=256, seed=1), exact_reward)
"""

from karla_hf.pope_curriculum import AdaptivePrefixes, PrefixCurriculum, StagedPrefixes
from karla_hf.pope_difficulty import mean_pass_at_k, measure_difficulty, pass_at_k, select_hard
from karla_hf.pope_eval import evaluate
from karla_hf.pope_prefix import find_prefixes, longest_prefix
from karla_hf.pope_problems import guide, make_problems, split_steps
from karla_hf.pope_rewards import (
    exact_reward,
    final_answer,
    find_reward,
    math_reward,
    reasoning_gym_reward,
    reward_function,
)
from karla_hf.pope_rows import build_rows, unguided_rows
from karla_hf.pope_sampling import ModelSampler, Sampler, model_fingerprint
from karla_hf.pope_tasks import load_problems


__all__ = [
    "AdaptivePrefixes",
    "ModelSampler",
    "PrefixCurriculum",
    "Sampler",
    "StagedPrefixes",
    "build_rows",
    "evaluate",
    "exact_reward",
    "final_answer",
    "find_prefixes",
    "find_reward",
    "guide",
    "load_problems",
    "longest_prefix",
    "make_problems",
    "math_reward",
    "mean_pass_at_k",
    "measure_difficulty",
    "model_fingerprint",
    "pass_at_k",
    "reasoning_gym_reward",
    "reward_function",
    "select_hard",
    "split_steps",
    "unguided_rows",
]
