"""The real PostgreSQL and Redis as child processes on loopback, for a Unix machine that has neither installed.

Both belong to one process and one folder: a lock in the folder keeps a second process out, and a server that outlived
a killed process is ended by the next start over the same folder.
"""

from cli.embedded.postgres import Postgres
from cli.embedded.redis import Redis

__all__ = ["Postgres", "Redis"]
