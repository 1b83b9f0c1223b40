"""What test files share: oracles, problems, tolerances, processes.  No test file imports another."""
