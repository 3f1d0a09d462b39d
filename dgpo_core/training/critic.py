"""The critic: the student's backbone with a fresh scalar head (paper, section 4.3)."""

import copy

import torch
from transformers import PreTrainedModel

from dgpo_core.training.batches import TokenBatch, backbone_of, counted_hidden


class Critic(torch.nn.Module):
    """Values of the states before each counted token."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone_of(student))
        self.head = torch.nn.Linear(student.config.get_text_config().hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.head.to(student.device)

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        """[N] float32."""
        values: torch.Tensor = self.head(counted_hidden(self.backbone, batch))
        return values.float()[:, 0]
