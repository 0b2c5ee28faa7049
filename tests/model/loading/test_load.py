"""The loader on tiny folders, and that the tiny models say something."""

from __future__ import annotations

import contextlib
import json
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from tokenizers.decoders import Metaspace
from transformers import AutoTokenizer

from medusa_serve.config import EngineConfig
from medusa_serve.errors import InvalidRequest, LoadError
from medusa_serve.model.loading import choose, source
from medusa_serve.model.loading import load as loader
from medusa_serve.model.loading.load import load_model
from medusa_serve.model.loading.tokenizer import Codec, byte_pieces
from tests.tiny import FAMILIES, greedy, save_tiny_folder, tiny_model, tiny_prompts

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_folder(tmp_path_factory.mktemp("tiny") / "tiny-llama")


def load(folder: Path | str, **options: Any) -> loader.LoadedModel:
    return load_model(EngineConfig(model=str(folder), device="cpu", **options), progress=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tiny_models_say_something(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    texts = [greedy(model, prompt, 48) for prompt in tiny_prompts()]
    assert len({token for text in texts for token in text}) >= 30
    assert min(len(set(text)) for text in texts) >= 8
    again = tiny_model(family, dtype)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_each_family(family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = save_tiny_folder(tmp_path / family, family)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = load(made)
    assert capfd.readouterr() == ("", "")
    assert (got.name, got.device, got.dtype) == (family, torch.device("cpu"), torch.float32)
    assert (got.eos_ids, got.max_positions) == (frozenset({2}), 512)
    assert not got.model.training
    assert not any(parameter.requires_grad for parameter in got.model.parameters())
    want = tiny_model(family, torch.float32, vocab=len(got.tokenizer), eos_token_id=2)
    prompt = got.codec.encode("hello")
    assert greedy(got.model, prompt, 20) == greedy(want, prompt, 20)


def test_weights_lie_where_products_of_few_rows_are_fast(folder: Path) -> None:
    model = load(folder).model
    assert all(tensor.data_ptr() % 64 == 0 for tensor in model.parameters())
    tied = load(save_tiny_folder(folder.parent / "tied", "qwen2")).model
    assert tied.get_input_embeddings().weight.data_ptr() == tied.get_output_embeddings().weight.data_ptr()


def test_choices_are_told(folder: Path) -> None:
    notes = load_model(EngineConfig(model=str(folder)), progress=False).notes
    assert [note.split()[0] for note in notes[:2]] == ["device", "dtype"]
    assert all(" because " in note for note in notes)
    assert load(folder, dtype="float32").notes == []
    assert load(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    assert load(folder, dtype="float64").model.dtype == torch.float64


@pytest.mark.parametrize(("native", "want"), [(True, torch.bfloat16), (False, torch.float16)])
def test_dtype_on_a_gpu(native: bool, want: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    found = choose.choose_numbers(EngineConfig(), torch.device("cuda", 0), None)
    assert (found.dtype, found.weights, len(found.notes)) == (want, "", 1)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose.choose_device("auto") == (torch.device("cpu"), "no CUDA device is there")
    with monkeypatch.context() as here:
        here.setattr(source, "ensure_default_model", None)  # before a model is fetched
        for function in (load_model, loader.load_to_answer):
            with pytest.raises(LoadError, match="no CUDA device here"):
                function(EngineConfig(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(choose, "why_unusable", lambda device: None)
    assert choose.choose_device("auto") == (torch.device("cuda", 0), "one is there")
    assert choose.choose_device("cuda:1") == (torch.device("cuda", 1), "as asked")
    with pytest.raises(LoadError, match="no device cuda:2"):
        choose.choose_device("cuda:2")


def test_ids_are_decoded_as_the_tokenizer_says(folder: Path) -> None:
    """Called without its checks, the Rust tokenizer gives what it gives with them; a class of its own is asked."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [*tokenizer("the cat , it 's <|im_end|> é🎉").input_ids, 0, 1, 2]
    for end in range(len(ids) + 1):
        wanted = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert Codec(tokenizer).decode(tuple(ids[:end])) == wanted
    kind = type(tokenizer)
    own = type("Own", (kind,), {"_decode": lambda self, *args, **rest: kind._decode(self, *args, **rest).upper()})
    tokenizer.__class__ = own
    assert Codec(tokenizer).decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) != wanted


def test_codec(folder: Path) -> None:
    codec = load(folder).codec
    text = "the cat\n\n 123 é🎉 <|im_end|>"
    ids = codec.encode(text)
    assert codec.decode(ids) == text.removesuffix("<|im_end|>")  # special tokens are not text
    assert codec.decode([]) == ""
    assert codec.has_chat_template
    chat = codec.encode_chat(HELLO)
    assert chat == codec.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(InvalidRequest, match="surrogate") as caught:
        codec.encode("a\ud800")
    assert caught.value.param == "prompt"
    for messages in ([{"role": "user", "content": "\udfff"}], [{"role": "user"}], []):
        with pytest.raises(InvalidRequest) as caught:
            codec.encode_chat(messages)
        assert caught.value.param == "messages"


def test_pieces_join_to_the_text(folder: Path) -> None:
    """The tiny tokenizer is byte-level: what its ids are is known, whatever is beside them."""
    codec = load(folder).codec
    assert codec.token_texts is not None
    last = max(codec.token_texts)
    everything = [*range(last + 1), *codec.encode("the cat é🎉 <|im_end|>"), last + 7]
    rest = [everything[at] for at in torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))]
    for ids in (everything, rest):
        assert b"".join(codec.token_texts[id] for id in ids).decode(errors="replace") == codec.decode(ids)
    assert {codec.token_texts[id] for id in codec.special_ids} == {b""}


def test_pieces_are_of_bytes_alone(folder: Path) -> None:
    """Other decoders see more than one id at a time; so may one that calls itself byte-level."""
    rust = load(folder).codec._rust
    assert byte_pieces(rust) is not None
    rust.add_tokens(["<a b>", AddedToken("<c é>", special=True)])
    pieces = byte_pieces(rust)
    assert pieces is not None
    assert [pieces[rust.token_to_id(token)] for token in ("<a b>", "<c é>")] == [b"<a b>", b""]

    class Odd:
        """Of a decoder that was changed behind its name."""

        decoder, get_vocab, get_added_tokens_decoder = rust.decoder, rust.get_vocab, rust.get_added_tokens_decoder

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return rust.decode(ids, skip_special_tokens=skip_special_tokens).upper()

    assert byte_pieces(Odd()) is None
    rust.decoder = Metaspace()
    assert byte_pieces(rust) is None


def test_texts_of_single_tokens_join_to_the_text(folder: Path) -> None:
    codec = load(folder).codec
    ids = codec.encode("the onion<|im_end|> at é")
    texts = [codec.token_text(token) for token in ids]
    assert "".join(text for text in texts if "\ufffd" not in text) == "the onion<|im_end|> at "
    assert texts[-2:] == ["\ufffd", "\ufffd"]  # the two bytes of é
    assert [token in codec.special_ids for token in ids].count(True) == 1
    assert codec.token_text(ids[1]) == texts[1]


def test_codec_in_threads(folder: Path) -> None:
    codec = load(folder).codec
    texts = [f"the text {i} " * 20 for i in range(8)]
    want = [(codec.encode(text), codec.encode_chat([{"role": "user", "content": text}])) for text in texts]
    failures: list[BaseException] = []

    def work(text: str, expected: tuple[list[int], list[int]]) -> None:
        try:
            for _ in range(30):
                assert codec.encode(text) == expected[0]
                assert codec.encode_chat([{"role": "user", "content": text}]) == expected[1]
                assert codec.decode(expected[0]) == text
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(texts, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize(
    ("template", "note"),
    [
        (None, None),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "fails on a plain message"),  # CVE-2024-34359
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails on a plain message"),
        ("{{ messages.append(1) }}", "fails on a plain message"),
        ("{% if", "fails on a plain message"),
        ("{{ 'a' * 2000000 }}", "2000000 characters"),
    ],
)
def test_no_chat_where_the_template_is_missing_broken_or_hostile(
    template: str | None, note: str | None, tmp_path: Path
) -> None:
    got = load(save_tiny_folder(tmp_path / "m", chat_template=template))
    assert not got.codec.has_chat_template
    assert [note in line for line in got.notes if "no chat" in line] == ([] if note is None else [True])
    with pytest.raises(InvalidRequest, match="no chat template"):
        got.codec.encode_chat(HELLO)


def edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def test_eos_of_the_tokenizer_and_of_the_template_count_too(tmp_path: Path) -> None:
    made = save_tiny_folder(tmp_path / "m", eos_token_id=0)
    got = load(made)
    assert got.eos_ids == {0, 2}
    assert got.model.generation_config.eos_token_id == [0, 2]
    assert any("<|im_end|>" in note for note in got.notes)


def test_sampling_advice_of_a_checkpoint_does_not_warn_later(tmp_path: Path) -> None:
    made = save_tiny_folder(tmp_path / "m")
    edit(made, "generation_config.json", do_sample=True, temperature=0.3, top_p=0.5, repetition_penalty=1.7)
    got = load(made)
    ids = torch.tensor([got.codec.encode("hello")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4)
    assert got.model.generation_config.repetition_penalty in (None, 1.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"_attn_implementation_internal": "evil/kernel"}, "_attn_implementation_internal"),  # CVE-2026-4372
        ({"text_config": {"_attn_implementation_internal": "sdpa"}}, "_attn_implementation_internal"),
        ({"attn_implementation": "evil/kernel"}, "attn_implementation"),
        ({"model_type": "nosuchtype"}, "does not know"),
        ({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "never run here"),
        ({"model_type": "bert"}, "cannot be loaded|missing|decoder-only|does not know"),
        ({"num_hidden_layers": 3}, "weights of .* are missing"),
        ({"intermediate_size": 32}, "cannot be loaded|another shape"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    made = save_tiny_folder(tmp_path / "m")
    (made / "evil.py").write_text(f"open({str(tmp_path / 'sentinel')!r}, 'w')\nclass Model: pass\n")
    edit(made, "config.json", **changes)
    with pytest.raises(LoadError, match=says) as caught:
        load(made)
    assert "\n" not in caught.value.message
    assert not (tmp_path / "sentinel").exists()


def test_a_native_model_with_an_auto_map_loads_without_its_code(tmp_path: Path) -> None:
    made = save_tiny_folder(tmp_path / "m")
    (made / "evil.py").write_text(f"open({str(tmp_path / 'sentinel')!r}, 'w')\n")
    edit(made, "config.json", auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    assert load(made).model.config.model_type == "llama"
    assert not (tmp_path / "sentinel").exists()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", _cut),
        ("model.safetensors", Path.unlink),
        ("config.json", _cut),
        ("tokenizer.json", _cut),
        ("tokenizer.json", Path.unlink),
    ],
)
def test_damaged_folders(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    made = save_tiny_folder(tmp_path / "m")
    damage(made / name)
    with pytest.raises(LoadError) as caught:
        load(made)
    assert "\n" not in caught.value.message
    assert str(made) in caught.value.message


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadError, match="no config.json"):
        load(tmp_path)
    for missing in (tmp_path / "no", "./no", "~/no", "a/b/c"):
        with pytest.raises(LoadError, match="There is no folder"):
            load(missing)
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadError, match="is a file"):
        load(tmp_path / "file")

    def no_hub(*args: object, **options: object) -> None:
        raise OSError("We couldn't connect to the hub.\nMore advice.")

    from transformers import PretrainedConfig

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", no_hub)
    with pytest.raises(
        LoadError, match=r"'some/typo' is neither a local folder nor .* \(We couldn't connect to the hub\)"
    ):
        load("some/typo")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_out_of_memory_is_said(error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise error

    monkeypatch.setattr(loader, "_load_weights", full)
    with pytest.raises(LoadError, match="does not fit into the memory"):
        load(folder)


@pytest.mark.slow
def test_the_default_model() -> None:
    got = load_model(EngineConfig(device="cpu"))
    assert (got.name, got.eos_ids, got.max_positions, got.dtype) == ("smollm2-135m", {2}, 8192, torch.float32)
    ids = greedy(got.model, got.codec.encode_chat([{"role": "user", "content": "What is 2 + 2?"}]), 24)
    assert "4" in got.codec.decode(ids)
