"""libvips, set up before it begins: whoever needs it imports `pyvips` from here."""

import logging
import os
from typing import Any, cast

# By default a thread of libvips that has been idle for 15 seconds ends. Work that it is given in the moment in which it
# decides so is done by nobody, by what one reads in 8.18, and a worker once waited there for ever. A pool of a
# fixed size keeps its threads. A picture takes three: one reads and two write. pyvips reads the environment at import.
os.environ.setdefault("VIPS_MAX_THREADS", "16")

import pyvips

__all__ = ["pyvips"]

# What libvips remembers of one job no other asks for, and beside its one reader and one writer there is no work.
pyvips.cache_set_max(0)
cast("Any", pyvips).concurrency_set(1)
# What it warns of, it then fails by, and that is raised; and it tells of each thread.
logging.getLogger("pyvips").setLevel(logging.ERROR)
