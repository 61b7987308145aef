"""What follows from a measurement that has ended."""
