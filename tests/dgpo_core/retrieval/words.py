"""The random encoder's vocabulary."""

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "query", "passage", ":", "red", "green", "blue", "house", "tree"]
