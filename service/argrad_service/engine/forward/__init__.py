"""Forward solvers, one file each."""
