"""The argrad service: solves batches of optimisation problems and serves their gradients."""
