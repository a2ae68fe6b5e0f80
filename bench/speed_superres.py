"""How fast is the superres engine, and how much memory does it take, beside resampling and beside its network alone?

    .venv/bin/python -m bench.speed_superres [--side 1024] [--scale 2] [--rounds 5] [--methods superres untiled …]
                                             [--file png]

A photograph, repeated to side × side pixels, is enlarged by each method in a process of its own, warm, in rounds: each
round asks every method once, so that what else the machine does disturbs all of them alike. The table gives for each
the median of its seconds, megapixels of the output per second, its median ratio to superres within a round, and the
peak of its process's resident memory, of which the first column of memory is what the process had before.

- superres: our engine, to strips that nobody keeps; with --file to a file of that format, as the worker does it.
- untiled: the same network, read and run by spandrel alone, in float32, on the whole picture at once.
- lanczos-pillow, lanczos-pyvips: three-lobed Lanczos, whole.
- lanczos: our engine of that name, in linear light.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import numpy as np
from PIL import Image

from core.options import OutputFormat, UpscaleOptions
from worker.upscaler.engine import Engine
from worker.upscaler.picture import Levels, Picture
from worker.upscaler.plan import output_size

Run: TypeAlias = Callable[[], object]

FIRST = "superres"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.speed_superres")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--file", choices=[format.value for format in OutputFormat])
    parser.add_argument("--serve", choices=list(METHODS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        _serve(arguments.serve, arguments.side, arguments.scale, arguments.file)
        return
    if "untiled" in arguments.methods:
        _require_network(arguments.scale, parser)
    servers = {name: _Server(name, arguments) for name in arguments.methods}
    for server in servers.values():
        server.ask()
    rounds = [{name: server.ask() for name, server in servers.items()} for _ in range(arguments.rounds)]
    print(_table(rounds, {name: server.end() for name, server in servers.items()}, arguments))


def _require_network(scale: int, parser: argparse.ArgumentParser) -> None:
    from worker.upscaler.checkpoints import OWN_SCALES  # it brings torch, which resampling does without

    if scale not in OWN_SCALES:
        parser.error(f"no network enlarges by {scale} at once: leave untiled out of --methods")


class _Server:
    """A method in a process of its own."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "bench.speed_superres", "--serve", name]
        command += ["--side", str(arguments.side), "--scale", str(arguments.scale)]
        command += ["--file", arguments.file] if arguments.file else []
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self) -> float:
        """Run once; return the seconds."""
        return float(self._exchange("run")["seconds"])

    def end(self) -> Mapping[str, Any]:
        report = self._exchange("end")
        self._process.communicate()
        return report

    def _exchange(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return cast("dict[str, Any]", json.loads(self._process.stdout.readline()))


def _serve(name: str, side: int, scale: int, file: str | None) -> None:
    picture = _photograph(side)
    run = METHODS[name](picture, scale, file)
    before = _peak_mebibytes()
    for line in sys.stdin:
        if line.strip() == "end":
            print(json.dumps({"before": before, "peak": _peak_mebibytes()}), flush=True)
            return
        began = time.perf_counter()
        run()
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


def _photograph(side: int) -> Levels:
    with Image.open("cli/sample.jpg") as image:
        levels = np.asarray(image.convert("RGB"))
    repeats = [-(-side // length) for length in levels.shape[:2]]
    return np.ascontiguousarray(np.tile(levels, (*repeats, 1))[:side, :side])


def _peak_mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _superres(levels: Levels, scale: int, file: str | None) -> Run:
    from worker.upscaler import engines

    return _ours(engines.load("superres"), levels, scale, file)


def _lanczos(levels: Levels, scale: int, file: str | None) -> Run:
    from worker.upscaler import engines

    return _ours(engines.load("lanczos"), levels, scale, file)


def _ours(engine: Engine, levels: Levels, scale: int, file: str | None) -> Run:
    from worker.upscaler import encoding

    options, picture = UpscaleOptions(scale_factor=scale), Picture(levels)
    size = output_size(picture.width, picture.height, scale)

    def run() -> None:
        strips = engine.upscale(picture, options, _ignore, lambda: False)
        if file is None:
            for _ in strips:
                pass
            return
        with tempfile.TemporaryFile(buffering=0) as result:
            encoding.encode(strips, size, OutputFormat(file), options.output_quality, result).result()

    return run


def _ignore(_: float) -> None:
    pass


def _untiled(levels: Levels, scale: int, _: str | None) -> Run:
    import torch

    from worker.upscaler import checkpoints, engines

    path = checkpoints.own_weights(engines.DEFAULTS.superres_variant, scale)
    model: Any = checkpoints.import_spandrel().ModelLoader(torch.device("cpu")).load_from_file(path)

    def run() -> None:
        with torch.inference_mode():
            planes: Any = torch.tensor(levels).permute(2, 0, 1)[None] / 255
            (model(planes)[0] * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()

    return run


def _pillow(levels: Levels, scale: int, _: str | None) -> Run:
    image = Image.fromarray(levels)
    return lambda: image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)


def _pyvips(levels: Levels, scale: int, _: str | None) -> Run:
    import pyvips

    vips: Any = pyvips
    vips.cache_set_max(0)
    image = vips.Image.new_from_array(levels)
    return lambda: image.resize(scale, kernel="lanczos3").write_to_memory()


METHODS: Mapping[str, Callable[[Levels, int, str | None], Run]] = {
    FIRST: _superres,
    "untiled": _untiled,
    "lanczos": _lanczos,
    "lanczos-pillow": _pillow,
    "lanczos-pyvips": _pyvips,
}


def _table(rounds: list[dict[str, float]], memory: dict[str, Mapping[str, Any]], arguments: argparse.Namespace) -> str:
    megapixels = (arguments.side * arguments.scale) ** 2 / 1e6
    lines = [
        f"{arguments.side}² x{arguments.scale}, {len(rounds)} rounds",
        f"{'':16}{'seconds':>9}{'MP/s':>9}{'ratio':>8}{'before':>9}{'peak MiB':>10}",
    ]
    for name in arguments.methods:
        seconds = statistics.median(each[name] for each in rounds)
        ratio = statistics.median(each[name] / each.get(FIRST, each[name]) for each in rounds)
        lines.append(
            f"{name:16}{seconds:9.3f}{megapixels / seconds:9.2f}{ratio:8.2f}"
            f"{memory[name]['before']:9.0f}{memory[name]['peak']:10.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
