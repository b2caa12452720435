"""What this machine and its installation offer to abliterator: versions, devices, disk, Hub.

Every try is really made: packages are imported and matrices multiplied, in a child process, since a
wrong driver ends a process without an exception. Whatever goes wrong is an entry of the result and
never an exception. No token is read into the result, and nothing is sent unless `online` is set.

    diagnosis = diagnose(online=False)
    print(diagnosis.devices, diagnosis.faults)
"""

from abliterator.diagnostics._diagnose import diagnose
from abliterator.diagnostics._report import Device, Diagnosis, Disk, Extra, Host, Hub, Python
from abliterator.diagnostics._vllm import VllmInstall, find_vllm

__all__ = [
    "Device",
    "Diagnosis",
    "Disk",
    "Extra",
    "Host",
    "Hub",
    "Python",
    "VllmInstall",
    "diagnose",
    "find_vllm",
]
