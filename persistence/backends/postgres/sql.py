"""The statements of the Postgres savers, in the official saver's tables.

Each of put, put_writes and get is one statement: atomic by itself, one round trip, no session
state. So they run behind PgBouncer in transaction mode; and because every sub-select names the
thread as a constant, a database that is distributed by thread asks only one machine.

Placeholders are named, so that one value is one parameter however often it stands there.

Who builds on values that are stored already locks them until it is committed: the parent's row, or the blobs
(``FOR KEY SHARE``). Who deletes therefore waits for it, and then looks whether anybody needs what is deleted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any


def _here(alias: str) -> str:
    return f"{alias}.thread_id = %(thread)s AND {alias}.checkpoint_ns = %(ns)s"


# For the planner: OFFSET 0 makes it look each row up by its key, once, and an array that comes from
# a sub-select has the same estimate with and without its value. So the plan of a prepared statement
# costs no more than one made anew, and is kept: to plan these takes longer than to run them.


_NO_VALUE = """'{"__persistence__": null}'"""


def _blob(alias: str, columns: str) -> str:
    return f"""SELECT {columns} FROM checkpoint_blobs b
            WHERE {_here("b")} AND b.channel = {alias}.channel AND b.version = {alias}.version"""


def _marker(alias: str) -> str:
    return f"""jsonb_build_object('__persistence__', CASE
        WHEN {alias}.type <> 'empty' THEN jsonb_build_array({alias}.type, encode({alias}.blob, 'base64'))
    END)"""


# Channels whose value comes with the call; 'empty' where there is none. Where the version already
# names something else in the blob table, the row gets a marker, and other checkpoints keep theirs.
_OWN = f"""
own AS (
    SELECT * FROM unnest(
        (SELECT %(own_channels)s::text[]), (SELECT %(own_versions)s::text[]),
        (SELECT %(own_types)s::text[]), (SELECT %(own_blobs)b::bytea[])
    ) AS o(channel, version, type, blob)
),
clash AS (
    SELECT own.channel, {_marker("own")} AS value
    FROM own CROSS JOIN LATERAL ({_blob("own", "b.type, b.blob")} OFFSET 0 FOR KEY SHARE) AS b
    WHERE own.type <> b.type OR own.blob IS DISTINCT FROM b.blob
)"""


# Channels that keep what is stored for their version: in the parent's row or in the blob table.
# Only where nothing is stored the value of the call is taken; without a type it is in `inline`.
# Where the parent does not know the version, which calls of LangGraph's own do not meet, all other
# checkpoints must be asked (_SEARCH), because a blob may be left of one that was replaced.
def _kept(search: bool) -> str:
    named, is_named, found = "", "s.is_known", "CASE WHEN s.is_known THEN parent.held -> k.channel END"
    if search:
        named, is_named = f"({_SEARCH}) AS named,", "(s.is_known OR s.named IS NOT NULL)"
        found = "CASE WHEN s.is_known THEN parent.held -> k.channel ELSE s.named -> 0 END"
    return f"""
parent AS MATERIALIZED (
    SELECT p.checkpoint -> 'channel_versions' AS versions, p.checkpoint -> 'channel_values' AS held
    FROM checkpoints p WHERE {_here("p")} AND p.checkpoint_id = %(parent)s FOR KEY SHARE
),
kept AS MATERIALIZED (
    SELECT k.channel, k.version, k.type, k.blob, f.is_known,
        CASE WHEN f.is_stored THEN f.found
            WHEN k.type IS NULL OR f.left IS NULL OR EXISTS (
                {_blob("k", "1")} AND b.type = k.type AND b.blob IS NOT DISTINCT FROM k.blob
            ) THEN k.inline::jsonb
            ELSE {_marker("k")}
        END AS value,
        NOT f.is_stored AND f.left IS NULL AND k.type IS NOT NULL AS stored
    FROM unnest(
        (SELECT %(kept_channels)s::text[]), (SELECT %(kept_versions)s::text[]),
        (SELECT %(kept_inline)s::text[]), (SELECT %(kept_types)s::text[]), (SELECT %(kept_blobs)b::bytea[])
    ) AS k(channel, version, inline, type, blob)
    LEFT JOIN parent ON true
    CROSS JOIN LATERAL (
        SELECT s.is_known, s.left, {found} AS found,
            COALESCE({found} <> {_NO_VALUE}, {is_named} AND s.left <> 'empty', false) AS is_stored
        FROM (
            SELECT ({_blob("k", "b.type")} FOR KEY SHARE) AS left, {named}
                COALESCE(parent.versions ->> k.channel = k.version, false) AS is_known OFFSET 0
        ) AS s OFFSET 0
    ) AS f
)"""


# The value of the largest id that names the version and has one: [] if that is in the blob table.
_SEARCH = f"""
                SELECT (array_agg(
                    CASE WHEN v.held ? k.channel THEN jsonb_build_array(v.held -> k.channel) ELSE '[]' END
                    ORDER BY c.checkpoint_id COLLATE "C" DESC
                ))[1]
                FROM checkpoints c
                CROSS JOIN LATERAL (SELECT COALESCE(c.checkpoint -> 'channel_values', '{{}}') AS held) AS v
                WHERE {_here("c")} AND c.checkpoint -> 'channel_versions' ->> k.channel = k.version
                AND CASE WHEN v.held ? k.channel
                    THEN v.held -> k.channel <> {_NO_VALUE}
                    ELSE EXISTS ({_blob("k", "1")} AND b.type <> 'empty')
                END"""
_ALL_KNOWN = "NOT EXISTS (SELECT 1 FROM kept WHERE NOT is_known)"

_ROWS_OF = {
    "own": "SELECT channel, version, type, blob FROM own",
    "kept": "SELECT channel, version, type, blob FROM kept WHERE stored",
}


# Rows to store: placeholder and type of each column.
_BLOB = {"channel": "s::text", "version": "s::text", "type": "s::text", "blob": "b::bytea"}
_WRITE = {"idx": "s::int", "channel": "s::text", "type": "s::text", "blob": "b::bytea"}
_FEW = 8


def _rows(same: str, columns: Mapping[str, str], number: int) -> str:
    # Each value is a parameter, because arrays take the client several times as long to write; but
    # every number of rows is a statement of its own, which the server prepares: so only for a few.
    if number <= _FEW:
        rows = (", ".join(f"%({name}{i}){kind}" for name, kind in columns.items()) for i in range(number))
        return "VALUES " + ", ".join(f"({same}, {row})" for row in rows)
    arrays = ", ".join(f"%({name}s){kind}[]" for name, kind in columns.items())
    return f"SELECT {same}, r.* FROM unnest({arrays}) AS r"


@lru_cache
def _row_names(columns: tuple[str, ...], number: int) -> list[str]:
    return [f"{name}{i}" for i in range(number) for name in columns]


def row_params(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The parameters of rows to store, as a statement for so many of them wants them."""
    if len(rows) <= _FEW:
        return dict(zip(_row_names(tuple(columns), len(rows)), chain.from_iterable(rows), strict=True))
    return {f"{name}s": list(values) for name, values in zip(columns, zip(*rows, strict=True), strict=True)}


_REPLACE = """ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id) DO UPDATE SET
    parent_checkpoint_id = EXCLUDED.parent_checkpoint_id,
    checkpoint = EXCLUDED.checkpoint,
    metadata = EXCLUDED.metadata"""


@lru_cache
def put(*, own: bool, kept: bool, search: bool = False) -> str:
    """Store a checkpoint; return its ``xmin`` and the values that its row holds, if that was done.

    Args:
        own: There are channels with a new version to look at.
        kept: There are channels that keep what is stored for their version. Where the parent does not
            know one of these versions, nothing is done.
        search: Look for such versions in all checkpoints of the namespace.
    """
    parts = [name for name, there in (("own", own), ("kept", kept)) if there]
    steps = [step for step, there in ((_OWN, own), (_kept(search), kept)) if there]
    condition = f"WHERE {_ALL_KNOWN}" if kept and not search else ""
    values = "%(values)s::jsonb"
    if parts:
        # In the order of the key, so that two calls at once do not wait for each other in a circle.
        steps.append(f"""
blobs AS (
    INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
    SELECT %(thread)s, %(ns)s, r.* FROM ({" UNION ALL ".join(_ROWS_OF[p] for p in parts)}) AS r {condition}
    ORDER BY r.channel COLLATE "C"
    ON CONFLICT (thread_id, checkpoint_ns, channel, version) DO NOTHING
)""")
    for source in (["clash"] if own else []) + (["kept"] if kept else []):
        held = f"SELECT jsonb_object_agg(channel, value) FROM {source}"
        if source == "kept":
            held += " WHERE value IS NOT NULL"
        values += f" || COALESCE(({held}), '{{}}')"
    return f"""{"WITH" if steps else ""} {",".join(steps)}
INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata)
SELECT %(thread)s, %(ns)s, %(id)s, %(parent)s,
    %(body)s::jsonb || CASE WHEN %(has_values)s THEN jsonb_build_object('channel_values', v.held)
        WHEN v.held <> '{{}}' THEN jsonb_build_object('channel_values', v.held, '__persistence__', NULL)
        ELSE '{{}}' END,
    %(metadata)s::jsonb
FROM (SELECT {values} AS held OFFSET 0) AS v {condition}
{_REPLACE}
RETURNING xmin::text, checkpoint -> 'channel_values'"""


@lru_cache
def put_known(*, blobs: int, kept: bool) -> str:
    """Store a checkpoint of which the caller knows all that :func:`put` looks up, and return its ``xmin``.

    Nothing is done where the parent's row is not the one that was known, and no checkpoint is stored
    where one of the versions is in the blob table already.

    Args:
        blobs: How many channels have a new version whose value goes to the blob table.
        kept: There are channels that keep what the parent has.
    """
    new = f"""WITH blobs AS (
    INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
    {_rows("%(thread)s, %(ns)s", _BLOB, blobs)}
    ON CONFLICT (thread_id, checkpoint_ns, channel, version) DO NOTHING RETURNING 1
)"""
    # Distributed tables take VALUES, and a row made of one of the same thread, straight to their machine.
    thread = "p.thread_id" if kept and not blobs else "%(thread)s"
    row = f"{thread}, %(ns)s, %(id)s, %(parent)s, %(checkpoint)s::jsonb, %(metadata)s::jsonb"
    all_new = f"(SELECT count(*) FROM blobs) = {blobs}"
    if kept:
        source = f"""SELECT {row} FROM checkpoints p
WHERE {_here("p")} AND p.checkpoint_id = %(parent)s AND p.xmin = %(xmin)s::xid
    {f"AND {all_new}" if blobs else ""}
FOR KEY SHARE"""
    else:
        source = f"SELECT {row} WHERE {all_new}" if blobs else f"VALUES ({row})"
    return f"""{new if blobs else ""}
INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata)
{source}
{_REPLACE}
RETURNING xmin::text"""


@lru_cache
def put_writes(number: int) -> str:
    """Store the writes of one task, of which there are so many."""
    return f"""
INSERT INTO checkpoint_writes
    (thread_id, checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, blob)
{_rows("%(thread)s, %(ns)s, %(id)s, %(task)s, %(path)s", _WRITE, number)}
ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id, task_id, idx) DO UPDATE SET
    task_path = EXCLUDED.task_path, channel = EXCLUDED.channel, type = EXCLUDED.type, blob = EXCLUDED.blob
WHERE EXCLUDED.idx < 0"""


def _packed(columns: str) -> str:
    # Not as arrays, which take the client several times as long to read.
    return f"""json_agg(json_build_array({columns}, length(t.blob))) AS rows,
        string_agg(t.blob, '') AS bytes"""


_ORDER = 'checkpoint_id COLLATE "C" DESC, thread_id COLLATE "C", checkpoint_ns COLLATE "C"'
_COLUMNS = "thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata"


@lru_cache
def select(rows: str, *, one_thread: bool) -> str:
    """Whole checkpoints: ``rows`` is what follows ``WHERE`` in the choice of their rows.

    The rows are chosen first, so that blobs and writes are fetched only for those that are returned.

    On distributed tables the choice among all threads is made first, too, and sent to all machines. What
    is fetched for it must then be grouped by the thread, and may have no ``OFFSET``: to group by
    a key looks up each row as well.
    """
    chosen = f"FROM checkpoints {f'WHERE {rows}' if rows else ''} ORDER BY {_ORDER} LIMIT %(limit)s"
    if one_thread:
        thread, once, grouped = "%(thread)s", "OFFSET 0", ""
        found = f"(SELECT xmin::text, {_COLUMNS} {chosen}) AS c"
    else:
        thread, grouped = "c.thread_id", "GROUP BY t.thread_id"
        once = f"{grouped}, t.checkpoint_ns, t.channel, t.version"
        found = f"""(SELECT thread_id, checkpoint_ns, checkpoint_id {chosen}) AS k
CROSS JOIN LATERAL (
    SELECT xmin::text, {_COLUMNS} FROM checkpoints i
    WHERE i.thread_id = k.thread_id AND i.checkpoint_ns = k.checkpoint_ns
        AND i.checkpoint_id = k.checkpoint_id
    GROUP BY i.thread_id, i.checkpoint_ns, i.checkpoint_id
) AS c"""
    return f"""
SELECT c.thread_id, c.checkpoint_ns, c.checkpoint_id, c.parent_checkpoint_id, c.checkpoint, c.metadata,
    b.rows, b.bytes, w.rows, w.bytes, s.rows, s.bytes, c.xmin
FROM {found}
LEFT JOIN LATERAL (
    SELECT {_packed("t.channel, t.type")}
    FROM LATERAL jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
    CROSS JOIN LATERAL (
        SELECT t.thread_id, t.channel, t.type, t.blob FROM checkpoint_blobs t
        WHERE t.thread_id = {thread} AND t.checkpoint_ns = c.checkpoint_ns
            AND t.channel = v.key AND t.version = v.value {once}
    ) AS t {grouped}
) AS b ON true
LEFT JOIN LATERAL (
    SELECT {_packed("t.task_path, t.task_id, t.idx, t.channel, t.type")}
    FROM checkpoint_writes t WHERE t.thread_id = {thread} AND t.checkpoint_ns = c.checkpoint_ns
        AND t.checkpoint_id = c.checkpoint_id {grouped}
) AS w ON true
LEFT JOIN LATERAL (
    SELECT {_packed("t.task_path, t.task_id, t.idx, t.channel, t.type")}
    FROM checkpoint_writes t
    WHERE c.parent_checkpoint_id IS NOT NULL AND CASE
            WHEN jsonb_typeof(c.checkpoint -> 'v') = 'number' THEN (c.checkpoint ->> 'v')::numeric < 4
            ELSE true END
        AND t.thread_id = {thread} AND t.checkpoint_ns = c.checkpoint_ns
        AND t.checkpoint_id = c.parent_checkpoint_id AND t.channel = '__pregel_tasks' {grouped}
) AS s ON true
ORDER BY {", ".join("c." + column for column in _ORDER.split(", "))}"""


EXACT = "thread_id = %(thread)s AND checkpoint_ns = %(ns)s AND checkpoint_id = %(id)s"
# The id is chosen from the primary key's index alone, in the order of bytes whatever the
# database's collation is.
LATEST = """thread_id = %(thread)s AND checkpoint_ns = %(ns)s AND checkpoint_id = (
        SELECT i.checkpoint_id FROM checkpoints i WHERE i.thread_id = %(thread)s AND i.checkpoint_ns = %(ns)s
        ORDER BY i.checkpoint_id COLLATE "C" DESC LIMIT 1
    )"""

DELETE_THREADS = """
WITH writes AS (DELETE FROM checkpoint_writes WHERE thread_id = ANY(%(threads)s)),
blobs AS (DELETE FROM checkpoint_blobs WHERE thread_id = ANY(%(threads)s))
DELETE FROM checkpoints WHERE thread_id = ANY(%(threads)s)"""


def _robbed(threads: str, spaces: str = "true") -> str:
    return f"""
SELECT EXISTS (
    SELECT 1 FROM checkpoints c CROSS JOIN LATERAL jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
    WHERE c.thread_id = {threads} AND {spaces}
    AND NOT COALESCE(c.checkpoint -> 'channel_values' ? v.key, false) AND NOT EXISTS (
        SELECT 1 FROM checkpoint_blobs b WHERE b.thread_id = {threads} AND b.thread_id = c.thread_id
        AND b.checkpoint_ns = c.checkpoint_ns AND b.channel = v.key AND b.version = v.value
    )
)"""


# After all of them were deleted: whether a checkpoint that was put meanwhile lacks a value.
ROBBED_THREADS = _robbed("ANY(%(threads)s)")
ROBBED_CALLS = _robbed("%(thread)s", "c.checkpoint_ns = ANY(%(spaces)s)")

SNAPSHOT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"

NODES = """
SELECT checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint -> 'v',
    jsonb_build_object(
        'parents', metadata -> 'parents',
        'counters_since_delta_snapshot', metadata -> 'counters_since_delta_snapshot',
        'delta_writes_versioned', metadata -> 'delta_writes_versioned'
    ),
    CASE WHEN metadata ? 'counters_since_delta_snapshot'
        THEN ARRAY(SELECT jsonb_object_keys(checkpoint -> 'channel_versions')) ELSE '{}' END
FROM checkpoints WHERE thread_id = %(thread)s"""

RUNS = """
SELECT thread_id, checkpoint_ns, checkpoint_id FROM checkpoints
WHERE metadata ->> 'run_id' = ANY(%(runs)s)
    AND jsonb_typeof(metadata -> 'run_id') NOT IN ('object', 'array')"""

WITH_SENDS = """
SELECT DISTINCT checkpoint_id FROM checkpoint_writes
WHERE thread_id = %(thread)s AND checkpoint_ns = %(ns)s AND checkpoint_id = ANY(%(ids)s)
AND channel = '__pregel_tasks'"""

_IS_STORED = f"""CASE
    WHEN c.checkpoint -> 'channel_values' ? k.channel
        THEN c.checkpoint -> 'channel_values' -> k.channel <> {_NO_VALUE}
    ELSE EXISTS (
        SELECT 1 FROM checkpoint_blobs b WHERE {_here("b")} AND b.channel = k.channel
        AND b.version = c.checkpoint -> 'channel_versions' ->> k.channel AND b.type <> 'empty'
    ) END"""

STORED = f"""
SELECT c.checkpoint_id,
    ARRAY(SELECT k.channel FROM unnest(%(channels)s::text[]) AS k(channel) WHERE {_IS_STORED})
FROM checkpoints c WHERE {_here("c")}"""

CHAIN = f"""
WITH RECURSIVE chain(id, parent, depth) AS (
    SELECT c.checkpoint_id, c.parent_checkpoint_id, 0 FROM checkpoints c
    WHERE {_here("c")} AND c.checkpoint_id = %(id)s
    UNION ALL
    SELECT c.checkpoint_id, c.parent_checkpoint_id, chain.depth + 1 FROM chain
    JOIN checkpoints c ON {_here("c")} AND c.checkpoint_id = chain.parent
    WHERE chain.depth < %(depth)s
)
SELECT chain.id, ARRAY(SELECT k.channel FROM unnest(%(channels)s::text[]) AS k(channel) WHERE {_IS_STORED})
FROM chain JOIN checkpoints c ON {_here("c")} AND c.checkpoint_id = chain.id ORDER BY chain.depth"""

CHAIN_WRITES = """
SELECT checkpoint_id, task_path, task_id, idx, channel, type, blob FROM checkpoint_writes
WHERE thread_id = %(thread)s AND checkpoint_ns = %(ns)s AND checkpoint_id = ANY(%(ids)s)
AND channel = ANY(%(channels)s)"""

SEEDS = f"""
SELECT k.id, k.channel, jsonb_build_object(k.channel, c.checkpoint -> 'channel_values' -> k.channel),
    c.checkpoint -> 'channel_values' ? k.channel, b.type, b.blob
FROM unnest(%(ids)s::text[], %(channels)s::text[]) AS k(id, channel)
JOIN checkpoints c ON {_here("c")} AND c.checkpoint_id = k.id
LEFT JOIN checkpoint_blobs b ON {_here("b")} AND b.channel = k.channel
    AND b.version = c.checkpoint -> 'channel_versions' ->> k.channel"""

DELETE_CHECKPOINTS = f"""
WITH writes AS (
    DELETE FROM checkpoint_writes w WHERE {_here("w")} AND w.checkpoint_id = ANY(%(ids)s)
),
deleted AS (
    DELETE FROM checkpoints c WHERE {_here("c")} AND c.checkpoint_id = ANY(%(ids)s)
    RETURNING c.checkpoint -> 'channel_versions' AS versions
)
SELECT DISTINCT v.key, v.value FROM deleted CROSS JOIN LATERAL jsonb_each_text(deleted.versions) AS v"""

REFERENCED = f"""
SELECT DISTINCT v.key, v.value
FROM checkpoints c CROSS JOIN LATERAL jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
WHERE {_here("c")}"""

DELETE_BLOBS = f"""
DELETE FROM checkpoint_blobs b USING unnest(%(channels)s::text[], %(versions)s::text[]) AS g(channel, version)
WHERE {_here("b")} AND b.channel = g.channel AND b.version = g.version"""

# Whether a checkpoint that was put meanwhile needs what was deleted.
BUILT_ON = f"""
SELECT EXISTS (SELECT 1 FROM checkpoints c WHERE {_here("c")} AND c.parent_checkpoint_id = ANY(%(ids)s))
OR EXISTS (
    SELECT 1 FROM checkpoints c CROSS JOIN LATERAL jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
    JOIN unnest(%(channels)s::text[], %(versions)s::text[]) AS g(channel, version)
        ON v.key = g.channel AND v.value = g.version
    WHERE {_here("c")}
)"""

ORPHAN = f"""
UPDATE checkpoints c SET parent_checkpoint_id = NULL
WHERE {_here("c")} AND c.checkpoint_id = ANY(%(ids)s) AND c.parent_checkpoint_id = ANY(%(deleted)s)"""

DELETE_CALLS = """
WITH
writes AS (DELETE FROM checkpoint_writes WHERE thread_id = %(thread)s AND checkpoint_ns = ANY(%(spaces)s)),
blobs AS (DELETE FROM checkpoint_blobs WHERE thread_id = %(thread)s AND checkpoint_ns = ANY(%(spaces)s))
DELETE FROM checkpoints WHERE thread_id = %(thread)s AND checkpoint_ns = ANY(%(spaces)s)"""

IS_EMPTY = """
SELECT NOT EXISTS (SELECT 1 FROM checkpoints WHERE thread_id = %(thread)s)
    AND NOT EXISTS (SELECT 1 FROM checkpoint_writes WHERE thread_id = %(thread)s)
    AND NOT EXISTS (SELECT 1 FROM checkpoint_blobs WHERE thread_id = %(thread)s)"""

_COPIED = {
    "checkpoint_blobs": "checkpoint_ns, channel, version, type, blob",
    "checkpoint_writes": "checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, blob",
    "checkpoints": "checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata",
}
COPY_THREAD = [
    f"INSERT INTO {table} (thread_id, {columns}) "
    f"SELECT %(target)s, {columns} FROM {table} WHERE thread_id = %(source)s"
    for table, columns in _COPIED.items()
]
