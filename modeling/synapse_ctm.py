"""The synapses of a Continuous Thought Machine (https://arxiv.org/abs/2505.05522): one layer, or a U-Net."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import nn


BOTTLENECK = 16  # least width of the U-Net, as published


class Synapse(nn.Module):
    """Pre-activations LayerNorm(GLU(W [o, z] + b)).

    Args:
        in_features: width of [o, z].
        num_neurons: N.
        dropout: rate at the input.
    """

    def __init__(self, in_features: int, num_neurons: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_features, 2 * num_neurons)
        self.norm = nn.LayerNorm(num_neurons)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, N] from [n, in_features]."""
        return self.norm(nn.functional.glu(self.linear(self.dropout(x)), dim=-1))


class SynapseUNet(nn.Module):
    """Pre-activations through `depth` widths from N down to 16 and up again, with normalised skips.

    x_0 = f_0([o, z]),  x_k = f_k(x_{k-1}),  y_last = x_last,  y_k = LayerNorm(g_k(y_{k+1}) + x_k),  every f and g being
    SiLU(LayerNorm(linear)).

    Args:
        in_features: width of [o, z].
        num_neurons: N.
        depth: number of widths, 2 or more.
        dropout: rate at the input of all but the first linear.
    """

    def __init__(self, in_features: int, num_neurons: int, depth: int, dropout: float):
        super().__init__()
        widths = [int(width) for width in np.linspace(num_neurons, BOTTLENECK, depth)]
        steps = list(pairwise(widths))
        self.first = _block(in_features, widths[0], 0.0)
        self.down = nn.ModuleList(_block(wide, narrow, dropout) for wide, narrow in steps)
        self.up = nn.ModuleList(_block(narrow, wide, dropout) for wide, narrow in steps)
        self.norms = nn.ModuleList(nn.LayerNorm(wide) for wide, _ in steps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, N] from [n, in_features]."""
        x = self.first(x)
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        for up, norm, skip in zip(reversed(self.up), reversed(self.norms), reversed(skips), strict=True):
            x = norm(up(x) + skip)
        return x


def _block(in_features: int, out_features: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(dropout), nn.Linear(in_features, out_features), nn.LayerNorm(out_features), nn.SiLU()
    )
