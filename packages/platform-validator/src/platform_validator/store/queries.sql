-- name: meta_get
SELECT value FROM meta WHERE key = :key;

-- name: meta_put
INSERT INTO meta (key, value) VALUES (:key, :value) ON CONFLICT (key) DO UPDATE SET value = excluded.value;

-- name: job_insert
INSERT INTO jobs_journal (claim_id, job_id, challenge_id, instance_key, resources, stage, claimed_at)
VALUES (:claim_id, :job_id, :challenge_id, :instance_key, :resources, 'pending', :claimed_at);

-- name: job_granted
UPDATE jobs_journal SET stage = 'claimed', granted = :granted, attempt = :attempt, token = :token, started_at = :at
WHERE claim_id = :claim_id;

-- name: job_advance
UPDATE jobs_journal SET stage = :stage, vm = COALESCE(:vm, vm), kit = COALESCE(:kit, kit) WHERE claim_id = :claim_id;

-- name: job_result
UPDATE jobs_journal SET stage = 'submitting', outcome = :outcome
WHERE claim_id = :claim_id AND outcome IS NULL;

-- name: job_end
UPDATE jobs_journal
SET stage = 'done', outcome = COALESCE(outcome, :outcome), reason = COALESCE(:reason, reason),
    ended_at = COALESCE(ended_at, :at)
WHERE claim_id = :claim_id;

-- name: job_refused
UPDATE jobs_journal SET stage = 'done', outcome = :outcome, reason = :code, ended_at = :at
WHERE claim_id = :claim_id;

-- name: job_submitted
UPDATE jobs_journal SET stage = 'done', ended_at = :at WHERE claim_id = :claim_id AND stage <> 'done';

-- name: job_vm
UPDATE jobs_journal SET vm = :vm WHERE claim_id = :claim_id;

-- name: job_one
SELECT * FROM jobs_journal WHERE claim_id = :claim_id;

-- name: jobs_open
SELECT * FROM jobs_journal WHERE stage <> 'done' ORDER BY position;

-- name: jobs_recent
SELECT * FROM jobs_journal ORDER BY position DESC LIMIT :limit;

-- name: jobs_newest_to_go
SELECT position FROM jobs_journal ORDER BY position DESC LIMIT 1 OFFSET :keep;

-- name: jobs_compact
DELETE FROM jobs_journal WHERE position IN (
    SELECT position FROM jobs_journal AS old
    WHERE stage = 'done' AND ended_at < :before AND position <= :newest
      AND NOT EXISTS (SELECT 1 FROM jobs_outbox WHERE jobs_outbox.claim_id = old.claim_id)
    ORDER BY ended_at LIMIT :batch
);

-- name: replies_compact
DELETE FROM values_replies WHERE session_id IN (
    SELECT session_id FROM cvms_journal WHERE phase = 'gone' AND gone_at < :before ORDER BY gone_at LIMIT :batch
);

-- name: vms_compact
DELETE FROM cvms_journal WHERE position IN (
    SELECT position FROM cvms_journal WHERE phase = 'gone' AND gone_at < :before ORDER BY gone_at LIMIT :batch
);

-- name: outbox_insert
INSERT INTO jobs_outbox (claim_id, job_id, body, stored_at)
SELECT claim_id, job_id, :body, :at FROM jobs_journal WHERE claim_id = :claim_id;

-- name: outbox_all
SELECT * FROM jobs_outbox ORDER BY position;

-- name: outbox_tried
UPDATE jobs_outbox SET tries = tries + 1, last_error = :error WHERE claim_id = :claim_id;

-- name: outbox_delete
DELETE FROM jobs_outbox WHERE claim_id = :claim_id;

-- name: vm_insert
INSERT INTO cvms_journal (name, purpose, challenge_id, instance_key, resources, phase, sealed_secret, compose,
    host_port, session_id, intended_at, hard_deadline, claim_id, host)
VALUES (:name, :purpose, :challenge_id, :instance_key, :resources, :phase, :sealed_secret, :compose,
    :host_port, :session_id, :intended_at, :hard_deadline, :claim_id, :host);

-- name: vm_created
UPDATE cvms_journal SET vm_id = :vm_id, phase = CASE phase WHEN 'intended' THEN 'created' ELSE phase END
WHERE name = :name;

-- name: vm_phase
UPDATE cvms_journal SET phase = :phase, reason = COALESCE(:reason, reason),
    gone_at = CASE :phase WHEN 'gone' THEN :at ELSE gone_at END
WHERE name = :name;

-- name: vm_attested
UPDATE cvms_journal SET attestation = :attestation, vm_instance = :vm_instance, os_image = :os_image
WHERE name = :name;

-- name: vm_assigned
UPDATE cvms_journal SET claim_id = :claim_id WHERE name = :name;

-- name: vm_one
SELECT * FROM cvms_journal WHERE name = :name;

-- name: vms_open
SELECT * FROM cvms_journal WHERE phase <> 'gone' ORDER BY position;

-- name: host_drain
INSERT INTO cvms_hosts_drained (name, drained_at) VALUES (:host, :at) ON CONFLICT (name) DO NOTHING;

-- name: host_undrain
DELETE FROM cvms_hosts_drained WHERE name = :host;

-- name: hosts_drained
SELECT * FROM cvms_hosts_drained ORDER BY name;

-- name: instance_put
INSERT INTO challenges_instances (key, challenge_id, name, repository, commit_id, spec_digest, state, since, reason,
    bundle_sha256, compose_hash, superseded_by, failures)
VALUES (:key, :challenge_id, :name, :repository, :commit_id, :spec_digest, :state, :since, :reason,
    :bundle_sha256, :compose_hash, :superseded_by, :failures)
ON CONFLICT (key) DO UPDATE SET challenge_id = excluded.challenge_id, name = excluded.name,
    repository = excluded.repository, commit_id = excluded.commit_id, spec_digest = excluded.spec_digest,
    state = excluded.state, since = excluded.since, reason = excluded.reason,
    bundle_sha256 = excluded.bundle_sha256, compose_hash = excluded.compose_hash,
    superseded_by = excluded.superseded_by, failures = excluded.failures;

-- name: instance_noted
INSERT INTO challenges_history (challenge_id, key, commit_id, state, reason, at)
SELECT challenge_id, key, commit_id, COALESCE(:left, state), COALESCE(:reason, reason), :at
FROM challenges_instances WHERE key = :key;

-- name: instance_one
SELECT * FROM challenges_instances WHERE key = :key;

-- name: history_newest
SELECT * FROM challenges_history WHERE challenge_id = :challenge_id ORDER BY position DESC LIMIT :limit;

-- name: history_compact
DELETE FROM challenges_history WHERE position IN (
    SELECT position FROM challenges_history WHERE at < :before ORDER BY at LIMIT :batch
);

-- name: instances_all
SELECT * FROM challenges_instances ORDER BY position;

-- name: instance_delete
DELETE FROM challenges_instances WHERE key = :key;

-- name: values_prefixed
-- As bytes: length() and substr() of a text end at its first NUL.
SELECT * FROM values_current
WHERE challenge_id = :challenge_id AND key >= :prefix AND deleted_at IS NULL
    AND substr(CAST(key AS BLOB), 1, length(CAST(:prefix AS BLOB))) = CAST(:prefix AS BLOB)
ORDER BY key LIMIT :limit;

-- name: value_one
SELECT * FROM values_current WHERE challenge_id = :challenge_id AND key = :key AND deleted_at IS NULL;

-- name: value_slot
SELECT * FROM values_current WHERE challenge_id = :challenge_id AND key = :key;

-- name: value_put
INSERT INTO values_current (challenge_id, key, value, key_id, size, version, updated_at)
VALUES (:challenge_id, :key, :value, :key_id, :size, :version, :at)
ON CONFLICT (challenge_id, key) DO UPDATE SET value = excluded.value, key_id = excluded.key_id,
    size = excluded.size, version = excluded.version, updated_at = excluded.updated_at, deleted_at = NULL;

-- name: value_delete
UPDATE values_current SET value = '', key_id = NULL, size = 0, updated_at = :at, deleted_at = :at
WHERE challenge_id = :challenge_id AND key = :key;

-- name: values_compact
DELETE FROM values_current WHERE deleted_at < :before;

-- name: values_usage_one
SELECT keys, bytes FROM values_usage WHERE challenge_id = :challenge_id;

-- name: values_usage_add
INSERT INTO values_usage (challenge_id, keys, bytes) VALUES (:challenge_id, :keys, :bytes)
ON CONFLICT (challenge_id) DO UPDATE SET keys = keys + excluded.keys, bytes = bytes + excluded.bytes;

-- name: values_scopes
SELECT challenge_id, keys, bytes FROM values_usage WHERE keys > 0 ORDER BY challenge_id;

-- name: values_under_other_keys
SELECT * FROM values_current WHERE deleted_at IS NULL AND key_id IS NOT :key_id
ORDER BY challenge_id, key LIMIT :limit OFFSET :skip;

-- name: value_reseal
UPDATE values_current SET value = :value, key_id = :key_id WHERE challenge_id = :challenge_id AND key = :key;

-- name: reply_one
SELECT * FROM values_replies WHERE session_id = :session_id AND request_id = :request_id;

-- name: reply_put
INSERT INTO values_replies (session_id, request_id, reply, key_id)
VALUES (:session_id, :request_id, :reply, :key_id);

-- name: replies_under_other_keys
SELECT * FROM values_replies WHERE key_id IS NOT :key_id
ORDER BY session_id, request_id LIMIT :limit OFFSET :skip;

-- name: reply_reseal
UPDATE values_replies SET reply = :reply, key_id = :key_id
WHERE session_id = :session_id AND request_id = :request_id;

-- name: env_put
INSERT INTO challenges_env (challenge_id, name, repository, sealed, given_at)
VALUES (:challenge_id, :name, :repository, :sealed, :at)
ON CONFLICT (challenge_id, name)
DO UPDATE SET repository = excluded.repository, sealed = excluded.sealed, given_at = excluded.given_at;

-- name: env_delete
DELETE FROM challenges_env WHERE challenge_id = :challenge_id AND name = :name;

-- name: env_all
SELECT * FROM challenges_env WHERE :challenge_id IS NULL OR challenge_id = :challenge_id ORDER BY challenge_id, name;
