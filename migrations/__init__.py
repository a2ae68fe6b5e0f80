"""Alembic's migrations of the schema in db.models."""
