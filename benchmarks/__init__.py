"""What bench.py times: the plain step, the floor."""
