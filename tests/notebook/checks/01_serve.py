# One server, whose text came as a stream, several tokens a step.
import urllib.request

assert names.count("medusa-server") == names.count("medusa-engine") == 1
assert len(answer.text) > 60
assert answer.text.count(" ") > 8
assert answer.acceptance > 1.2
assert comparison.same > 0
assert comparison.identical or comparison.speculative.token_ids[: comparison.same]
assert batching.gain > 1
assert [len(a.token_ids) > 0 for a in batching.answers] == [True] * 16
assert stats["tokens_per_step"] > 1.2
health = urllib.request.urlopen(f"{server.url}/health", timeout=30)
assert health.status == 200
assert server.public_url is None
if PASS == 1:
    first_server, first_url, first_widgets = server, server.url, len(server.panel().get_manager_state()["state"])
else:
    assert server is first_server
    assert server.url == first_url
    assert len(server.panel().get_manager_state()["state"]) == first_widgets
