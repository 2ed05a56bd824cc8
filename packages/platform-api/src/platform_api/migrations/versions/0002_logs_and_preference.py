"""Version 2: counted logs, the validator whose sandbox died last, indexes for queue and submissions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add columns and indexes."""
    op.add_column("jobs", sa.Column("died_with", sa.String(64)))
    for name in ("log_next", "log_bytes", "log_gaps", "log_dropped"):
        op.add_column("jobs", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
    op.create_index("ix_jobs_challenge", "jobs", ["challenge_id", "status"])
    op.create_index("ix_jobs_submission", "jobs", ["submission_id"])
