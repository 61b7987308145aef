"""The pool of rollout actors: tasks, timeouts, restarts."""
