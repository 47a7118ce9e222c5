"""Who is timed: argrad and the libraries beside it, behind one interface, each to be run in a process of its own."""
