"""libvips, set up before it begins: whoever needs it imports `pyvips` from here."""

import logging
import os
from typing import Any, cast

# By default a thread of libvips that has been idle for 15 seconds ends; when it is given work in the moment in which it
# decides so, nobody does that work, and whoever waits for it waits for ever (8.18). A pool of a fixed size keeps its
# threads. A picture takes three: one that reads and two that write. The environment is read when pyvips is imported.
os.environ.setdefault("VIPS_MAX_THREADS", "16")

import pyvips

__all__ = ["pyvips"]

# What libvips remembers of one job no other asks for, and beside its one reader and one writer there is no work.
pyvips.cache_set_max(0)
cast("Any", pyvips).concurrency_set(1)
# What it warns of, it then fails by, and that is raised; and it tells of each thread.
logging.getLogger("pyvips").setLevel(logging.ERROR)
