"""HTTP: routes, bodies, errors, health, metrics and logs."""
