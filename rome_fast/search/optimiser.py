"""Adam on the δ of many edits, each with steps of its own."""

import torch
from torch import Tensor


class Adam:
    """Adam (Kingma & Ba 2015) on the rows of a matrix, each with steps of its own."""

    def __init__(self, parameters: Tensor, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.first, self.second = torch.zeros_like(parameters), torch.zeros_like(parameters)
        # In fp32, 1 - 0.999 would be wrong by 5e-5 of itself, and every update with it.
        self.steps = torch.zeros(len(parameters), 1, dtype=torch.float64, device=parameters.device)

    def forget(self, row: int) -> None:
        """Begin anew with this row."""
        for moment in (self.first, self.second, self.steps):
            moment[row] = 0

    def step(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """What to add to these rows."""
        self.steps[rows] += 1
        steps = self.steps[rows]
        self.first[rows] = self.first[rows].lerp(gradient, 0.1)
        self.second[rows] = self.second[rows] * 0.999 + 0.001 * gradient**2
        scale = self.second[rows].sqrt() / (1 - 0.999**steps).sqrt().to(gradient.dtype) + 1e-8
        return -(self.learning_rate / (1 - 0.9**steps)).to(gradient.dtype) * self.first[rows] / scale
