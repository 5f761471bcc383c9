"""The commands `karla pope …`. What they do is in `karla_hf.pope_commands`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from karla_hf.options import JsonFile


if TYPE_CHECKING:
    from karla_hf.pope_commands import Options

pope = typer.Typer(
    help="Make problems that a model never solves learnable, with beginnings of their solutions.", no_args_is_help=True
)

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Causal LM or Karla: a name on the Hub, or a folder.", show_default=False),
]
Problems = Annotated[
    str,
    typer.Argument(
        metavar="PROBLEMS",
        help="champ, chain-sum, a .jsonl or .parquet file with prompt, solution and answer, or a data set on the Hub.",
        show_default=False,
    ),
]
Folder = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="Folder of the results; what it holds is not done again.", show_default=False),
]
Revision = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of MODEL on the Hub.", show_default=False)
]
Limit = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Take the first N problems only.", show_default=False)
]
Split = Annotated[str, typer.Option(metavar="NAME", help="Split of a data set on the Hub.")]
Reward = Annotated[
    str, typer.Option(metavar="NAME", help="exact, math, reasoning-gym, or the import path of a TRL reward function.")
]
Plain = Annotated[bool, typer.Option("--plain", help="Continue prompts as texts, without the chat template.")]
Samples = Annotated[int, typer.Option("--samples", metavar="N", min=1, help="Completions per problem or prefix.")]
NewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Longest completion, in tokens.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="Temperature, above 0.")]
TopP = Annotated[float, typer.Option("--top-p", metavar="SHARE", help="Share of the probability to sample from.")]
TopK = Annotated[int, typer.Option("--top-k", metavar="N", min=0, help="Tokens to sample from; 0 for all.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Another seed gives other samples.")]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Completions generated at once.")]
MaxCorrect = Annotated[
    int, typer.Option(metavar="N", min=0, help="A problem is hard if at most N of its samples are correct.")
]
MinSuccess = Annotated[int, typer.Option(metavar="N", min=1, help="Correct samples that a prefix needs.")]
MaxFraction = Annotated[float, typer.Option(metavar="SHARE", help="Longest prefix, as a share of the solution.")]


@pope.command()
def difficulty(
    model: Model,
    problems: Problems,
    directory: Folder,
    reward: Reward = "exact",
    samples: Samples = 16,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    plain: Plain = False,
    limit: Limit = None,
    split: Split = "train",
    revision: Revision = None,
    json_file: JsonFile = None,
) -> None:
    """Sample every problem without help and count what is correct.

    Writes difficulty.jsonl into DIR, batch by batch; the same command goes on
    where it was stopped.
    """
    from karla_hf import pope_commands

    options = _options(model, revision, problems, limit, split, reward, plain, samples, max_new_tokens, temperature, top_p,
                       top_k, seed, batch_size)  # fmt: skip
    pope_commands.difficulty(options, directory, json_file)


@pope.command()
def prefix(
    model: Model,
    problems: Problems,
    directory: Folder,
    reward: Reward = "exact",
    samples: Samples = 16,
    max_correct: MaxCorrect = 0,
    min_success: MinSuccess = 1,
    max_fraction: MaxFraction = 0.25,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    plain: Plain = False,
    limit: Limit = None,
    split: Split = "train",
    revision: Revision = None,
    json_file: JsonFile = None,
) -> None:
    """Find the shortest beginning of each hard problem's solution from which the model succeeds.

    Measures the difficulty first, unless DIR has it. Writes prefix.jsonl into DIR,
    batch by batch; the same command goes on where it was stopped.
    """
    from karla_hf import pope_commands

    options = _options(model, revision, problems, limit, split, reward, plain, samples, max_new_tokens, temperature, top_p,
                       top_k, seed, batch_size)  # fmt: skip
    pope_commands.prefix(options, directory, max_correct=max_correct, min_success=min_success,
                         max_fraction=max_fraction, json_file=json_file)  # fmt: skip


@pope.command()
def build(
    model: Model,
    problems: Problems,
    directory: Folder,
    reward: Reward = "exact",
    samples: Samples = 16,
    max_correct: MaxCorrect = 0,
    min_success: MinSuccess = 1,
    max_fraction: MaxFraction = 0.25,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    plain: Plain = False,
    limit: Limit = None,
    split: Split = "train",
    revision: Revision = None,
    json_file: JsonFile = None,
) -> None:
    """Write each hard problem twice, guided and unguided, as a data set for GRPO.

    Does what is missing of difficulty and prefix first. Then
    trl grpo --dataset_name DIR --reward_funcs karla_hf.pope.exact_reward … trains on it.
    """
    from karla_hf import pope_commands

    options = _options(model, revision, problems, limit, split, reward, plain, samples, max_new_tokens, temperature, top_p,
                       top_k, seed, batch_size)  # fmt: skip
    pope_commands.build(options, directory, max_correct=max_correct, min_success=min_success,
                        max_fraction=max_fraction, json_file=json_file)  # fmt: skip


@pope.command(name="eval")
def evaluate(
    model: Model,
    problems: Problems,
    hard: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Only the problems that this difficulty.jsonl calls hard.", show_default=False
        ),
    ] = None,
    max_correct: MaxCorrect = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keep the counts there, and go on where it was stopped.", show_default=False
        ),
    ] = None,
    reward: Reward = "exact",
    samples: Samples = 16,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 1,
    batch_size: BatchSize = 64,
    plain: Plain = False,
    limit: Limit = None,
    split: Split = "train",
    revision: Revision = None,
    json_file: JsonFile = None,
) -> None:
    """Measure pass@1 and pass@16 without help.

    Its seed is another than that of difficulty, whose samples chose the problems.
    """
    from karla_hf import pope_commands

    options = _options(model, revision, problems, limit, split, reward, plain, samples, max_new_tokens, temperature, top_p,
                       top_k, seed, batch_size)  # fmt: skip
    pope_commands.evaluate_model(options, hard, max_correct, output, json_file)


def _options(
    model: str, revision: str | None, problems: str, limit: int | None, split: str, reward: str, plain: bool,
    samples: int, max_new_tokens: int, temperature: float, top_p: float, top_k: int, seed: int, batch_size: int,
) -> "Options":  # fmt: skip
    from karla_hf.pope_commands import Options

    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed,
                "batch_size": batch_size}  # fmt: skip
    return Options(model, revision, problems, limit, split, reward, plain, samples, sampling)
