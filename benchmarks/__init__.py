"""What bench.py times: the plain step, the floor; and the processes that it times them in."""
