"""A service over HTTP: the application, its server and its client; no Ray."""
