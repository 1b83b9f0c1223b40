"""What every backend promises, called directly, and the arithmetic that all of them share."""
