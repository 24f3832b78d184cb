r"""Activation states: on which side of two thresholds a hidden unit is, in two bits each.

With mean mu_d and standard deviation sigma_d of channel d over all recorded tokens, low_d = mu_d - m sigma_d and
high_d = mu_d + m sigma_d (GeRe: m = 1). The state of a value h is -1 if h <= low, +1 if h >= high, else 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def activation_states(hidden_BSD: Tensor, low_D: Tensor, high_D: Tensor) -> Tensor:
    """States of hidden values; the boundaries belong to the outer classes.

    Args:
        hidden_BSD: Hidden states, any float type; any number of leading axes.
        low_D: Lower threshold of each channel.
        high_D: Upper threshold of each channel.

    Returns:
        int8 in {-1, 0, +1}, of the same shape. A channel whose thresholds coincide is -1 on them.
    """
    hidden = hidden_BSD.float()
    below, above = hidden <= low_D, hidden >= high_D
    return (above & ~below).to(torch.int8) - below.to(torch.int8)


class RunningStatistics:
    """Mean and variance of each channel over tokens that arrive in parts, merged as in Chan et al. (1979).

    In float64 and about the mean: the difference of two large sums, E[x^2] - E[x]^2, loses all digits if the mean
    is large compared with the deviation.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.mean_D = torch.zeros(())
        self.squares_D = torch.zeros(())

    def add(self, hidden_SD: Tensor) -> None:
        """Add the tokens of one part."""
        part = hidden_SD.double()
        mean_D = part.mean(0)
        self.merge(float(part.shape[0]), mean_D, ((part - mean_D) ** 2).sum(0))

    def merge(self, count: float, mean_D: Tensor, squares_D: Tensor) -> None:
        """Merge another process's counts: tokens, their mean, their squared deviations from it."""
        if count == 0:
            return
        if self.count == 0:
            self.count, self.mean_D, self.squares_D = count, mean_D, squares_D
            return
        total, delta_D = self.count + count, mean_D - self.mean_D
        self.mean_D = self.mean_D + delta_D * (count / total)
        self.squares_D = self.squares_D + squares_D + delta_D**2 * (self.count * count / total)
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and population standard deviation, float32."""
        return self.mean_D.float(), (self.squares_D / self.count).sqrt().float()


def hidden_statistics(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each channel, every token weighted equally.

    Args:
        parts: Tensors of shape (S, D), for example one per text.

    Returns:
        ``(mean_D, std_D)``, float32.

    Raises:
        ValueError: If there are no tokens.
    """
    statistics = RunningStatistics()
    for part in parts:
        if part.shape[0]:
            statistics.add(part)
    if statistics.count == 0:
        raise ValueError("hidden_statistics was given no tokens, so there is no mean.")
    return statistics.result()


def pack_states(states_TD: Tensor) -> Tensor:
    """Four states in a byte, the first in the lowest bits.

    Args:
        states_TD: int8 in {-1, 0, +1}.

    Returns:
        uint8 of shape (T, ceil(D / 4)).
    """
    tokens, channels = states_TD.shape
    codes = torch.zeros(tokens, -(-channels // 4) * 4, dtype=torch.uint8, device=states_TD.device)
    codes[:, :channels] = (states_TD + 1).to(torch.uint8)
    codes = codes.view(tokens, -1, 4)
    return codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6


def unpack_states(packed_TB: Tensor, channels: int) -> Tensor:
    """The inverse of `pack_states`.

    Args:
        packed_TB: uint8 of shape (T, ceil(D / 4)).
        channels: D.

    Returns:
        int8 of shape (T, D).
    """
    codes = torch.stack([packed_TB >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    return codes.flatten(1)[:, :channels].to(torch.int8) - 1
