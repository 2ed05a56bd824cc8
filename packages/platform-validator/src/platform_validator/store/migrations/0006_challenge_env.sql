-- Version 6: what operators give to challenges as environment, sealed; each for the repository it was given for.

CREATE TABLE challenges_env (
    challenge_id TEXT NOT NULL,
    name TEXT NOT NULL,
    repository TEXT NOT NULL,
    sealed BLOB NOT NULL,
    given_at TEXT NOT NULL,
    PRIMARY KEY (challenge_id, name)
) STRICT, WITHOUT ROWID;
