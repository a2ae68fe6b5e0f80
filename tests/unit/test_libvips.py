"""libvips, as it is set up."""

import subprocess
import sys

_COUNT = """
from pathlib import Path
import worker.upscaler.encoding
print(sum(file.read_text() == "libvips worker\\n" for file in Path("/proc/self/task").glob("*/comm")))
"""


def test_libvips_has_threads_of_its_own_before_the_first_picture_so_none_comes_or_goes_later() -> None:
    done = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=True)
    assert done.stdout == "16\n"
