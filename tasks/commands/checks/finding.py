"""The result of one check."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """`advice` says what to do; it is empty where all is well."""

    level: Literal["ok", "warning", "error"]
    subject: str
    message: str
    advice: str = ""


def ok(subject: str, message: str) -> Finding:
    return Finding("ok", subject, message)


def warning(subject: str, message: str, advice: str) -> Finding:
    return Finding("warning", subject, message, advice)


def error(subject: str, message: str, advice: str) -> Finding:
    return Finding("error", subject, message, advice)
