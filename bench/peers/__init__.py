"""The same seven trials put to upscaled and to three peers from PyPI: `python -m bench.peers`."""
