-- Version 2: what a later process needs to finish a running job; what compaction looks for.

ALTER TABLE jobs_journal ADD COLUMN kit BLOB;
CREATE INDEX jobs_journal_ended ON jobs_journal (ended_at) WHERE stage = 'done';
CREATE INDEX cvms_journal_gone ON cvms_journal (gone_at) WHERE phase = 'gone';
