"""Which files hold the paper's questions, and how many there must be (paper, table 9)."""

# the split of FlashRAG's that the paper tests on
TEST_SPLITS = {
    "nq": "test",
    "triviaqa": "test",
    "popqa": "test",
    "hotpotqa": "dev",
    "2wikimultihopqa": "dev",
    "musique": "dev",
    "bamboogle": "test",
}
QUESTIONS = {
    ("nq", "train"): 79_168,
    ("hotpotqa", "train"): 90_447,
    ("nq", "test"): 3_610,
    ("triviaqa", "test"): 11_313,
    ("popqa", "test"): 14_267,
    ("hotpotqa", "test"): 7_405,
    ("2wikimultihopqa", "test"): 12_576,
    ("musique", "test"): 2_417,
    ("bamboogle", "test"): 125,
}
PASSAGES = 21_015_324  # of wiki-18
