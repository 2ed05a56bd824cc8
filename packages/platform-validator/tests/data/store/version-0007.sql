BEGIN TRANSACTION;
CREATE TABLE challenges_env (
    challenge_id TEXT NOT NULL,
    name TEXT NOT NULL,
    repository TEXT NOT NULL,
    sealed BLOB NOT NULL,
    given_at TEXT NOT NULL,
    PRIMARY KEY (challenge_id, name)
) STRICT, WITHOUT ROWID;
INSERT INTO "challenges_env" VALUES('challenge','KEY','https://example.org/challenge',X'007365616C65642D656E76','2026-01-02T03:04:03.678901Z');
CREATE TABLE challenges_history (
    position INTEGER PRIMARY KEY,
    challenge_id TEXT NOT NULL,
    key TEXT NOT NULL,
    commit_id TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT,
    at TEXT NOT NULL
) STRICT;
INSERT INTO "challenges_history" VALUES(1,'challenge','key-old','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','Failed','no kernel','2026-01-02T03:04:01.678901Z');
INSERT INTO "challenges_history" VALUES(2,'challenge','key-older','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','Gone',NULL,'2026-01-02T03:04:02.678901Z');
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
INSERT INTO "challenges_instances" VALUES(1,'key-old','challenge','Challenge','https://example.org/challenge','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','digest-old','Recycling','2026-01-02T03:04:01.678901Z','superseded','cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc','dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd','key-new',2);
INSERT INTO "challenges_instances" VALUES(2,'key-new','challenge','Challenge','https://example.org/challenge','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','digest-new','Active','2026-01-02T03:04:02.678901Z',NULL,NULL,NULL,NULL,0);
CREATE TABLE cvms_hosts_drained (
    name TEXT PRIMARY KEY,
    drained_at TEXT NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO "cvms_hosts_drained" VALUES('small','2026-01-02T03:04:03.678901Z');
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
, host TEXT, os_image TEXT) STRICT;
INSERT INTO "cvms_journal" VALUES(1,'pv-gone','ready','challenge','key-old','{"cpu_cores":1,"memory_mb":512,"disk_mb":1024,"gpu_count":0}','gone',X'007365616C65642D676F6E65',X'7B7D',10001,'session-gone','2026-01-02T03:04:00.678901Z','2026-01-02T03:04:09.678901Z','id-gone','claim-ended','aa','simulated','drained','2026-01-02T03:04:03.678901Z',NULL,NULL);
INSERT INTO "cvms_journal" VALUES(2,'pv-destroying','job','challenge','key-new','{"cpu_cores":1,"memory_mb":512,"disk_mb":1024,"gpu_count":0}','destroying',X'007365616C65642D64657374726F79696E67',X'7B2261223A317D',10002,'session-destroying','2026-01-02T03:04:03.678901Z','2026-01-02T03:04:09.678901Z','id-destroying','claim-submitting','bb','tdx','its job has ended',NULL,'small','{"trust":"pinned"}');
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
, kit BLOB) STRICT;
INSERT INTO "jobs_journal" VALUES(1,'claim-ended','job-ended','challenge','key-old','{"cpu_cores":1,"memory_mb":512,"disk_mb":1024,"gpu_count":0}','done','2026-01-02T03:04:00.678901Z',X'7B22617474656D7074223A317D',1,'token-ended','pv-gone','lease_lost','lease_lost','2026-01-02T03:04:01.678901Z','2026-01-02T03:04:02.678901Z',NULL);
INSERT INTO "jobs_journal" VALUES(2,'claim-submitting','job-submitting','challenge','key-new','{"cpu_cores":1,"memory_mb":512,"disk_mb":1024,"gpu_count":0}','submitting','2026-01-02T03:04:03.678901Z',X'7B22617474656D7074223A337DFF00',3,'token-submitting','pv-destroying','succeeded',NULL,'2026-01-02T03:04:04.678901Z',NULL,X'006B6974');
INSERT INTO "jobs_journal" VALUES(3,'claim-pending','job-pending','challenge','key-new','{"cpu_cores":1,"memory_mb":512,"disk_mb":1024,"gpu_count":0}','pending','2026-01-02T03:04:05.678901Z',NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
CREATE TABLE jobs_outbox (
    position INTEGER PRIMARY KEY,
    claim_id TEXT NOT NULL UNIQUE REFERENCES jobs_journal (claim_id),
    job_id TEXT NOT NULL,
    body BLOB NOT NULL,
    stored_at TEXT NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    last_error TEXT
) STRICT;
INSERT INTO "jobs_outbox" VALUES(1,'claim-submitting','job-submitting',X'7B2273636F7265223A317DFF00','2026-01-02T03:04:06.678901Z',7,'no answer');
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;
INSERT INTO "meta" VALUES('state_id','0123456789');
INSERT INTO "meta" VALUES('instance','00000000-0000-4000-8000-000000000001');
CREATE TABLE migrations (version INTEGER PRIMARY KEY, name TEXT NOT NULL, checksum TEXT NOT NULL) STRICT;
INSERT INTO "migrations" VALUES(1,'0001_initial.sql','38bf3d7406fee6f78c070225a1df9778c86bfa6634eb005243d53f285f39497a');
INSERT INTO "migrations" VALUES(2,'0002_kit_and_compaction.sql','5b1750f23b62fac69186abd1e7e8c8275da72d6cef9102903b0384ab001e44c0');
INSERT INTO "migrations" VALUES(3,'0003_challenge_history.sql','8a2643b2c35e2df41d807da347123c0cdf8adf30678cdb56531af43295201acf');
INSERT INTO "migrations" VALUES(4,'0004_hosts.sql','13c311f2ddaab3c298eaedb9c84de65885eee1e58742d0c2f1b1f9bf9972a0f5');
INSERT INTO "migrations" VALUES(5,'0005_values_sealed.sql','ff9dce42a94298ac71eaba89c44da86dedf2d30c4f41c3d116fdb837bd480e2f');
INSERT INTO "migrations" VALUES(6,'0006_challenge_env.sql','31ad40a52911fdf77c97b49254d98cd8823c8f0ee7b132c11d797aa9faf24e01');
INSERT INTO "migrations" VALUES(7,'0007_os_image_trust.sql','b68fca62455c35734ab634972c9b1b7e422141ce0f7ea9ab2ddd35c9808d1d68');
CREATE TABLE values_current (
    challenge_id TEXT NOT NULL,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    version INTEGER NOT NULL,
    updated_at TEXT NOT NULL, key_id TEXT, size INTEGER NOT NULL DEFAULT 0, deleted_at TEXT,
    PRIMARY KEY (challenge_id, key)
) STRICT, WITHOUT ROWID;
INSERT INTO "values_current" VALUES('challenge','ké','[1]',4,'2026-01-02T03:04:07.678901Z',NULL,6,NULL);
CREATE TABLE values_replies (
    session_id TEXT NOT NULL,
    request_id TEXT NOT NULL,
    reply TEXT NOT NULL, key_id TEXT,
    PRIMARY KEY (session_id, request_id)
) STRICT, WITHOUT ROWID;
INSERT INTO "values_replies" VALUES('session-destroying','r','ok',NULL);
CREATE TABLE values_usage (
    challenge_id TEXT PRIMARY KEY,
    keys INTEGER NOT NULL,
    bytes INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO "values_usage" VALUES('challenge',1,6);
CREATE INDEX jobs_journal_open ON jobs_journal (position) WHERE stage <> 'done';
CREATE INDEX cvms_journal_open ON cvms_journal (position) WHERE phase <> 'gone';
CREATE INDEX jobs_journal_ended ON jobs_journal (ended_at) WHERE stage = 'done';
CREATE INDEX cvms_journal_gone ON cvms_journal (gone_at) WHERE phase = 'gone';
CREATE INDEX challenges_history_of ON challenges_history (challenge_id, position);
CREATE INDEX challenges_history_at ON challenges_history (at);
CREATE INDEX values_deleted ON values_current (deleted_at) WHERE deleted_at IS NOT NULL;
COMMIT;
