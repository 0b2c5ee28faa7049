# One server; its text came as a stream, several tokens a step.
import urllib.request

assert names.count("medusa-server") == names.count("medusa-engine") == 1
assert len(answer.text) > 60
assert answer.text.count(" ") > 8
assert answer.acceptance >= 1  # auto: on a busy or single core plain decoding may be what pays
assert comparison.same > 0
assert comparison.identical or comparison.speculative.token_ids[: comparison.same]
if PASS == 1:
    first_gain = batching.gain
else:  # a neighbour that takes the cores meanwhile does so once
    assert max(first_gain, batching.gain) > 1, (first_gain, batching.gain)
assert [len(a.token_ids) > 0 for a in batching.answers] == [True] * 16
seen = [answer, comparison.plain, comparison.speculative, *batching.answers]
assert stats["emitted"] >= sum(one.completion_tokens for one in seen)
assert stats["tokens_per_step"] >= 1
health = urllib.request.urlopen(f"{server.url}/health", timeout=30)
assert health.status == 200
assert server.public_url is None
if PASS == 1:
    first_server, first_url, first_widgets = server, server.url, len(server.panel().get_manager_state()["state"])
else:
    assert server is first_server
    assert server.url == first_url
    assert len(server.panel().get_manager_state()["state"]) == first_widgets
    # what the heads are worth, whatever pays here
    server = medusa_serve.launch(model, heads, panel=False, tree="8")
    assert server.generate("Explain photosynthesis to a child.", max_tokens=48).acceptance > 1.5
