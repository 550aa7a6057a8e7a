"""Settings in YAML files, in which no key is said twice: PyYAML would take the last one unsaid."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml


def read(path: Path, *, or_nothing: bool = False) -> tuple[str, dict[Any, Any]]:
    """Return a file's text, and the mapping that it holds.

    Args:
        path: the file.
        or_nothing: an empty one will do.

    Raises:
        ValueError: saying what is wrong with the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, _OnceLoader)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"is not YAML ({' '.join(str(error).split())})") from error
    if content is None and or_nothing:
        content = {}
    if not isinstance(content, dict):
        raise ValueError(f"must hold `name: value` lines, got {content!r}")
    return text, content


class _OnceLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        times = Counter(key.value for key in names)
        for key in names:
            if times[key.value] > 1:
                problem = f"found {key.value} {times[key.value]} times: keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)
