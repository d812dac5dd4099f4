"""Small helpers that know nothing of molecules or flows."""
