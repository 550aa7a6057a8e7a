"""On what does it train? Everything here is plain Python and numpy, and runs without torch."""
