"""YAML as DVC has it, version 1.2: 1e-6 and 010 are numbers (10), `no`, `on` and 1:30 are texts.

What we write means the same in version 1.1 too, which PyYAML and others read.
"""

import re
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

# Texts that only 1.2 takes for numbers: PyYAML would not quote them.
NUMBERS = re.compile(
    r"[-+]?(0o[0-7_]+|[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?|\.[0-9_]+([eE][-+]?[0-9]+)?)$|[-+][0-9_]+$"
)

# Line breaks of 1.1 that 1.2 takes for letters: written as they are, the two read different texts.
BREAKS = re.compile("[\x85\u2028\u2029]")


class _Dumper(yaml.SafeDumper):
    """PyYAML's, which also quotes texts that the two versions would read differently."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if BREAKS.search(text) else None  # in these quotes they are escaped
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", NUMBERS, list("-+.0123456789"))


def parse(text: str) -> Any:
    """The content of a YAML document. Raises ValueError with the line and what is wrong there."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        where = ""
        if isinstance(error, MarkedYAMLError) and error.problem:
            where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
            raise ValueError(f"not valid YAML: {where}{' '.join(error.problem.split())}") from error
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error


def as_text(content: Any) -> str:
    """Plain values as a YAML document, their keys in the order that they have."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
