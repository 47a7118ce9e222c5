"""Times of the engine and the service beside those of their peers, at equal accuracy: `make bench`."""
