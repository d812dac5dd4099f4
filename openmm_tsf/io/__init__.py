"""Read and write the files of a run.

Nothing that is read is trusted: no file can run code, fill the memory, or lead a write out of its
directory. What is written is complete or absent.
"""
