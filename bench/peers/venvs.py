"""Virtual environments of the peers, made on first use from the pinned files in `requirements/`."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

_REQUIREMENTS = Path(__file__).parent / "requirements"
_INSTALL_SECONDS = 900


class Venv:
    """The virtual environment of one peer, in `home` under the package's name."""

    def __init__(self, home: Path, package: str) -> None:
        self.folder = home.resolve() / package
        self._package = package
        self._requirements = _REQUIREMENTS / f"{package}.txt"

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    def make(self) -> None:
        """Install what the requirements name, unless that is what is installed.

        Raises:
            subprocess.CalledProcessError: venv or pip failed; what they said stands on standard error.
        """
        stamp = self.folder / "requirements.sha256"
        wanted = hashlib.sha256(self._requirements.read_bytes()).hexdigest()
        if stamp.exists() and stamp.read_text() == wanted:
            return
        _run([sys.executable, "-m", "venv", "--clear", str(self.folder)])
        _run([str(self.bin / "python"), "-m", "pip", "install", "--quiet", "--requirement", str(self._requirements)])
        stamp.write_text(wanted)

    def version(self) -> str:
        """Tell which release is installed."""
        program = f"import importlib.metadata, json; print(json.dumps(importlib.metadata.version({self._package!r})))"
        command = [str(self.bin / "python"), "-c", program]
        return json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr, timeout=_INSTALL_SECONDS)
