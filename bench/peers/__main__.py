"""Put seven trials to upscaled and to three peers, and measure whole jobs a second of each.

    .venv/bin/python -m bench.peers [--only bentoml litserve cog upscaled] [--trials 1 5] [--rounds 3]

The peers are installed from PyPI on first use, each into a virtual environment of its own in the folder --home. Every
server listens on loopback, is started anew for every trial and stopped after it. All of it takes about half an hour.
"""

import argparse
import asyncio
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from itertools import chain, product
from pathlib import Path

from PIL import Image

from bench.peers.bento import Bento
from bench.peers.cogd import Cog, SynchronousCog
from bench.peers.lit import Lit
from bench.peers.peer import Peer
from bench.peers.server import Server
from bench.peers.speed import Speed, describe, measure
from bench.peers.trials import TRIALS, Outcome
from bench.peers.upscaled import FourWorkers, Upscaled, Waiting
from bench.peers.venvs import Venv
from cli.processes import exit_on_signals

ROOT = Path(__file__).parents[2]
IMAGE_SIDE_PIXELS = 64
TRIAL_SECONDS = 420.0
"""What no trial comes near unless something hangs."""

OURS = "upscaled"
PEERS: Mapping[str, Sequence[type[Peer]]] = {"bentoml": [Bento], "litserve": [Lit], "cog": [Cog, SynchronousCog]}
"""By package. The first of each is put to the trials, all of them are measured."""


def main() -> None:
    """Try, measure, and print two tables."""
    exit_on_signals()
    arguments = _arguments()
    makers = {name: _makers(name, arguments.home) for name in arguments.only}
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    outcomes = dict[str, dict[int, Outcome]]()
    with tempfile.TemporaryDirectory(prefix="upscaled-peers-") as folder:
        for name in arguments.only:
            for number in arguments.trials:
                title, outcome = _try(makers[name][0], Path(folder) / f"{name}-{number}", number)
                outcomes.setdefault(title, {})[number] = outcome
        load = os.getloadavg()[0]
        speeds = _measure(list(chain.from_iterable(makers.values())), Path(folder), arguments)
    if arguments.trials:
        print(f"\n## What each loses\n\n{machine}, one worker process each\n")
        print(_loss_table(outcomes, arguments.trials))
    if arguments.rounds:
        noise = f"{arguments.rounds} rounds of {arguments.seconds:g} s, load of the machine before {load:.1f}"
        print(f"\n## Jobs a second\n\n{machine}; {noise}. Each cell: the median round (slowest to fastest)")
        print("· p50 / p99 of one job in ms · processor time that the server took for one job in ms.\n")
        print(_speed_table(speeds, arguments.clients))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*PEERS, OURS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SERVER", help=", ".join(names))
    parser.add_argument(
        "--trials", type=int, nargs="*", choices=list(TRIALS), default=list(TRIALS), metavar="NUMBER",
        help="; ".join(f"{number} {trial.title}" for number, trial in TRIALS.items()),
    )  # fmt: skip
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each number of clients in each round")
    parser.add_argument("--rounds", type=int, default=3, help="of jobs a second, all servers in each; 0 for none")
    parser.add_argument("--home", type=Path, default=ROOT / ".peers", help="where the peers are installed")
    return parser.parse_args()


def _makers(name: str, home: Path) -> Sequence[Callable[[Path], Server]]:
    """Return what makes each kind of a server on an empty folder; install it if it is a peer."""
    image = _image()
    if name == OURS:
        return [
            lambda folder: Upscaled(folder, image),
            lambda folder: Waiting(folder, image),
            lambda folder: FourWorkers(folder, image),
        ]
    venv = Venv(home, name)
    venv.make()
    return [lambda folder, kind=kind: kind(folder, image, venv) for kind in PEERS[name]]


def _image() -> bytes:
    file = BytesIO()
    Image.linear_gradient("L").resize((IMAGE_SIDE_PIXELS, IMAGE_SIDE_PIXELS)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def _try(make: Callable[[Path], Server], folder: Path, number: int) -> tuple[str, Outcome]:
    """Put one trial to a server of its own; return the server's title and what came out."""
    server = make(folder)
    title = _title(server)

    async def run() -> Outcome:
        async with server.connected(), asyncio.timeout(TRIAL_SECONDS):
            return await TRIALS[number].run(server)

    began = time.monotonic()
    try:
        server.start()
        outcome = asyncio.run(run())
    except (RuntimeError, LookupError, OSError, TimeoutError) as error:
        outcome = Outcome(f"the trial broke off: {error or type(error).__name__}")
    finally:
        server.stop()
    print(f"{title}, trial {number} ({time.monotonic() - began:.0f} s): {outcome}", file=sys.stderr, flush=True)
    return title, outcome


def _measure(
    makers: Sequence[Callable[[Path], Server]], folder: Path, arguments: argparse.Namespace
) -> Mapping[str, Mapping[int, Sequence[Speed]]]:
    """Measure every server once in each round, so that a slow minute is everybody's; return all, by title."""
    speeds = dict[str, dict[int, list[Speed]]]()
    for round, clients, number in product(range(arguments.rounds), arguments.clients, range(len(makers))):
        server = makers[number](folder / f"speed-{round}-{clients}-{number}")
        title = _title(server)
        measured = speeds.setdefault(title, {}).setdefault(clients, [])
        try:
            measured.append(measure(server, clients, arguments.seconds))
        except (RuntimeError, LookupError, OSError, TimeoutError) as error:
            print(f"{title}, {clients} clients broke off: {error or type(error).__name__}", file=sys.stderr, flush=True)
        else:
            print(f"{title}, {clients} clients: {measured[-1].rate:.0f} jobs/s", file=sys.stderr, flush=True)
    return speeds


def _title(server: Server) -> str:
    name, comma, rest = server.name.partition(",")
    return f"{name} {server.version()}{comma}{rest}"


def _loss_table(outcomes: Mapping[str, Mapping[int, Outcome]], trials: Sequence[int]) -> str:
    lines = ["| trial | " + " | ".join(outcomes) + " |", "|---" * (len(outcomes) + 1) + "|"]
    for number in trials:
        cells = [str(outcome[number]) for outcome in outcomes.values()]
        lines.append(f"| {number}. {TRIALS[number].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _speed_table(speeds: Mapping[str, Mapping[int, Sequence[Speed]]], clients: Sequence[int]) -> str:
    lines = ["| server | " + " | ".join(f"{number} clients" for number in clients) + " |"]
    lines.append("|---" * (len(clients) + 1) + "|")
    for title, by_clients in speeds.items():
        lines.append(f"| {title} | " + " | ".join(describe(by_clients[number]) for number in clients) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
