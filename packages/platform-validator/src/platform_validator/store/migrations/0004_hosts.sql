-- Version 4: which VMM host a CVM was made on, NULL where there was but one; hosts that an operator drains.

ALTER TABLE cvms_journal ADD COLUMN host TEXT;

CREATE TABLE cvms_hosts_drained (
    name TEXT PRIMARY KEY,
    drained_at TEXT NOT NULL
) STRICT, WITHOUT ROWID;
