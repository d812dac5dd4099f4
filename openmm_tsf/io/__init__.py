"""Files of a run, read without trusting them and written atomically."""
