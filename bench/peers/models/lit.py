# pyright: basic, reportMissingImports=false
"""The no-op model behind LitServe: `python lit.py PORT`."""

import sys
from typing import Any

import litserve
from job import work


class Noop(litserve.LitAPI):
    def setup(self, device: str) -> None:
        """Load nothing."""

    def predict(self, request: dict[str, Any]) -> dict[str, Any]:
        work(request["tag"], request["seconds"])
        return {"image": request["image"]}


if __name__ == "__main__":
    # A dead worker is replaced only if asked for; the default ends the whole server. The timeout counts waiting, too.
    server = litserve.LitServer(Noop(), accelerator="cpu", workers_per_device=1, timeout=600, restart_workers=True)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)
