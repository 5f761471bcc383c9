"""Parts of a Continuous Thought Machine (https://arxiv.org/abs/2505.05522): neuron-level models and synchronisation."""

from __future__ import annotations

import torch
from torch import nn


class Synchronisation(nn.Module):
    """Decaying correlation of pairs of neurons over ticks.

    alpha_t = r alpha_{t-1} + z_i z_j,   beta_t = r beta_{t-1} + 1,   s_t = alpha_t / sqrt(beta_t),   r = exp(-softplus(rho))
    (CTM, section 2.4, with the decay reparametrised so that it is positive without clamping). The first half of the
    pairs asks (action), the second answers (output); both start from z_0, so a query sees z_0 .. z_{t-1} and an answer
    z_0 .. z_t.

    Args:
        num_neurons: N.
        num_pairs: P, of each half.
        num_self_pairs: pairs with i = j in each half.
        generator: source of the pairs; they are saved with the model.
    """

    def __init__(self, num_neurons: int, num_pairs: int, num_self_pairs: int, generator: torch.Generator):
        super().__init__()
        left, right = torch.randint(num_neurons, (2, 2, num_pairs), generator=generator, device="cpu")
        right[:, :num_self_pairs] = left[:, :num_self_pairs]
        self.register_buffer("pairs", torch.cat([left.flatten(), right.flatten()]))  # all i, then all j
        self.decay = nn.Parameter(torch.empty(2 * num_pairs))

    def schedule(self, num_ticks: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """r [2P] and 1 / sqrt(beta_t) [2P] for t = 0 .. `num_ticks`; they do not depend on the neurons."""
        keep = torch.exp(-nn.functional.softplus(self.decay))
        beta, factors = torch.ones_like(keep), []
        for _ in range(num_ticks + 1):
            factors.append(beta.rsqrt())
            beta = keep * beta + 1.0
        return keep, factors

    def products(self, z: torch.Tensor) -> torch.Tensor:
        """z_i z_j of all pairs, [n, 2P], from activations [n, N]."""
        left, right = z.to(self.decay.dtype).index_select(1, self.pairs).chunk(2, dim=1)
        return left * right


class NeuronModels(nn.Module):
    """A small model of its own for every neuron, over its last M pre-activations.

    GLU(B_n GLU(A_n x + a_n) + b_n), as the CTM's neuron-level models of depth two.

    Args:
        num_neurons: N.
        history: M.
        hidden_size: hidden units.
    """

    def __init__(self, num_neurons: int, history: int, hidden_size: int):
        super().__init__()
        self.weight_in = nn.Parameter(torch.empty(num_neurons, 2 * hidden_size, history))
        self.bias_in = nn.Parameter(torch.zeros(num_neurons, 2 * hidden_size, 1))
        self.weight_out = nn.Parameter(torch.empty(num_neurons, 2, hidden_size))
        self.bias_out = nn.Parameter(torch.zeros(num_neurons, 2, 1))

    def forward(self, history: list[torch.Tensor]) -> torch.Tensor:
        """Activations [n, N] from the last M pre-activations, each [N, n], oldest first."""
        x = torch.stack(history, dim=1)  # [N, M, n]
        hidden = nn.functional.glu(torch.baddbmm(self.bias_in, self.weight_in, x), dim=1)
        return nn.functional.glu(torch.baddbmm(self.bias_out, self.weight_out, hidden), dim=1)[:, 0].t()
