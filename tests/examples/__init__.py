"""The examples: that they run, go on from a checkpoint bit for bit, and refuse what they cannot do in words."""
