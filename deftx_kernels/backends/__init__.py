"""Registrations of the operators' implementations, one thin file per kind."""
