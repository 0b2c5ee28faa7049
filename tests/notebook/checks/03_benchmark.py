# Figures of every mode and contestant, their pictures, and no engine left.
assert names.count("medusa-server") == names.count("medusa-engine") == 0
rows = {(row["concurrency"], row["mode"]): row for row in decoding.result["rows"]}
assert {mode for _, mode in rows} == {"plain", "off", "auto", "8"}
assert all(row["tokens_per_second"] > 0 for row in rows.values())
assert rows[1, "8"]["tokens_per_step"] > 1.2
assert rows[1, "plain"]["tokens_per_step"] == 1
assert [row["left_out"] for row in peers.result["rows"]] == [None] * 4
for shown in (decoding, peers):
    assert shown.file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
