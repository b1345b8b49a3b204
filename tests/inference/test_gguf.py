"""A merged model as GGUF: read back by transformers, and served by llama.cpp where it is here."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, normalizers

import ptuning
from ptuning import InputError, Merged, Prompt
from ptuning.backbone.base_model import BaseModel
from ptuning.backbone.load import convert_gguf
from ptuning.inference import gguf_tokenizer
from ptuning.inference.gguf_file import save_gguf, write_gguf
from ptuning.prompts.task import fill

from .. import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _made(name: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**SIZES, **changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        if key.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny.model("llama"),
    "llama tied": lambda: tiny.model("llama", tie_word_embeddings=True),
    "llama spare rows": lambda: tiny.model("llama", vocab_size=450),
    "llama biases": lambda: _made("Llama", attention_bias=True, mlp_bias=True),
    "llama 3": lambda: _made("Llama", rope_parameters=LLAMA3),
    "llama linear": lambda: _made(
        "Llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "mistral": lambda: _made("Mistral", sliding_window=None, head_dim=8),
    "qwen2": lambda: _made("Qwen2"),
    "qwen3": lambda: _made("Qwen3", head_dim=16),
    "gpt2": lambda: tiny.model("gpt2", n_positions=1024),
    "gpt2 narrow": lambda: tiny.model("gpt2", n_positions=1024, n_inner=48),
    "mistral wide": lambda: _made("Mistral", sliding_window=128, head_dim=8),
}
READ_BACK = ["llama", "llama tied", "llama spare rows", "mistral", "mistral wide", "qwen2", "gpt2"]
"""What transformers reads from GGUF in full; llama.cpp reads the others too."""
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ROWS = [
    {"country": text}
    for text in ("France", "Italy or Spain, 2024", "東京  and\n\n  it's 3.14!", "<|odd|> {x}\t ")
]


def _merged(model: Any, **tokenizer_settings: Any) -> Merged:
    tokenizer = tiny.tokenizer(**tokenizer_settings)
    prompt = Prompt("[P*2] {country} is [P] [MASK]")
    prompt.vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    prompt.base_model = BaseModel.of(model, tokenizer).describe()
    return ptuning.merge(model, tokenizer, {"cap": prompt})


def _ids(merged: Merged, row: dict[str, str]) -> list[int]:
    return merged.tokenizer(fill(merged.prompts["cap"]["text"], row))["input_ids"]


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("name", READ_BACK)
def test_transformers_reads_the_file_with_the_same_logits(name: str, tmp_path: Path) -> None:
    merged = _merged(MODELS[name]())
    write_gguf(merged, tmp_path / "model.gguf")
    where: Any = {"gguf_file": "model.gguf"}
    reread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **where)
    for row in ROWS:
        ids = _ids(merged, row)
        torch.testing.assert_close(
            _logits(reread, ids), _logits(merged.model, ids), rtol=1e-4, atol=1e-4
        )


def test_a_converted_file_has_the_special_tokens_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(_merged(tiny.model("llama", vocab_size=450), bos=True), tmp_path / "model.gguf")
    read = transformers.AutoTokenizer.from_pretrained

    def confused(*args: Any, **kwargs: Any) -> Any:  # as transformers 5.17 is
        tokenizer = read(*args, **kwargs)
        tokenizer.eos_token, tokenizer.pad_token = tokenizer.bos_token, None
        return tokenizer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", confused)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "plain")
    monkeypatch.undo()
    tokenizer = read(tmp_path / "plain")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    named = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert "tokenizer.ggml.padding_token_id" in named and tokenizer.pad_token == "<pad>"


@pytest.mark.parametrize("name", ["MODEL.GGUF", "sha256-0123abcd"])
def test_a_file_is_known_by_its_first_bytes_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path / "cache"))
    write_gguf(_merged(tiny.model("llama", vocab_size=450), bos=True), tmp_path / name)
    model, _ = ptuning.load_model(str(tmp_path / name))
    assert model.config.model_type == "llama"


def test_virtual_tokens_are_control_tokens_of_the_file(tmp_path: Path) -> None:
    merged = _merged(tiny.model("llama", vocab_size=450), bos=True)
    write_gguf(merged, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields

    def told(name: str) -> Any:
        return fields[f"tokenizer.ggml.{name}"].contents()

    vocabulary = merged.tokenizer.get_vocab()
    assert [told("tokens")[i] for i in vocabulary.values()] == list(vocabulary)
    types = dict(zip(told("tokens"), told("token_type"), strict=True))
    assert {types[f"<|cap:{i}|>"] for i in range(3)} == {gguf.TokenType.CONTROL}
    assert types["</s>"] == gguf.TokenType.CONTROL and types["a"] == gguf.TokenType.NORMAL
    assert len(types) == 450 and types["[PAD449]"] == gguf.TokenType.UNUSED
    assert told("add_bos_token") is True and told("add_eos_token") is False
    assert told("pre") == "gpt-2" and told("model") == "gpt2"


def test_words_that_were_added_and_several_chat_templates_are_in_the_file(tmp_path: Path) -> None:
    merged = _merged(tiny.model("llama", vocab_size=450))
    tokenizer = merged.tokenizer
    tokenizer.add_tokens(["spam"])
    tokenizer.add_special_tokens({"cls_token": "[CLS]"})
    tokenizer.chat_template = {"default": CHAT, "tool": "{{ messages }}"}
    write_gguf(merged, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    types = fields["tokenizer.ggml.token_type"].contents()
    ids = tokenizer.convert_tokens_to_ids(["spam", "[CLS]"])
    assert [types[i] for i in ids] == [gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL]
    assert fields["tokenizer.chat_template"].contents() == CHAT
    assert fields["tokenizer.chat_template.tool"].contents() == "{{ messages }}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_keep_their_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    merged = _merged(tiny.model("llama").to(dtype))
    write_gguf(merged, tmp_path / "model.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    rows = tensors["token_embd.weight"]
    wanted = merged.model.get_input_embeddings().weight.detach().float().numpy()
    found = gguf.quants.dequantize(rows.data, rows.tensor_type)
    assert rows.tensor_type.name == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert np.array_equal(found, wanted)
    assert tensors["output_norm.weight"].tensor_type.name == "F32"


def test_a_folder_has_the_file_and_what_to_ask(tmp_path: Path) -> None:
    merged = _merged(tiny.model("llama"))
    save_gguf(merged, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.gguf", "prompts.json"]
    assert json.loads((tmp_path / "out/prompts.json").read_text()) == merged.prompts
    merged.save(tmp_path / "merged")
    with pytest.raises(InputError, match="holds a merged model; choose another folder"):
        save_gguf(merged, tmp_path / "merged")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny.model("gemma2"), "it is gemma2; expected one of llama, mistral, qwen2"),
        (lambda: _made("Mistral", sliding_window=16), "attend to a window of the text"),
        (lambda: _made("Llama", hidden_act="gelu"), "its hidden_act is 'gelu'; expected silu"),
        (lambda: _made("Qwen2", rope_parameters=LLAMA3), "llama.cpp does not do for it"),
        (
            lambda: _made(
                "Llama", rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
            ),
            "its rotations are of the kind yarn",
        ),
        (
            lambda: _made(
                "Llama",
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                },
            ),
            "or of a part of a head",
        ),
        (lambda: tiny.model("llama").double(), "give it in float32, bfloat16 or float16"),
        (
            lambda: tiny.model("gpt2", scale_attn_by_inverse_layer_idx=True),
            "its scale_attn_by_inverse_layer_idx is True",
        ),
    ],
)
def test_what_was_not_compared_with_llama_cpp_is_refused(
    model: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as error:
        save_gguf(_merged(model()), tmp_path / "out")
    assert "convert_hf_to_gguf.py" in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("metaspace_always", "does not cut text into words as one of the byte-level BPEs"),
        ("wordpiece", "its tokenizer is WordPiece"),
    ],
)
def test_other_tokenizers_are_refused(kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_gguf(_merged(tiny.model("llama"), kind=kind), tmp_path / "model.gguf")


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_llama_cpp_finds_otherwise_are_refused(flag: str, tmp_path: Path) -> None:
    merged = _merged(tiny.model("llama", vocab_size=450))
    turn = AddedToken("<|turn|>", special=True, **{flag: True})
    merged.tokenizer.add_tokens([turn])
    write_gguf(merged, tmp_path / "model.gguf")  # no template has it
    merged.tokenizer.chat_template = "<|turn|>{{ messages[0].content }}"
    told = rf"'<\|turn\|>' has {flag}, which llama.cpp does not heed"
    with pytest.raises(InputError, match=told):
        write_gguf(merged, tmp_path / "model.gguf")
    (name, about), *_ = merged.prompts.items()
    merged.tokenizer.chat_template = None
    merged.prompts[name] = {**about, "text": f"<|turn|>{about['text']}"}
    with pytest.raises(InputError, match=told):
        write_gguf(merged, tmp_path / "model.gguf")


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_words_that_llama_cpp_finds_otherwise_are_refused(flag: str, tmp_path: Path) -> None:
    merged = _merged(tiny.model("llama", vocab_size=450))
    merged.tokenizer.add_tokens([AddedToken("capital", special=False, **{flag: True})])
    with pytest.raises(InputError, match=f"'capital' has {flag}, which llama.cpp does not heed"):
        write_gguf(merged, tmp_path / "model.gguf")


@pytest.mark.parametrize("change", ["normalizer", "ignore_merges"])
def test_tokenizers_that_llama_cpp_reads_otherwise_are_refused(change: str, tmp_path: Path) -> None:
    merged = _merged(tiny.model("llama"))
    backend = merged.tokenizer.backend_tokenizer
    if change == "normalizer":
        backend.normalizer = normalizers.Lowercase()
    else:
        backend.model.ignore_merges = True
    with pytest.raises(InputError, match="does not cut text into words as one of the byte-level"):
        write_gguf(merged, tmp_path / "model.gguf")


@contextmanager
def _llama_cpp(file: Path) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """llama.cpp's server on a file: path, body -> answer."""
    pytest.importorskip("xllamacpp")
    command = [sys.executable, str(Path(__file__).with_name("llama_server.py")), str(file)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        address = server.stdout.readline().strip()

        def ask(path: str, body: dict[str, Any]) -> Any:
            content, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
            request = urllib.request.Request(address + path, content, kind)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)

        try:
            yield ask
        finally:
            server.kill()  # how it ends by itself may take for ever


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_answers_as_transformers(name: str, tmp_path: Path) -> None:
    merged = _merged(MODELS[name](), bos=name == "qwen2")
    write_gguf(merged, tmp_path / "model.gguf")
    virtual = set(merged.prompts["cap"]["virtual_ids"])
    with _llama_cpp(tmp_path / "model.gguf") as ask:
        for row in ROWS:
            text, ids = fill(merged.prompts["cap"]["text"], row), _ids(merged, row)
            asked = {"content": text, "add_special": True, "parse_special": True}
            assert ask("/tokenize", asked)["tokens"] == ids
            _said_alike(ask, merged.model, ids, virtual, 5e-2 if name == "gpt2" else 1e-4)


@pytest.mark.parametrize("way", list(gguf_tokenizer._WAYS))
def test_llama_cpp_cuts_text_into_the_same_ids(way: str, tmp_path: Path) -> None:
    steps, whole_words = gguf_tokenizer._WAYS[way]
    told = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    told["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    told["normalizer"] = {"type": "NFC"} if way == "qwen2" else None
    told["model"]["ignore_merges"] = whole_words
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(told)), bos_token="<s>", eos_token="</s>"
    )
    model = tiny.model("llama")
    prompt = Prompt("[P*2] {country} is [P] [MASK]")
    prompt.vectors = torch.randn(3, 32)
    prompt.base_model = BaseModel.of(model, tokenizer).describe()
    merged = ptuning.merge(model, tokenizer, {"cap": prompt})
    write_gguf(merged, tmp_path / "model.gguf")
    readme = Path(__file__).parents[2] / "README.md"
    texts = [fill(merged.prompts["cap"]["text"], row) for row in ROWS]
    texts += ["IT'S 12345 o'clock, we'LL\r\n\r\n go", readme.read_text()[:4000]]
    with _llama_cpp(tmp_path / "model.gguf") as ask:
        for text in texts:
            asked = {"content": text, "add_special": True, "parse_special": True}
            assert ask("/tokenize", asked)["tokens"] == merged.tokenizer(text)["input_ids"]


def test_llama_cpp_chats_with_a_prompt_by_its_name(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    model = tiny.model("llama", vocab_size=len(tokenizer))
    prompts = {
        "one": Prompt('[P*2] "{country}" {{x}} ü %}} [P]', chat=True),
        "two": Prompt("[P]{a} in {b}[P]", chat=True),
    }
    for prompt in prompts.values():
        prompt.vectors = torch.randn(prompt.num_virtual_tokens or 0, 32)
        prompt.base_model = BaseModel.of(model, tokenizer).describe()
    merged = ptuning.merge(model, tokenizer, prompts)
    write_gguf(merged, tmp_path / "model.gguf")
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Fra "x"'}]
    asked: list[dict[str, Any]] = [
        {}, {"prompt": "one"}, {"prompt": "two", "fields": {"a": "A", "b": "B"}}
    ]  # fmt: skip
    with _llama_cpp(tmp_path / "model.gguf") as ask:
        for more in asked:
            told = ask("/apply-template", {"messages": talk, "chat_template_kwargs": more})
            assert told["prompt"] == merged.tokenizer.apply_chat_template(
                talk, tokenize=False, add_generation_prompt=True, **more
            )
        unknown = {"messages": talk, "chat_template_kwargs": {"prompt": "no"}}
        with pytest.raises(urllib.error.HTTPError) as error:
            ask("/apply-template", unknown)
        assert "no chat prompt is called no; there are: one, two" in error.value.read().decode()


def _said_alike(ask: Any, model: Any, ids: list[int], virtual: set[int], off: float) -> None:
    """Eight tokens, one after the other: the same shares, and so the same words."""
    for _ in range(8):
        told = ask("/completion", {"prompt": ids, "n_predict": 1, "n_probs": 400,
                                               "top_k": 1, "return_tokens": True})  # fmt: skip
        expected = _logits(model, ids)[-1].log_softmax(-1)
        for seen in told.get("completion_probabilities", []):  # none of half a character
            for top in seen["top_logprobs"]:
                assert abs(top["logprob"] - float(expected[top["id"]])) < off
        said = int(expected.argmax())
        top, second = expected.topk(2).values.tolist()
        if told["tokens"]:  # none at the end
            assert told["tokens"] == [said] or top - second < off
        assert said not in virtual
        ids = [*ids, said]
