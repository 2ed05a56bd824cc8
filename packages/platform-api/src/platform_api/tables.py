"""The database's tables. Times are Unix milliseconds; every change of a job is one conditional statement."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()
_ID = sa.String(36)
_KEY = sa.String(64)

validators = sa.Table(
    "validators",
    metadata,
    sa.Column("hotkey", _KEY, primary_key=True),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("added_at", sa.BigInteger, nullable=False),
)

admin_tokens = sa.Table(
    "admin_tokens",
    metadata,
    sa.Column("sha256", _KEY, primary_key=True),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
)

nonces = sa.Table(
    "nonces",
    metadata,
    sa.Column("hotkey", _KEY, primary_key=True),
    sa.Column("nonce", sa.String(32), primary_key=True),
    sa.Column("expires_at", sa.BigInteger, nullable=False, index=True),
)

challenges = sa.Table(
    "challenges",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("github_repo", sa.Text, nullable=False),
    sa.Column("github_commit", sa.String(64), nullable=False),
    sa.Column("compose_hash", _KEY),
    sa.Column("mechanism_id", sa.Integer, nullable=False),
    sa.Column("emission_share", sa.Float, nullable=False),
    sa.Column("resources", sa.JSON, nullable=False),
    sa.Column("jobs", sa.JSON, nullable=False),
    sa.Column("timeout_s", sa.Integer, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
)

submissions = sa.Table(
    "submissions",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("challenge_id", _ID, sa.ForeignKey("challenges.id"), nullable=False),
    sa.Column("miner_hotkey", _KEY, nullable=False),
    sa.Column("sha256", _KEY, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("filename", sa.String(255), nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("challenge_id", "miner_hotkey", "sha256"),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("challenge_id", _ID, sa.ForeignKey("challenges.id"), nullable=False),
    sa.Column("submission_id", _ID, sa.ForeignKey("submissions.id")),
    sa.Column("miner_hotkey", _KEY),
    sa.Column("status", sa.String(16), nullable=False, index=True),
    sa.Column("outcome", sa.String(16)),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("resources", sa.JSON, nullable=False),
    sa.Column("timeout_s", sa.Integer, nullable=False),
    sa.Column("job_name", sa.String(64)),
    sa.Column("payload", sa.JSON, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    sa.Column("failed_attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("died_attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("token", sa.String(64)),
    sa.Column("holder", _KEY),
    sa.Column("claim_id", sa.String(64)),
    sa.Column("claimed_at", sa.BigInteger),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("released_token", sa.String(64)),
    sa.Column("died_with", _KEY),
    sa.Column("log_next", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("log_bytes", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("log_gaps", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("log_dropped", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("result", sa.Text),
    sa.Column("result_sha256", _KEY),
    sa.Column("score", sa.Float),
    sa.Column("finished_at", sa.BigInteger, index=True),
    sa.Index("ix_jobs_challenge", "challenge_id", "status"),
    sa.Index("ix_jobs_submission", "submission_id"),
)

job_logs = sa.Table(
    "job_logs",
    metadata,
    sa.Column("job_id", _ID, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("lines", sa.JSON, nullable=False),
    sa.Column("bytes", sa.Integer, nullable=False),
)

changes = sa.Table(
    "changes",
    metadata,
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("subject", sa.String(64), nullable=False),
    sa.Column("detail", sa.String(64), nullable=False),
)
