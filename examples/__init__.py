"""Programs that show what argrad is for."""
