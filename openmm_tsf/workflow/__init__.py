"""The stages of a run: MD, training, replica exchange, analysis; and all of them in one."""
