"""A run before it starts: checked inputs, the plan of shards, forward passes."""
