"""YAML in which no key is said twice: PyYAML would take the last one without a word."""

from collections import Counter
from typing import Any

import yaml


def load(text: str) -> Any:
    """Return what a YAML document holds.

    Raises:
        yaml.YAMLError: when it is none, or a mapping in it has a key twice.
    """
    return yaml.load(text, _OnceLoader)


class _OnceLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and keys[key.value] > 1:
                problem = f"found {key.value} {keys[key.value]} times: keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)
