"""Find or make the token cache of a configuration.

    python -m toolkit prepare --dataset amazon_polarity      on a login node, before the GPUs start

Needs neither a GPU nor torch. Training does the same when the cache is not there yet.
"""

from pathlib import Path

from toolkit.config import RunConfig, cache_dir, parse, part
from toolkit.console import complain, say
from toolkit.data.cache import TokenCache
from toolkit.data.prepare import DataSpec, prepare
from toolkit.data.report import describe
from toolkit.data.sources import open_source
from toolkit.data.steps import Stream
from toolkit.errors import ConfigError, DataError, ToolkitError
from toolkit.model.encoders import check_encoder, encoder_folder


def prepare_data(config: RunConfig) -> tuple[TokenCache, Path]:
    """Return the token cache and the encoder's folder.

    Raises:
        ConfigError: when the cache folder cannot be written.
        DataError: when data or encoder cannot be found or used.
    """
    cache = cache_dir(config)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "name another with --cache_dir or TOOLKIT_CACHE_DIR"
        raise ConfigError(
            [f"cache_dir {cache} cannot be made ({error.strerror}); {hint}"]
        ) from error
    spec = part(DataSpec, config)
    source = open_source(
        spec, cache
    )  # before the encoder: a slip in a column name costs no download
    encoder = encoder_folder(config.encoder, config.encoder_revision, cache)
    check_encoder(encoder, config.max_length)
    return prepare(spec, source, encoder, cache), encoder


def refuse_no_steps(config: RunConfig, tokens: TokenCache) -> None:
    """Raise DataError if there is nothing to train."""
    if part(Stream, config, num_rows=len(tokens.splits["train"])).num_steps == 0:
        raise DataError([f"epochs ({config.epochs}) of these training rows are not one step"])


def main(argv: list[str]) -> int:
    """Prepare the data that the arguments name; return the exit code."""
    try:
        tokens, _ = prepare_data(parse(argv, prog="toolkit prepare"))
    except (ToolkitError, OSError) as error:  # not Python itself, which would show secrets too
        complain(f"error: {error}")
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        complain("stopped as asked: nothing is left half done; the same command starts again")
        return 130
    say(describe(tokens))
    return 0
