"""Run the service under random faults and say whether anything was lost.

    .venv/bin/python -m tests.chaos [--seconds 300] [--seed N] [--apart] [--keep FOLDER]

The seed draws the faults, their times and their victims; what meets them depends on the machine as well. Exits with 1
when the gate complains.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

from cli.processes import exit_on_signals
from tests.chaos.report import write
from tests.chaos.run import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="for how long faults are injected")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--apart", action="store_true", help="one fault at a time, to see how long each recovery takes")
    parser.add_argument("--keep", type=Path, default=None, help="an empty folder for data and logs, which then stay")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    exit_on_signals()
    _say(f"seed {seed}: `python -m tests.chaos --seconds {arguments.seconds:g} --seed {seed}` repeats it")
    with tempfile.TemporaryDirectory(prefix="upscaled-chaos-") as folder:
        outcome = run(seed, arguments.seconds, arguments.keep or Path(folder), apart=arguments.apart, say=_say)
    print(write(outcome))  # noqa: T201 - what it is for
    sys.exit(bool(outcome.verdict.complaints))


def _say(line: str) -> None:
    print(f"chaos: {line}", file=sys.stderr, flush=True)  # noqa: T201 - what it is for


if __name__ == "__main__":
    main()
