BEGIN TRANSACTION;
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
INSERT INTO "challenges_instances" VALUES(1,'key-1','challenge','name','repo','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','digest','Created','2026-01-02T03:04:05.678901Z',NULL,NULL,NULL,NULL,0);
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
INSERT INTO "cvms_journal" VALUES(1,'pv-1','ready','challenge','key','{"cpu_cores":1,"memory_mb":512,"disk_mb":1024,"gpu_count":0}','created',X'007365616C6564',X'7B7D',10001,'session-1','2026-01-02T03:04:05.678901Z','2026-01-09T03:04:05.678901Z','id','claim-1','aa','simulated',NULL,NULL);
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
INSERT INTO "jobs_journal" VALUES(1,'claim-1','job-1','challenge','key','{"cpu_cores":1,"memory_mb":512,"disk_mb":1024,"gpu_count":0}','submitting','2026-01-02T03:04:05.678901Z',X'7B2261223A317D',3,'t','pv-1','succeeded',NULL,'2026-01-02T03:04:05.678901Z',NULL);
CREATE TABLE jobs_outbox (
    position INTEGER PRIMARY KEY,
    claim_id TEXT NOT NULL UNIQUE REFERENCES jobs_journal (claim_id),
    job_id TEXT NOT NULL,
    body BLOB NOT NULL,
    stored_at TEXT NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    last_error TEXT
) STRICT;
INSERT INTO "jobs_outbox" VALUES(1,'claim-1','job-1',X'6669727374','2026-01-02T03:04:05.678901Z',0,NULL);
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;
INSERT INTO "meta" VALUES('state_id','0123456789');
INSERT INTO "meta" VALUES('instance','00000000-0000-4000-8000-000000000001');
CREATE TABLE migrations (version INTEGER PRIMARY KEY, name TEXT NOT NULL, checksum TEXT NOT NULL) STRICT;
INSERT INTO "migrations" VALUES(1,'0001_initial.sql','38bf3d7406fee6f78c070225a1df9778c86bfa6634eb005243d53f285f39497a');
CREATE TABLE values_current (
    challenge_id TEXT NOT NULL,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    version INTEGER NOT NULL,
    updated_at TEXT NOT NULL,
    PRIMARY KEY (challenge_id, key)
) STRICT, WITHOUT ROWID;
INSERT INTO "values_current" VALUES('challenge','k','1',1,'2026-01-02T03:04:05.678901Z');
CREATE TABLE values_replies (
    session_id TEXT NOT NULL,
    request_id TEXT NOT NULL,
    reply TEXT NOT NULL,
    PRIMARY KEY (session_id, request_id)
) STRICT, WITHOUT ROWID;
INSERT INTO "values_replies" VALUES('s','r','ok');
CREATE INDEX jobs_journal_open ON jobs_journal (position) WHERE stage <> 'done';
CREATE INDEX cvms_journal_open ON cvms_journal (position) WHERE phase <> 'gone';
COMMIT;
