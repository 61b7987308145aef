"""Rounds on a cluster: schedule, commits, the reduction of gradients."""
