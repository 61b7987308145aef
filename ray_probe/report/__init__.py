"""Tables, plots and caveats made of a result."""
