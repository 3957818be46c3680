"""The peak memory of a script in a process of its own."""

import subprocess
import sys

# ru_maxrss would be that of the process which started this one, where that was larger: it outlives fork and exec.
_TELL = """
def _peak():
    try:
        with open("/proc/self/status") as status:
            return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except OSError:
        import resource, sys
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(_peak())
"""


def peak_bytes(script: str) -> int:
    """Run a script and return the most memory that it ever held; its failure is the test's."""
    done = subprocess.run([sys.executable, "-c", script + _TELL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])
