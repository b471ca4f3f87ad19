"""The database's history, as Alembic revisions: one module each, named after its number."""
