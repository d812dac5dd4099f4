"""What the machine of gpu.py is: device, driver and versions."""

import shutil
import subprocess
from typing import Any

import torch

from openmm_tsf.potentials.platforms import available_platforms
from openmm_tsf.utils.versions import package_versions


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the device's name and memory, its driver, and the versions of all packages."""
    machine: dict[str, Any] = {"device": "CPU, one thread"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine = {
            "device": properties.name,
            "memory_GiB": round(properties.total_memory / 2**30, 1),
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return machine | {"openmm_platforms": available_platforms(), **package_versions()}


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None if nothing tells it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0].strip() or None
