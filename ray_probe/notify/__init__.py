"""Calls a program and a web address when a measurement has ended."""
