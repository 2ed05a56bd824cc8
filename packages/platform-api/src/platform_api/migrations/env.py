"""Runs migrations over the connection that the program gives."""

from __future__ import annotations

from alembic import context

from platform_api.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
