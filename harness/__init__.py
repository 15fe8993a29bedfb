"""What surrounds a training run: flags, files on disk, processes, what is printed, resume."""
