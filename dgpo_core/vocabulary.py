"""Whether two tokenizers name the same tokens; without torch, which is slow to import."""

from typing import Any

from dgpo_core.errors import UserError


def check_same_vocabulary(student: Any, teacher: Any) -> None:
    """Raise UserError when two tokenizers (with `get_vocab()`) give one id different strings."""
    first, second = ({i: token for token, i in t.get_vocab().items()} for t in (student, teacher))
    wrong = min((i for i in first.keys() & second.keys() if first[i] != second[i]), default=None)
    if wrong is not None:
        raise UserError(
            "models: student and teacher have different tokenizers, "
            "so the teacher's tokens and distributions mean nothing to the student; "
            f"the first difference is id {wrong}: {first[wrong]!r} against {second[wrong]!r}"
        )
