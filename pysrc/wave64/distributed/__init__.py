"""Groups of processes that compute one model together, and what they exchange: below the operators, above nothing."""

from wave64.distributed.collectives import all_gather, all_reduce, reduce_scatter
from wave64.distributed.groups import ALONE, Group, Store, join, leave, meet, partition

__all__ = ["ALONE", "Group", "Store", "all_gather", "all_reduce", "join", "leave", "meet", "partition",
           "reduce_scatter"]
