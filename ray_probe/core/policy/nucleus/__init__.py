"""The nuclei of rows: their search, and their form kept for backward."""
