# After every notebook, in its kernel, at the end of each of two passes: `PASS` is 1 or 2.
import ctypes
import gc
import threading

import psutil

gc.collect()
ctypes.CDLL(None).malloc_trim(0)
names = [thread.name for thread in threading.enumerate()]
ports = [c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN" and c.laddr.port]
resident = psutil.Process().memory_info().rss / 2**20
agents = [child for child in psutil.Process().children(recursive=True) if "ngrok" in child.name()]
ours = sorted(name for name in names if name.startswith("medusa"))
print(f"pass {PASS}: {resident:.0f} MiB, threads {ours}, {len(agents)} agents")
assert names.count("medusa-tunnel") == len(agents) == 0
assert "medusa-load" not in names
if PASS == 1:
    first_resident = resident
else:
    assert resident < first_resident + 200, (first_resident, resident)
