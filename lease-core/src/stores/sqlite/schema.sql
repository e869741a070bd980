-- The whole of a store. All times are nanoseconds of CLOCK_BOOTTIME as read outside any time namespace.

-- A claim in the line of its name. One b-tree, so that entering and leaving write one page of it.
CREATE TABLE line (
    name     TEXT    NOT NULL,
    token    INTEGER NOT NULL,
    claim    BLOB    NOT NULL, -- the random 128 bits that name it
    ttl      INTEGER NOT NULL,
    deadline INTEGER NOT NULL,
    turn     INTEGER NOT NULL, -- 0: waiting; 9223372036854775807: held; else offered until then
    held_at  INTEGER NOT NULL, -- 0 until it is held
    bell     TEXT    NOT NULL, -- its manager, and the socket that wakes it
    owner    TEXT    NOT NULL,
    -- The process of its manager.
    pid       INTEGER NOT NULL,
    inode     INTEGER NOT NULL, -- of a descriptor of the process
    namespace INTEGER,          -- of the pid; NULL: not known
    PRIMARY KEY (name, token)
) STRICT, WITHOUT ROWID;

-- Managers to be told, once, when the name has another head.
CREATE TABLE watch (
    name     TEXT    NOT NULL,
    bell     TEXT    NOT NULL,
    deadline INTEGER NOT NULL,
    PRIMARY KEY (name, bell)
) STRICT, WITHOUT ROWID;

-- Tokens below the reserved one may have been given; it is synced to the disk before any of them is.
CREATE TABLE meta (
    id             INTEGER PRIMARY KEY CHECK (id = 1),
    incarnation    BLOB    NOT NULL,
    boot           TEXT    NOT NULL,
    next_token     INTEGER NOT NULL,
    reserved_token INTEGER NOT NULL
) STRICT;
