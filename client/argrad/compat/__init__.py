"""Drop-ins for other libraries' layers."""
