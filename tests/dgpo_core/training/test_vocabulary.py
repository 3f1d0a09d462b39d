"""Pairs of tokenizers that can and cannot be compared."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from dgpo_core.errors import UserError
from dgpo_core.training.batches import check_same_vocabulary


def test_vocabularies(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    check_same_vocabulary(tokenizer, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    longer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    longer.add_tokens(["<extra>"])
    check_same_vocabulary(tokenizer, longer)  # more tokens are no contradiction
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    other.add_tokens(["<other>"])
    with pytest.raises(UserError, match=r"different tokenizers.* id \d+: '<other>' against '<extra>'"):
        check_same_vocabulary(other, longer)
