"""Prompts: files, tables, chat templates, tokenization."""
