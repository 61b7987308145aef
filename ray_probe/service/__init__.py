"""The user's side: start and stop a service, talk to it, run once."""
