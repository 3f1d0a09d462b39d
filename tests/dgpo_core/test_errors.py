"""What may be shown of an address."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.errors import without_credentials

WORDS = st.text(st.characters(exclude_characters="/@", exclude_categories=["Z", "C"]), min_size=1)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://me:" + "secret@host:5000/path", "https://host:5000/path"),
        (
            "cannot reach postgresql://dgpo:" + "p%40ss@db/x and https://token@git/y",
            "cannot reach postgresql://db/x and https://git/y",
        ),
        ("https://me:" + "p@ss@host/path", "https://host/path"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
        ("write to somebody@example.org, see https://example.org/@somebody", None),
        ("", None),
    ],
)
def test_urls_lose_user_and_password(given: str, shown: str | None) -> None:
    assert without_credentials(given) == (given if shown is None else shown)


@given(WORDS, WORDS, WORDS)
def test_a_password_is_never_left(user: str, password: str, host: str) -> None:
    shown = without_credentials(f"x://{user}:{password}@{host}")
    assert shown == f"x://{host}"
