"""A server that speaks OpenAI's protocol answers as the same model does here; what it says is read, or refused."""

import base64
import io
import math
import warnings

import pytest
import torch
import transformers as tf
from keep_sets import ENDS, make, single_inputs
from openai_server import OpenAI
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from drift_peft import KeepSet
from drift_peft.keeping import Sample
from drift_peft.keeping.server import Server


def entries(tokens, top_tokens, top_logprobs, name):
    """What a server says of an answer; `name` writes a token."""
    return [
        {
            **name(token),
            "logprob": logprobs[0],
            "top_logprobs": [{**name(t), "logprob": p} for t, p in zip(top, logprobs, strict=True)],
        }
        for token, top, logprobs in zip(tokens.tolist(), top_tokens.tolist(), top_logprobs.tolist(), strict=True)
    ]


@pytest.fixture(scope="module")
def answers(folder):
    """body of a request -> the answer of the model, as it is asked one by one through `generate`."""
    model = tf.AutoModelForImageTextToText.from_pretrained(folder / "base").eval()
    processor = tf.AutoProcessor.from_pretrained(folder / "base")

    def answer(body):
        address, question = body["messages"][0]["content"]
        image = Image.open(io.BytesIO(base64.b64decode(address["image_url"]["url"].partition(",")[2])))
        sample = Sample(image, question["text"], "", "", None, None, None)
        inputs = single_inputs(processor, sample)
        asked = {"do_sample": body["temperature"] > 0, "repetition_penalty": body["repetition_penalty"]}
        made = model.generate(
            **inputs,
            max_new_tokens=body["max_tokens"],
            suppress_tokens=[3, 4, 5, 6],
            output_logits=True,
            return_dict_in_generate=True,
            **asked,
        )
        logprobs = torch.log_softmax(torch.cat(made.logits), -1).topk(body["top_logprobs"])
        return made.sequences[0, inputs["input_ids"].shape[1] :], logprobs.indices, logprobs.values

    return answer, processor.tokenizer


NAMES = {  # as vLLM writes tokens when it is asked to number them, as llama.cpp does, as others do
    "vllm": lambda tokenizer: lambda token: {"token": f"token_id:{token}", "bytes": None},
    "llama.cpp": lambda tokenizer: lambda token: {"token": "?", "id": token},
    "text": lambda tokenizer: lambda token: {"token": tokenizer.decode([token])},
    "bytes": lambda tokenizer: (
        lambda token: {
            "token": tokenizer.decode([token]),
            "bytes": [*tokenizer.decode([token]).encode()],
        }
    ),
}


@pytest.mark.parametrize("style", NAMES)
def test_the_same_set_as_here(style, folder, answers, tmp_path):
    answer, tokenizer = answers
    name = NAMES[style](tokenizer)
    with OpenAI(lambda question: "…", logprobs=lambda body: entries(*answer(body), name)) as server:
        keep_set = make(folder, tmp_path / "k.safetensors", server=server.url, api_key="secret")
        assert {*server.keys} == {"Bearer secret"} and server.busiest <= 4
        assert all(body["model"] == f"{folder / 'base'}" and body["logprobs"] is True for body in server.bodies)
    here = KeepSet.load(folder / "keep.safetensors")
    assert keep_set.metadata["generation"] == {"max_new_tokens": 8, "load_in_4bit": False, "server": True}
    for a, b in zip(keep_set, here, strict=True):
        assert a.tokens.equal(b.tokens) and a.top_tokens.equal(b.top_tokens) and a.answer == b.answer
        torch.testing.assert_close(a.top_logprobs, b.top_logprobs, atol=1e-4, rtol=0)
    assert b"secret" not in keep_set.path.read_bytes()


def test_a_server_that_sees_other_prompts_or_leaves_out_the_ends_is_told_once(folder, answers, tmp_path):
    """As one does whose processor has other settings than the one here."""
    answer, tokenizer = answers
    name = NAMES["vllm"](tokenizer)

    def unended(body):
        tokens, *rest = answer(body)
        kept = len(tokens) - (int(tokens[-1]) in ENDS and len(tokens) > 1)
        return entries(tokens[:kept], *(row[:kept] for row in rest), name)

    with OpenAI(lambda question: "…", logprobs=unended) as server, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        server.usage = 5
        make(folder, tmp_path / "k.safetensors", server=server.url)
    told = [str(w.message) for w in caught if server.url in str(w.message)]
    assert len(told) == 2
    assert "makes 5 tokens of an image and its question, and the processor here makes " in told[0]
    assert "leaves out the token that ends an answer" in told[1]


def test_an_answer_that_the_server_cuts_is_refused(folder, answers, tmp_path):
    answer, tokenizer = answers
    name = NAMES["vllm"](tokenizer)

    def short(body):
        tokens, *rest = answer(body | {"max_tokens": 3})
        return entries(tokens, *rest, name)

    told = r"cuts an answer after 3 tokens, before max_new_tokens=8: raise its own limit, or pass max_new_tokens=3 \("
    with OpenAI(lambda question: "…", logprobs=short) as server:
        server.longest = 3
        with pytest.raises(ValueError, match=told):
            make(folder, tmp_path / "k.safetensors", server=server.url)


TOP = [{"token": f"token_id:{i}", "logprob": -1.0 - i} for i in range(8, 13)]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (None, "gives no log probabilities: take one that does, such as vLLM"),
        ([{"token": "token_id:8", "logprob": -1.0, "top_logprobs": []}], "gives no log probabilities"),
        (
            [{"token": "token_id:8", "logprob": -1.0, "top_logprobs": TOP[:3]}],
            r"gives 3 log probabilities of a token, not 5: pass top_k=3 \(--top-k\)",
        ),
        (
            [{"token": "token_id:8", "logprob": -1.0, "top_logprobs": [*TOP[:4], {**TOP[4], "logprob": -math.inf}]}],
            "gives a log probability that is NaN or infinite",
        ),
        (
            [{"token": "Zebra", "logprob": -1.0, "top_logprobs": TOP}],
            r"says 'Zebra', which is not one token of \S+base's tokenizer but none: take a server that numbers",
        ),
        (
            [{"token": "token_id:64", "logprob": -1.0, "top_logprobs": TOP}],
            r"says 'token_id:64', which is not one token",
        ),
        (
            [{"token": "token_id:3", "logprob": -1.0, "top_logprobs": TOP}],
            "answers with token 3, which stands for an image",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(said, message, folder, tmp_path):
    with (
        OpenAI(lambda question: "8", logprobs=lambda body: said) as server,
        pytest.raises(ValueError, match=message) as caught,
    ):
        make(folder, tmp_path / "k.safetensors", server=server.url)
    assert "\n" not in str(caught.value) and not [*tmp_path.iterdir()]


WAYS_OUT = {
    "400: Requested sample logprobs of 5, which is greater than max allowed: 4": r".*started with --max-logprobs 5$",
    "400": "its log may say more$",
    "401": r"give the server's key as api_key \(--api-key-env\)$",
    "403": r"give the server's key as api_key \(--api-key-env\)$",
    "413": "have it take larger requests .*, or take smaller pictures$",
    "422": "its log may say more$",
    "308": r"give that address, up to its /v1, as server \(--server\)$",
}


def test_servers_that_refuse(folder, tmp_path):
    with OpenAI(lambda question: "8") as server:
        for status, way_out in WAYS_OUT.items():
            server.fail("", *[f"status {status}"] * 4)  # as many as are asked at a time
            with pytest.raises(ValueError, match=rf"refuses the question: status {status[:3]} \(.*\); {way_out}"):
                make(folder, tmp_path / "k.safetensors", server=server.url)
            server.faults.clear()
        with pytest.raises(ValueError, match=r"status 404 .*; give the address that ends in /v1, and the id .*base$"):
            make(folder, tmp_path / "k.safetensors", server=server.url.replace("/v1", "/v2"))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("fault", ["gzip", "no end", "too much", "cut", "no choices", "deep", "status 503"])
def test_servers_that_fail_are_asked_again(fault, folder, tmp_path, monkeypatch):
    """And given up in a sentence; none is waited for without an end."""
    for name, value in {"chat.LARGEST": 2**20, "chat.LONGEST": 1, "keeping.server.TIMEOUT": 1}.items():
        monkeypatch.setattr(f"drift_peft.{name}", value)
    monkeypatch.setattr("random.uniform", lambda low, high: 0.01)
    monkeypatch.setattr("drift_peft.keeping.server.RETRIES", 2)
    said = [{"token": "token_id:8", "logprob": -1.0, "top_logprobs": TOP}]
    with OpenAI(lambda question: "8", logprobs=lambda body: said) as server:
        server.fail("", fault, fault)
        few = {"samples": 6, "batch_size": 1, "server": server.url}
        assert len(make(folder, tmp_path / "k.safetensors", **few)) == 6
        assert len(server.asked) == 8 and len(server.answered) == 6
        server.fail("", *[fault] * 3)
        with pytest.raises(ConnectionError, match=r"^the server \S+ does not answer: .*, 3 times$") as caught:
            make(folder, tmp_path / "other.safetensors", **few)
    assert "\n" not in str(caught.value)


def test_nobody_there(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("drift_peft.keeping.server.RETRIES", 1)
    with OpenAI(lambda question: "8") as server:
        url = server.url
    with pytest.raises(ConnectionError, match=r"the server \S+ does not answer: "):
        make(folder, tmp_path / "k.safetensors", server=url, samples=2)


# Tokens of other kinds of vocabularies


def byte_level():
    words = ["the", "Ġthe", "Ã", "©", "Ċ", "Ã©", "<|im_end|>"]
    vocabulary = {
        word: i for i, word in enumerate([*words, *(w for w in pre_tokenizers.ByteLevel.alphabet() if w not in words)])
    }
    model = Tokenizer(models.BPE(vocabulary, []))
    model.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(tokenizer_object=model)


def sentence_piece():
    words = ["<unk>", "the", "▁the", "<0x0A>", "<0xC3>", "é"]
    model = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tf.PreTrainedTokenizerFast(tokenizer_object=model)


@pytest.mark.parametrize(
    ("tokenizer", "entry", "token"),
    [
        (byte_level, {"token": "the"}, "the"),
        (byte_level, {"token": " the"}, "Ġthe"),
        (byte_level, {"token": "é"}, "Ã©"),
        (byte_level, {"token": "\n"}, "Ċ"),
        (byte_level, {"token": "\ufffd", "bytes": [0xC3]}, "Ã"),
        (byte_level, {"token": "\ufffd", "bytes": [0xEF, 0xBF, 0xBD]}, None),  # what vLLM writes for all torn ones
        (byte_level, {"token": "<|im_end|>"}, "<|im_end|>"),
        (sentence_piece, {"token": "▁the"}, "▁the"),
        (sentence_piece, {"token": "the"}, None),  # either of two
        (sentence_piece, {"token": "\n"}, "<0x0A>"),
        (sentence_piece, {"token": "\ufffd", "bytes": [0xC3]}, "<0xC3>"),
        (sentence_piece, {"token": "é"}, "é"),
    ],
)
def test_tokens_by_their_text(tokenizer, entry, token):
    words = tokenizer()
    server = Server("http://localhost:1", "vlm", words, len(words), [])
    if token is None:
        with pytest.raises(ValueError, match=r"is not one token of vlm's tokenizer but (2|none)"):
            server._token(entry)
    else:
        assert server._token(entry) == words.get_vocab()[token]


def test_addresses():
    words = byte_level()
    paths = {"http://a:1": "http://a:1/v1/", "http://a:1/v1/": "http://a:1/v1/", "https://a/x": "https://a/x/"}
    for url, start in paths.items():
        assert Server(url, "vlm", words, 9, []).url == f"{start}chat/completions"
    for url in ("ftp://a", "a:1", "http://", "http://me:secret@a", "http://a:port", "http://a:80000"):
        with pytest.raises(ValueError, match="is no address such as") as caught:
            Server(url, "vlm", words, 9, [])
        assert "secret" not in str(caught.value)
    for key in ("secret\n", "sécret"):
        with pytest.raises(ValueError, match=r"^the key of the server has signs that no key has") as caught:
            Server("http://a", "vlm", words, 9, [], key)
        assert "cret" not in str(caught.value)
