"""Started by `plan` under a launch config, with a run's flags: how long does one of its steps take there?

Answers with the seconds.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # as in train.py

from toolkit.config import parse, part
from toolkit.imports import uncollected
from toolkit.prepare import prepare_data
from toolkit.ranks import answer, run


def main() -> None:
    """Take a few steps of the run and keep nothing."""
    with uncollected():
        from toolkit.build import make_trainer
        from toolkit.engine.estimate import step_seconds
        from toolkit.engine.runtime import Runtime
        from toolkit.model.classifier import ClassifierSpec, build_classifier

    config = parse(sys.argv[1:])
    tokens, encoder = prepare_data(config)
    runtime = Runtime(config.precision, config.cpu_threads, config.rank_timeout)
    model, _ = build_classifier(part(ClassifierSpec, config), encoder, tokens.label_names)
    trainer = make_trainer(config, tokens, runtime, model)
    seconds = step_seconds(trainer, config.compile)
    if runtime.is_main:
        answer({"seconds": seconds})
    del trainer, model
    runtime.end()


if __name__ == "__main__":
    run(main)
