"""The repository itself: imports, wheel, README, command line."""
