"""Models of other programs: files read without running anything of them, and what their parts are called there."""
