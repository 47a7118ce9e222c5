"""argrad's service beside Tesseract, which serves vector-Jacobian products of any program: `make bench-serving`."""
