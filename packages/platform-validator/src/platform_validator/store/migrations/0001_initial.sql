-- Version 1: the journal of jobs, the outbox, CVMs, challenge instances, values.

CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

CREATE TABLE jobs_journal (
    position INTEGER PRIMARY KEY,
    claim_id TEXT NOT NULL UNIQUE,
    job_id TEXT NOT NULL,
    challenge_id TEXT NOT NULL,
    instance_key TEXT NOT NULL,
    resources TEXT NOT NULL,
    stage TEXT NOT NULL,
    claimed_at TEXT NOT NULL,
    granted BLOB,
    attempt INTEGER,
    token TEXT,
    vm TEXT,
    outcome TEXT,
    reason TEXT,
    started_at TEXT,
    ended_at TEXT
) STRICT;
CREATE INDEX jobs_journal_open ON jobs_journal (position) WHERE stage <> 'done';

CREATE TABLE jobs_outbox (
    position INTEGER PRIMARY KEY,
    claim_id TEXT NOT NULL UNIQUE REFERENCES jobs_journal (claim_id),
    job_id TEXT NOT NULL,
    body BLOB NOT NULL,
    stored_at TEXT NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    last_error TEXT
) STRICT;

CREATE TABLE cvms_journal (
    position INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    purpose TEXT NOT NULL,
    challenge_id TEXT NOT NULL,
    instance_key TEXT NOT NULL,
    resources TEXT NOT NULL,
    phase TEXT NOT NULL,
    sealed_secret BLOB NOT NULL,
    compose BLOB NOT NULL,
    host_port INTEGER NOT NULL,
    session_id TEXT NOT NULL,
    intended_at TEXT NOT NULL,
    hard_deadline TEXT NOT NULL,
    vm_id TEXT,
    claim_id TEXT,
    vm_instance TEXT UNIQUE,
    attestation TEXT,
    reason TEXT,
    gone_at TEXT
) STRICT;
CREATE INDEX cvms_journal_open ON cvms_journal (position) WHERE phase <> 'gone';

CREATE TABLE challenges_instances (
    position INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    challenge_id TEXT NOT NULL,
    name TEXT NOT NULL,
    repository TEXT NOT NULL,
    commit_id TEXT NOT NULL,
    spec_digest TEXT NOT NULL,
    state TEXT NOT NULL,
    since TEXT NOT NULL,
    reason TEXT,
    bundle_sha256 TEXT,
    compose_hash TEXT,
    superseded_by TEXT,
    failures INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE values_current (
    challenge_id TEXT NOT NULL,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    version INTEGER NOT NULL,
    updated_at TEXT NOT NULL,
    PRIMARY KEY (challenge_id, key)
) STRICT, WITHOUT ROWID;

CREATE TABLE values_replies (
    session_id TEXT NOT NULL,
    request_id TEXT NOT NULL,
    reply TEXT NOT NULL,
    PRIMARY KEY (session_id, request_id)
) STRICT, WITHOUT ROWID;
