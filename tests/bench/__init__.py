"""The benchmark: that it measures what it says, and that wrong results get no figure."""
