"""Text of what commands show."""
