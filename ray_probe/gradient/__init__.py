"""The summed gradient: layout, sum of a shard, state on disk."""
