-- Version 3: what became of each challenge's instances, in order.

CREATE TABLE challenges_history (
    position INTEGER PRIMARY KEY,
    challenge_id TEXT NOT NULL,
    key TEXT NOT NULL,
    commit_id TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT,
    at TEXT NOT NULL
) STRICT;
CREATE INDEX challenges_history_of ON challenges_history (challenge_id, position);
CREATE INDEX challenges_history_at ON challenges_history (at);
