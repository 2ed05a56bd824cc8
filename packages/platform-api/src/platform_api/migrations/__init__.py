"""Alembic's environment, shipped with the package and run at every start."""
