"""Temperature-steerable flows for OpenMM."""
