"""YAML as DVC has it, version 1.2: 1e-6 and 010 are numbers (10), `no`, `on` and 1:30 are texts.

What is written here means the same in version 1.1 too, which PyYAML and others read.
"""

import io
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import implicit_resolvers

# Line breaks of 1.1 that 1.2 takes for letters: written as they are, the two read different texts.
BREAKS = re.compile("[\x85\u2028\u2029]")
# What one of the two versions takes for something other than a text.
NO_TEXT = [pattern for _versions, _tag, pattern, _first in implicit_resolvers]


class _Representer(SafeRepresenter):
    """Quotes texts, and writes numbers, so that both versions read the same."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, text: str) -> ScalarNode:
        ambiguous = any(pattern.match(text) for pattern in NO_TEXT)
        style = '"' if BREAKS.search(text) else "'" if ambiguous else None  # only in " they are escaped
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    def number(self, number: float) -> ScalarNode:
        node = self.represent_float(number)
        if "." not in node.value:  # 1e-06 is a text in version 1.1
            node.value = node.value.replace("e", ".0e")
        return node


_Representer.add_representer(str, _Representer.text)
_Representer.add_representer(float, _Representer.number)


def parse(text: str) -> Any:
    """Return the content of a YAML document. Raise ValueError with the line and what is wrong there."""
    try:
        return YAML(typ="safe").load(text)  # as DVC: read in C where that is installed
    except YAMLError as error:
        where = ""
        if isinstance(error, MarkedYAMLError) and error.problem:
            where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
            raise ValueError(f"not valid YAML: {where}{' '.join(error.problem.split())}") from error
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error


def as_text(content: Any) -> str:
    """Write plain values as a YAML document, with their keys in the order that they have."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.width = 10_000  # else an address is put on a line of its own, after a blank
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # None by default
    stream = io.StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()
