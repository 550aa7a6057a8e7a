"""What a token cache holds, for people: lengths, truncation, classes, quarantine."""

from typing import Any

from toolkit.data.cache import TokenCache


def describe(cache: TokenCache) -> str:
    """Render `meta.json` in a few lines."""
    meta = cache.meta
    lines = [*_histogram(meta), _truncation(meta)]
    for name, split in meta["splits"].items():
        negative, positive = split["class_counts"]
        classes = f"{negative} {meta['label_names'][0]}, {positive} {meta['label_names'][1]}"
        lines.append(f"  {name:<10} {split['rows']:>8} rows ({classes}), {split['tokens']} tokens")
    if any(meta["quarantined"].values()):
        counts = [
            f"{count} of {meta['source_rows'][name]} {name}"
            for name, count in meta["quarantined"].items()
        ]
        where = cache.folder / "quarantine.jsonl"
        lines.append(f"  quarantined: {', '.join(counts)} rows, listed in {where}")
    twice = {name: n for name, n in meta["texts_in_train"].items() if n}
    if twice:
        counts = [f"{n} of {meta['splits'][name]['rows']} {name} rows" for name, n in twice.items()]
        lines.append(f"  with a text that is in train, too: {', '.join(counts)}")
    lines += [f"  {note}" for note in meta["notes"]]
    return "\n".join([*lines, f"  cache: {cache.folder}"])


def _histogram(meta: dict[str, Any]) -> list[str]:
    counts, edges = meta["length_counts"], meta["length_edges"]
    lines = [f"  {'tokens':>10}  reviews"]
    for number, count in enumerate(counts):
        upper = f"-{edges[number + 1] - 1}" if number + 1 < len(edges) else " and more"
        bar = "#" * round(40 * count / max(1, *counts))
        if count:
            lines.append(f"  {str(edges[number]) + upper:>10}  {count:>7} {bar}")
    return lines


def _truncation(meta: dict[str, Any]) -> str:
    reviews = max(1, sum(meta["length_counts"]))
    tokens = meta["truncated_tokens"] + sum(split["tokens"] for split in meta["splits"].values())
    clipped = (
        f"; {meta['clipped_texts']} very long texts were cut first" if meta["clipped_texts"] else ""
    )
    return (
        f"  longer than {meta['dataset']['max_length']} tokens: {meta['truncated_rows']} reviews "
        f"({meta['truncated_rows'] / reviews:.2%}), truncating {meta['truncated_tokens'] / tokens:.2%} "
        f"of all tokens{clipped}"
    )
