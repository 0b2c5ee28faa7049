# The heads that were trained here draft better than the lookup, and are served.
from pathlib import Path

assert names.count("medusa-server") == names.count("medusa-engine") == 1
assert (Path(heads) / "config.json").is_file()
assert by_lookup >= 1
assert by_heads > by_lookup
assert server.describe()["heads"] == "sequential"
if PASS == 1:
    first_made = (Path(heads) / "config.json").stat().st_mtime
else:
    assert (Path(heads) / "config.json").stat().st_mtime == first_made  # not trained again
