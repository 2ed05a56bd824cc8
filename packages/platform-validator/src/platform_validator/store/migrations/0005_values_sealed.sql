-- Values and replies sealed under a named key (NULL: in clear, from before); deleted keys leave their version;
-- what each challenge uses.

ALTER TABLE values_current ADD COLUMN key_id TEXT;
ALTER TABLE values_current ADD COLUMN size INTEGER NOT NULL DEFAULT 0;
ALTER TABLE values_current ADD COLUMN deleted_at TEXT;
CREATE INDEX values_deleted ON values_current (deleted_at) WHERE deleted_at IS NOT NULL;
UPDATE values_current SET size = length(CAST(key AS BLOB)) + length(CAST(value AS BLOB));

ALTER TABLE values_replies ADD COLUMN key_id TEXT;

CREATE TABLE values_usage (
    challenge_id TEXT PRIMARY KEY,
    keys INTEGER NOT NULL,
    bytes INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO values_usage (challenge_id, keys, bytes)
SELECT challenge_id, count(*), sum(size) FROM values_current GROUP BY challenge_id;
