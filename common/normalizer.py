"""Observations scaled by what has been seen of them."""

import torch
from torch import Tensor, nn


class RunningNormalizer(nn.Module):
    """Running mean and variance of observations; the identity until FIRST of them have come.

    A value far outside the range seen so far is taken for one REACH ranges away, so that a spike cannot ruin them.
    """

    FIRST, REACH = 32, 10

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("low", torch.zeros(dim))
        self.register_buffer("high", torch.zeros(dim))
        self.register_buffer("first", torch.zeros(self.FIRST, dim))  # the first observations, until they are enough
        self.register_buffer("waiting", torch.zeros((), dtype=torch.long))  # how many these are

    def update(self, obs: Tensor) -> None:
        """Takes in observations (N, O)."""
        if obs.shape[1] == 0:  # images only
            return
        parts = [obs]
        if self.count == 0:
            parts = [*(row[None] for row in self.first[: self.waiting]), obs]
            seen = torch.cat(parts)
            if len(seen) < self.FIRST:
                self.first[: len(seen)] = seen
                self.waiting.fill_(len(seen))
                return
            outer = 1 + len(seen) // 100  # at either end they may be spikes
            self.low.copy_(seen.kthvalue(1 + outer, 0).values)
            self.high.copy_(seen.kthvalue(len(seen) - outer, 0).values)
        for part in parts:
            self.add(part)

    def add(self, obs: Tensor) -> None:
        """Chan et al. 1979, parallel variance."""
        reach = self.REACH * (self.high - self.low).clamp(min=1)
        obs = obs.clamp(self.low - reach, self.high + reach)
        self.low.copy_(torch.minimum(self.low, obs.amin(0)))
        self.high.copy_(torch.maximum(self.high, obs.amax(0)))
        total = self.count + len(obs)
        delta = obs.mean(0) - self.mean
        weight = len(obs) / total
        self.var += weight * (obs.var(0, correction=0) - self.var + (1 - weight) * delta.square())
        self.mean += weight * delta
        self.count.copy_(total)

    def forward(self, obs: Tensor) -> Tensor:
        return ((obs - self.mean) * (self.var + 1e-6).rsqrt()).clamp(-10, 10)
