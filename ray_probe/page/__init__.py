"""The live page's files, and the report as one HTML file."""
