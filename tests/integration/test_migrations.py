"""The schema: what the migrations make is what the models say."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alembic import command

from cli.migrations import config, upgrade
from core.settings import Settings

Sql = Callable[..., list[Any]]

ROOT = Path(__file__).parents[2]


def test_the_models_and_the_migrations_agree(settings: Settings) -> None:
    command.check(config(settings.database_url))


def test_migrations_lead_down_to_nothing_and_up_again(settings: Settings, sql: Sql) -> None:
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'alembic_version' ORDER BY 1"
    before = sql(tables)
    command.downgrade(config(settings.database_url), "base")
    assert sql(tables) == []
    upgrade(settings.database_url)
    assert sql(tables) == before


def test_migrating_twice_changes_nothing(settings: Settings, sql: Sql) -> None:
    upgrade(settings.database_url)
    assert len(sql("SELECT * FROM alembic_version")) == 1


def test_processes_that_migrate_at_once_do_not_collide(sql: Sql, settings: Settings) -> None:
    sql("DROP SCHEMA public CASCADE")
    sql("CREATE SCHEMA public")
    code = f"from cli.migrations import upgrade; upgrade({settings.database_url!r})"
    migrations = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(3)]
    assert [migration.wait(60) for migration in migrations] == [0, 0, 0]
    assert len(sql("SELECT * FROM alembic_version")) == 1


def test_alembic_finds_its_scripts_in_pyproject_without_an_ini(settings: Settings) -> None:
    heads = subprocess.run(
        [Path(sys.executable).with_name("alembic"), "heads"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "(head)" in heads.stdout
