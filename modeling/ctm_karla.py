"""Parts of a Continuous Thought Machine (https://arxiv.org/abs/2505.05522): neuron-level models and synchronisation."""

from __future__ import annotations

import torch
from torch import nn


def pair_up(left: torch.Tensor, right: torch.Tensor, selection: str) -> torch.Tensor:
    """Pairs of chosen neurons: one to one for "random-pairing", else every left i with every right j, i <= j.

    Args:
        left: [n] int64.
        right: [n] int64.
        selection: "first-last", "random" or "random-pairing".

    Returns:
        [2, P] int64, P = n or n (n + 1) / 2.

    Example:
        >>> pair_up(torch.tensor([5, 6]), torch.tensor([7, 8]), "random").tolist()
        [[5, 5, 6], [7, 8, 8]]
    """
    if selection != "random-pairing":
        i, j = torch.triu_indices(len(left), len(right), device="cpu")
        left, right = left[i], right[j]
    return torch.stack([left, right])


def choose_pairs(
    selection: str,
    num_neurons: int,
    num_asking: int,
    num_answering: int,
    num_self_pairs: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs that ask (action) and those that answer (output), in one of the published ways.

    "first-last": the last neurons ask, the first answer. "random": left and right neurons drawn with replacement.
    "random-pairing": the same, with `num_self_pairs` right neurons equal to the left ones; paired one to one.

    Args:
        selection: "first-last", "random" or "random-pairing".
        num_neurons: N.
        num_asking: neurons chosen to ask.
        num_answering: neurons chosen to answer.
        num_self_pairs: for "random-pairing".
        generator: of the CPU.

    Returns:
        Two [2, P] int64.

    Example:
        >>> [pairs.tolist() for pairs in choose_pairs("first-last", 9, 1, 2, 0, torch.Generator())]
        [[[8], [8]], [[0, 0, 1], [0, 1, 1]]]
    """
    chosen = []
    for count, first in ((num_asking, num_neurons - num_asking), (num_answering, 0)):
        if selection == "first-last":
            left = right = torch.arange(first, first + count, device="cpu")
        else:
            left, right = torch.randint(num_neurons, (2, count), generator=generator, device="cpu")
        if selection == "random-pairing":
            right[:num_self_pairs] = left[:num_self_pairs]
        chosen.append(pair_up(left, right, selection))
    return chosen[0], chosen[1]


class PairSynchronisation(nn.Module):
    """Decaying correlation of given pairs of neurons over ticks.

    alpha_t = r alpha_{t-1} + z_i z_j,   beta_t = r beta_{t-1} + 1,   s_t = alpha_t / sqrt(beta_t),   r = exp(-softplus(rho))
    (CTM, section 2.4, with the decay reparametrised so that it is positive without clamping), from alpha_0 = z_i z_j at
    the start state and beta_0 = 1. A pair that asks is read before a tick and sees z_0 .. z_{t-1}; one that answers is
    read after it and sees z_0 .. z_t.

    Args:
        pairs: [2, P] int64; saved with the model.
    """

    def __init__(self, pairs: torch.Tensor):
        super().__init__()
        self.register_buffer("pairs", pairs.flatten())  # all i, then all j
        self.decay = nn.Parameter(torch.empty(pairs.shape[1]))

    def schedule(self, num_ticks: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """r [P] and 1 / sqrt(beta_t) [P] for t = 0 .. `num_ticks`; they do not depend on the neurons."""
        keep = torch.exp(-nn.functional.softplus(self.decay))
        beta, factors = torch.ones_like(keep), []
        for _ in range(num_ticks + 1):
            factors.append(beta.rsqrt())
            beta = keep * beta + 1.0
        return keep, factors

    def products(self, z: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """z_i z_j of all pairs, [n, P], from activations [n, N]; [P, n] from [N, n] with `dim` 0."""
        left, right = z.to(self.decay.dtype).index_select(dim, self.pairs).chunk(2, dim=dim)
        return left * right


class Synchronisation(PairSynchronisation):
    """`PairSynchronisation` of random pairs: the first half asks (action), the second answers (output).

    Args:
        num_neurons: N.
        num_pairs: P, of each half.
        num_self_pairs: pairs with i = j in each half.
        generator: source of the pairs.
    """

    def __init__(self, num_neurons: int, num_pairs: int, num_self_pairs: int, generator: torch.Generator):
        left, right = torch.randint(num_neurons, (2, 2, num_pairs), generator=generator, device="cpu")
        right[:, :num_self_pairs] = left[:, :num_self_pairs]
        super().__init__(torch.stack([left.flatten(), right.flatten()]))


class NeuronModels(nn.Module):
    """A small model of its own for every neuron, over its last M pre-activations.

    GLU((B_n GLU((A_n x + a_n) / T_1) + b_n) / T_2), the CTM's neuron-level models of depth two, or with `hidden_size` 0
    GLU((A_n x + a_n) / T_1). The temperatures T are 1 unless they are learned.

    Args:
        num_neurons: N.
        history: M.
        hidden_size: hidden units; 0 for models of depth one.
        temperature: whether to learn T_1 and T_2.
        dropout: rate at the input of each layer.
    """

    def __init__(
        self, num_neurons: int, history: int, hidden_size: int, temperature: bool = False, dropout: float = 0.0
    ):
        super().__init__()
        self.dropout = dropout
        self.weight_in = nn.Parameter(torch.empty(num_neurons, 2 * hidden_size or 2, history))
        self.bias_in = nn.Parameter(torch.zeros(num_neurons, 2 * hidden_size or 2, 1))
        if hidden_size:
            self.weight_out = nn.Parameter(torch.empty(num_neurons, 2, hidden_size))
            self.bias_out = nn.Parameter(torch.zeros(num_neurons, 2, 1))
        self.temperature = nn.Parameter(torch.ones(2 if hidden_size else 1)) if temperature else None

    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Bias and weight of each layer, divided by its temperature: the same for all ticks of a pass."""
        layers = [(self.bias_in, self.weight_in)]
        if hasattr(self, "weight_out"):
            layers.append((self.bias_out, self.weight_out))
        if self.temperature is None:
            return layers
        return [(bias / t, weight / t) for (bias, weight), t in zip(layers, self.temperature, strict=True)]

    def forward(
        self, history: list[torch.Tensor], layers: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    ) -> torch.Tensor:
        """Activations [n, N] from the last M pre-activations, each [N, n], oldest first; `layers` as from `layers()`."""
        x = torch.stack(history, dim=1)  # [N, M, n]
        for bias, weight in self.layers() if layers is None else layers:
            if self.dropout:
                x = nn.functional.dropout(x, self.dropout, self.training)
            x = nn.functional.glu(torch.baddbmm(bias, weight, x), dim=1)
        return x[:, 0].t()
