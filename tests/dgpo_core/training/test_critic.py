"""The critic starts as the student's backbone with a head that says 0."""

import torch
from transformers import PreTrainedTokenizerFast

from dgpo_core.training.batches import collate, model_sequence
from dgpo_core.training.reinforce import Critic
from tests.dgpo_core.making import random_episode, tiny_model


def test_values(tokenizer: PreTrainedTokenizerFast) -> None:
    student = tiny_model(tokenizer)
    critic = Critic(student)
    sequences = [model_sequence(random_episode(seed)) for seed in range(4)]
    batch = collate(sequences, torch.device("cpu"))
    assert critic(batch).tolist() == [0.0] * len(batch.targets)
    torch.nn.init.normal_(critic.head.weight)
    values = critic(batch).split(batch.counts)
    for sequence, value in zip(sequences, values, strict=True):
        states = student.base_model(input_ids=torch.tensor([sequence.ids])).last_hidden_state[0]
        before = states[[position - 1 for position in sequence.positions]]
        torch.testing.assert_close(value, critic.head(before)[:, 0], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for parameter in critic.backbone.parameters():
            parameter.zero_()
    assert all(parameter.any() for parameter in student.parameters() if parameter.ndim > 1)
