"""Groups of processes that compute one model together, and what they exchange: below the operators, above nothing."""

from wave64.distributed.collectives import all_gather, all_reduce, reduce_scatter
from wave64.distributed.groups import (
    ALONE,
    WORLD,
    Group,
    Store,
    at_leave,
    join,
    leave,
    meet,
    member,
    names,
    partition,
    register,
    registered,
    said,
    serve_by,
)

__all__ = ["ALONE", "WORLD", "Group", "Store", "all_gather", "all_reduce", "at_leave", "join", "leave", "meet",
           "member", "names", "partition", "reduce_scatter", "register", "registered", "said", "serve_by"]
