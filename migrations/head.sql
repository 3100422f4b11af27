-- Our own tables in an empty Postgres database, to be made within a transaction; without Alembic, which takes
-- half a second to import. Written by tools/head_sql.py: run `make generate` after a new migration.

CREATE TABLE persistence_alembic_version (
    version_num VARCHAR(32) NOT NULL,
    CONSTRAINT persistence_alembic_version_pkc PRIMARY KEY (version_num)
);

-- Running upgrade  -> 0001

CREATE TABLE IF NOT EXISTS persistence_transfers (
    run_id TEXT NOT NULL,
    source_fingerprint TEXT NOT NULL,
    target_identity TEXT NOT NULL,
    started_at TIMESTAMP WITH TIME ZONE NOT NULL,
    finished_at TIMESTAMP WITH TIME ZONE,
    state TEXT NOT NULL,
    options TEXT NOT NULL,
    totals TEXT,
    PRIMARY KEY (run_id)
);

CREATE TABLE IF NOT EXISTS persistence_transfer_batches (
    run_id TEXT NOT NULL,
    batch_no INTEGER NOT NULL,
    thread_id TEXT NOT NULL,
    digest TEXT NOT NULL,
    checkpoints INTEGER NOT NULL,
    writes INTEGER NOT NULL,
    blobs INTEGER NOT NULL,
    bytes BIGINT NOT NULL,
    committed_at TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (run_id, batch_no)
);

INSERT INTO persistence_alembic_version (version_num) VALUES ('0001') RETURNING persistence_alembic_version.version_num;

-- Running upgrade 0001 -> 0002

CREATE TABLE IF NOT EXISTS persistence_canary (
    id INTEGER NOT NULL,
    beat TEXT NOT NULL,
    PRIMARY KEY (id)
);

UPDATE persistence_alembic_version SET version_num='0002' WHERE persistence_alembic_version.version_num = '0001';

-- Running upgrade 0002 -> 0003

CREATE TABLE IF NOT EXISTS persistence_transfer_keys (
    run_id TEXT NOT NULL,
    batch_no INTEGER NOT NULL,
    keys BYTEA NOT NULL,
    PRIMARY KEY (run_id, batch_no)
);

CREATE TABLE IF NOT EXISTS persistence_transfer_threads (
    run_id TEXT NOT NULL,
    thread_id TEXT NOT NULL,
    action TEXT NOT NULL,
    PRIMARY KEY (run_id, thread_id)
);

CREATE TABLE IF NOT EXISTS persistence_transfer_rejects (
    run_id TEXT NOT NULL,
    reject_no INTEGER NOT NULL,
    thread BYTEA NOT NULL,
    place TEXT NOT NULL,
    reason TEXT NOT NULL,
    raw BYTEA NOT NULL,
    PRIMARY KEY (run_id, reject_no)
);

UPDATE persistence_alembic_version SET version_num='0003' WHERE persistence_alembic_version.version_num = '0002';

-- Running upgrade 0003 -> 0004

CREATE TABLE IF NOT EXISTS persistence_followed (
    run_id TEXT NOT NULL,
    thread_id TEXT COLLATE "C" NOT NULL,
    stamp TEXT NOT NULL,
    checkpoints BIGINT NOT NULL,
    writes BIGINT NOT NULL,
    PRIMARY KEY (run_id, thread_id)
);

UPDATE persistence_alembic_version SET version_num='0004' WHERE persistence_alembic_version.version_num = '0003';

-- Running upgrade 0004 -> 0005

CREATE TABLE IF NOT EXISTS persistence_followed_keys (
    run_id TEXT NOT NULL,
    thread_id TEXT COLLATE "C" NOT NULL,
    part_no INTEGER NOT NULL,
    forgets TEXT NOT NULL,
    keys BYTEA NOT NULL,
    PRIMARY KEY (run_id, thread_id, part_no)
);

UPDATE persistence_alembic_version SET version_num='0005' WHERE persistence_alembic_version.version_num = '0004';

-- Running upgrade 0005 -> 0006

CREATE TABLE IF NOT EXISTS persistence_followed_items (
    run_id TEXT NOT NULL,
    prefix TEXT COLLATE "C" NOT NULL,
    key TEXT COLLATE "C" NOT NULL,
    stamp TEXT NOT NULL,
    mark BYTEA NOT NULL,
    updated_at BIGINT,
    expires_at BIGINT,
    PRIMARY KEY (run_id, prefix, key)
);

UPDATE persistence_alembic_version SET version_num='0006' WHERE persistence_alembic_version.version_num = '0005';
