"""The tests: one file a contract."""
