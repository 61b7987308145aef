"""What one rollout actor does with a shard."""
