"""How fast and in how much memory is a data set prepared?

    python -m tests.bench.prepare --rows 3600000

Writes reviews of Amazon Polarity's lengths in the hub's layout, prepares them in a process of its
own, and compares its rate with the tokenizer's alone on the same cores, measured before and after.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.reviews import amazon_like, write_hub_folder
from toolkit.assets import MINILM, fetch
from toolkit.config import RunConfig, cache_dir
from toolkit.console import say
from toolkit.data.tokenise import load_tokenizer

CHILD = """
import json, re, sys, time
from pathlib import Path
from toolkit.config import parse
from toolkit.prepare import prepare_data
started = time.perf_counter()
tokens, _ = prepare_data(parse(sys.argv[1:]))
seconds = time.perf_counter() - started
# not ru_maxrss: a child inherits that of the process which started it
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
result = {"seconds": seconds, "peak_mib": peak}
result["rows"] = {name: len(split) for name, split in tokens.splits.items()}
started = time.perf_counter()
prepare_data(parse(sys.argv[1:]))
result["second_seconds"] = time.perf_counter() - started
print("RESULT", json.dumps(result))
"""


def tokenizer_rate(cache: Path, count: int = 40_960) -> float:
    """Return reviews per second of the tokenizer alone, on texts in memory."""
    tokenizer = load_tokenizer(fetch(MINILM, cache))
    texts = [text for text, _ in amazon_like(cache, count)]
    started = time.perf_counter()
    for start in range(0, count, 2048):
        tokenizer.encode_batch_fast(texts[start : start + 2048])
    return count / (time.perf_counter() - started)


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    arguments = parser.parse_args()
    cache = cache_dir(RunConfig())
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "hub", Path(scratch) / "cache"
        say(f"Writing {arguments.rows} reviews ...")
        write_hub_folder(cache, folder, arguments.rows, max(100, arguments.rows // 9))
        before = tokenizer_rate(cache)
        flags = ["--dataset=amazon_polarity", f"--dataset_path={folder}", f"--cache_dir={out}"]
        environment = os.environ | {"HF_HOME": str(Path(scratch) / "hf")}
        command = [sys.executable, "-c", CHILD, *flags, f"--encoder={fetch(MINILM, cache)}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        after = tokenizer_rate(cache)
        result = json.loads(done.stdout.split("RESULT ")[1])
    rate = sum(result["rows"].values()) / result["seconds"]
    alone = (before + after) / 2
    ratios = {"rows_per_s": rate, "tokenizer_rows_per_s": [before, after], "ratio": rate / alone}
    say(json.dumps(result | ratios, indent=2))


if __name__ == "__main__":
    main()
