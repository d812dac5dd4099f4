"""Scripts and tests of what the program does with bad input, kills and long runs.

The numerical libraries are kept to one thread: a process with threads must not be forked.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["MPLBACKEND"] = "Agg"
