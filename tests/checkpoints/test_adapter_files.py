"""adapter.py and lora.py at their lowest level: files as `save_pretrained` writes them, and a base of names alone."""

import json
import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from peft import LoHaConfig, LoraConfig
from safetensors.torch import save_file

from drift_peft.checkpoints import lora as module
from drift_peft.checkpoints.adapter import lora_variants, read_updates
from drift_peft.checkpoints.lora import (
    _match,
    adapter_folder,
    adapter_updates,
    is_adapter,
    recorded_base,
    watched_adapter,
)
from drift_peft.checkpoints.update import LowRank, Rows, Whole

Q, EMBED, HEAD, FC = "layers.0.self_attn.q_proj", "embed_tokens", "lm_head", "vision.fc1"
SHAPES = {f"raw.{Q}.weight": (5, 4), f"raw.{Q}.bias": (5,), f"raw.{EMBED}.weight": (9, 4), f"raw.{FC}.weight": (6, 4)}
generator = torch.Generator().manual_seed(0)


def randn(*size):
    return torch.randn(*size, generator=generator)


class Base:
    """What `_match` asks of a checkpoint."""

    def __init__(self, tied=False, head=False, quantized=None):
        self.source, self.tied, self.model = "the/base", tied, torch.nn.Module()
        self.language_model = {f"{name}.weight": f"raw.{name}.weight" for name in (Q, EMBED)}
        self.language_model[f"{Q}.bias"] = f"raw.{Q}.bias"
        if head:
            self.language_model[f"{HEAD}.weight"] = f"raw.{HEAD}.weight"
        self.in_memory = {f"{FC}.weight": f"raw.{FC}.weight"}
        self.keys = {f"{FC}.3.weight": None}  # which transformers makes another tensor of
        self.layout = SimpleNamespace(name=lambda name: name.removeprefix("older."))
        names = {f"model.{name}": name for name in self.language_model}
        self.decoder = SimpleNamespace(name=names.get, kinds=dict.fromkeys(self.language_model), skipped=())
        self._quantized = quantized

    def shape(self, raw):
        return SHAPES.get(raw, (9, 4))

    def quantization_sign(self, raw):
        return "is in 4 bits" if raw == self._quantized else None


def low_rank(name=f"model.{Q}", r=2, out=5, in_=4):
    return {f"{name}.lora_A.weight": randn(r, in_), f"{name}.lora_B.weight": randn(out, r)}


def save(folder, tensors, pickled=False, **settings):
    LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], **settings}).save_pretrained(folder)
    tensors = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in tensors.items()}
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def only(found):
    """The one update of the one tensor."""
    (update,) = found.values()
    return update


# What the files say


@pytest.mark.parametrize("pickled", [False, True])
def test_low_rank(tmp_path, pickled):
    parts = low_rank()
    found = read_updates(save(tmp_path, parts, pickled))
    assert found.keys() == {f"model.{Q}.weight"}
    update = only(found)
    assert type(update) is LowRank and update.module == f"model.{Q}" and update.scaling == 3.0
    assert update.magnitude is None and update.start is None
    assert torch.equal(update.A, parts[f"model.{Q}.lora_A.weight"])
    assert torch.equal(update.B, parts[f"model.{Q}.lora_B.weight"])


@pytest.mark.parametrize(
    ("settings", "r", "scaling"),
    [
        ({"use_rslora": True}, 2, 6 / math.sqrt(2)),
        ({"rank_pattern": {"k_proj": 7, "q_proj": 3, "self_attn.q_proj": 8}}, 3, 2.0),  # the first that matches
        ({"alpha_pattern": {"q": 1, "q_proj": 5}}, 2, 2.5),
        ({"alpha_pattern": {"q_proj": 5}, "rank_pattern": {"q_proj": 4}, "use_rslora": True}, 4, 2.5),
        ({"lora_alpha": 2.5}, 2, 1.25),
    ],
)
def test_scaling(tmp_path, settings, r, scaling):
    assert only(read_updates(save(tmp_path, low_rank(r=r), **settings))).scaling == pytest.approx(scaling)


def test_all_parts_of_a_module(tmp_path):
    parts = low_rank() | {
        f"model.{Q}.lora_magnitude_vector": randn(5),
        f"model.{Q}.lora_B.bias": randn(5),
        f"model.{Q}.base_layer.weight": randn(5, 4),
    }
    found = read_updates(save(tmp_path, parts, lora_bias=True))
    assert found.keys() == {f"model.{Q}.weight", f"model.{Q}.bias"}
    update, bias = found.values()
    assert torch.equal(update.magnitude, parts[f"model.{Q}.lora_magnitude_vector"])
    assert torch.equal(update.start, parts[f"model.{Q}.base_layer.weight"])
    assert (
        bias.module == update.module == f"model.{Q}"
        and bias.added
        and torch.equal(bias.value, 3.0 * parts[f"model.{Q}.lora_B.bias"])
    )


def test_an_embedding_adds_the_transposed_product(tmp_path):
    A, B = randn(2, 9), randn(4, 2)
    parts = {f"model.{EMBED}.lora_embedding_A": A, f"model.{EMBED}.lora_embedding_B": B}
    update = only(read_updates(save(tmp_path, parts)))
    W = randn(9, 4)
    torch.testing.assert_close(torch.cat([*update.blocks(W)]), W + 3 * (B @ A).T)
    assert update.misfit((9, 4)) is None


def test_tensors_that_were_trained_themselves(tmp_path):
    saved = {f"model.{Q}.bias": randn(5)}
    for settings in ({"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["q_proj"]}):
        update = only(read_updates(save(tmp_path, saved, **settings)))
        assert type(update) is Whole and update.module == f"model.{Q}" and not update.added
        assert torch.equal(update.value, saved[f"model.{Q}.bias"])
    bias = {f"model.{Q}.base_layer.bias": randn(5)}
    found = read_updates(save(tmp_path, low_rank() | bias, bias="lora_only"))
    assert found.keys() == {f"model.{Q}.weight", f"model.{Q}.bias"}
    whole = found[f"model.{Q}.bias"]
    assert torch.equal(whole.value, bias[f"model.{Q}.base_layer.bias"]) and whole.module == f"model.{Q}"
    assert read_updates(save(tmp_path, bias, bias="lora_only")).keys() == {f"model.{Q}.bias"}


@pytest.mark.parametrize("indices", [[3, 1], {"head": [7], "embed_tokens": [3, 1]}, {"model.embed_tokens": [3, 1]}])
def test_tokens(tmp_path, indices):
    values = {f"model.{EMBED}.token_adapter.trainable_tokens_delta": randn(2, 4)}
    update = only(read_updates(save(tmp_path, values, trainable_token_indices=indices)))
    assert type(update) is Rows and update.rows.tolist() == [3, 1] and update.module == f"model.{EMBED}"
    assert torch.equal(update.values, *values.values())


def foreign(name="model.norm.weight"):
    return low_rank() | {name: randn(4)}


def low_rank_A():
    return {key: tensor for key, tensor in low_rank().items() if "lora_A" in key}


def tokens(**more):
    return {f"model.{EMBED}.token_adapter.trainable_tokens_delta": randn(2, 4), **more}


REFUSED = {
    "nothing": ({}, {}, "holds no weights: it was saved from a model that is not wrapped"),
    "foreign": (foreign(), {}, r"holds base_model.model.model.norm.weight, which is no part of LoRA"),
    "a weight beside biases": (foreign(), {"bias": "all"}, "model.norm.weight, which is no part of LoRA"),
    "a bias that was not trained": (foreign("model.norm.bias"), {}, "model.norm.bias, which is no part of LoRA"),
    "a part of a variant": (foreign(f"model.{Q}.lora_X"), {"modules_to_save": ["q"]}, "lora_X, which is no part"),
    "half": (low_rank_A(), {}, rf"only lora_A.weight of model.{Q}, without lora_B.weight"),
    "half of an embedding": (
        {f"model.{EMBED}.lora_embedding_B": randn(4, 2)},
        {},
        "holds only lora_embedding_B of model.embed_tokens, without lora_embedding_A",
    ),
    "the other half of one": (
        {f"model.{EMBED}.lora_embedding_A": randn(2, 9)},
        {},
        "holds only lora_embedding_A of model.embed_tokens, without lora_embedding_B",
    ),
    "half, with more": (
        low_rank_A() | {f"model.{Q}.lora_magnitude_vector": randn(5)},
        {"use_dora": True},
        rf"adapter \S+ holds only lora_A.weight and lora_magnitude_vector of model.{Q}, without lora_B.weight",
    ),
    "convolution": (
        {f"{Q}.lora_A.weight": randn(2, 3, 1), f"{Q}.lora_B.weight": randn(4, 2, 1)},
        {},
        "which is a convolution; merge it in memory",
    ),
    "one dimension": ({f"{Q}.lora_A.weight": randn(8), f"{Q}.lora_B.weight": randn(2)}, {}, r"its lora_A is \[8\]"),
    "uneven dimensions": (
        {f"{Q}.lora_A.weight": randn(2, 4), f"{Q}.lora_B.weight": randn(4, 2, 1)},
        {},
        r"its lora_B \[4, 2, 1\]",
    ),
    "rank of A": (low_rank(r=3) | {f"model.{Q}.lora_B.weight": randn(5, 2)}, {}, r"says r=2 for .* lora_A is \[3, 4\]"),
    "rank of B": (low_rank() | {f"model.{Q}.lora_B.weight": randn(5, 3)}, {}, r"says r=2 for .* lora_B \[5, 3\]"),
    "dora on an embedding": (
        {
            f"{EMBED}.lora_embedding_A": randn(2, 9),
            f"{EMBED}.lora_embedding_B": randn(4, 2),
            f"{EMBED}.lora_magnitude_vector": randn(4),
        },
        {},
        "uses DoRA on the embedding embed_tokens",
    ),
    "tokens and adapter": (
        tokens(**{f"model.{EMBED}.lora_embedding_A": randn(2, 9), f"model.{EMBED}.lora_embedding_B": randn(4, 2)}),
        {"trainable_token_indices": [1, 2]},
        "trains model.embed_tokens in two ways at once",
    ),
    "two biases": (
        low_rank() | {f"model.{Q}.lora_B.bias": randn(5), f"model.{Q}.base_layer.bias": randn(5)},
        {"bias": "all"},
        f"trains model.{Q} in two ways at once",
    ),
    "unnamed tokens": (tokens(), {}, "does not name the rows of model.embed_tokens"),
    "tokens of another": (
        tokens(),
        {"trainable_token_indices": {"tokens": [1, 2]}},
        "does not name the rows of model.embed_tokens",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_tensors(tmp_path, case):
    tensors, settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as refused:
        read_updates(save(tmp_path, tensors, **settings))
    assert str(tmp_path) in str(refused.value) or "tokens" in case


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pissa"}, r"uses init_lora_weights='pissa', which is more than W \+ s·B·A"),
        ({"init_lora_weights": "olora"}, r"uses init_lora_weights='olora', .*merge it in memory instead"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            r"'pissa_niter_4', whose .*merge it in the process that trained",
        ),
        ({"init_lora_weights": "corda"}, r"'corda', whose .* need not come out the same when it is made again"),
        ({"use_qalora": True}, "uses use_qalora=True, which"),
        ({"layer_replication": [[0, 1]]}, "uses layer_replication="),
        ({"target_parameters": ["a"], "use_qalora": True}, "uses use_qalora=True and target_parameters="),
        ({"alora_invocation_tokens": [1]}, r"uses alora_invocation_tokens=\[1\]"),
        ({"lora_alpha": float("nan")}, "lora_alpha should be a finite number"),
        ({"lora_alpha": True}, "lora_alpha should be"),
        ({"alpha_pattern": {"q": 1.0, "k": float("inf")}}, "alpha_pattern.k should be a finite number"),
    ],
)
def test_refused_settings(tmp_path, changes, message):
    save(tmp_path, low_rank())
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_updates(tmp_path)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_as_it_is(tmp_path, start):
    edit(save(tmp_path, low_rank()), init_lora_weights=start)
    assert len(read_updates(tmp_path)) == 1


def test_variants_are_known_by_name():
    found = lora_variants()
    assert {f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")} <= {*found}
    assert {"use_dora", "alora_invocation_tokens"} <= {*found} and "r" not in found and len({*found}) == len(found)


def test_other_adapters_and_damaged_files(tmp_path):
    LoHaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is LOHA, not LoRA; merge it in memory"):
        read_updates(tmp_path)
    save(tmp_path, low_rank())
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"adapter \S+ is truncated or damaged \(.*: save or fetch it again"):
        read_updates(tmp_path)
    file.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model.bin is truncated or no torch file: fetch it again"):
        read_updates(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither adapter_model.safetensors nor adapter_model.bin"):
        read_updates(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"PEFT cannot read the adapter_config\.json of adapter"):
        read_updates(tmp_path)


def test_a_folder_says_what_it_is(tmp_path):
    save(tmp_path, low_rank(), base_model_name_or_path="org/base")
    assert is_adapter(tmp_path) and is_adapter(str(tmp_path)) and adapter_folder(str(tmp_path)) == tmp_path
    assert recorded_base(tmp_path) == ("org/base", None)
    watch = watched_adapter(tmp_path, "the/adapter")
    assert {path.name for path in watch.states()} >= {"adapter_config.json", "adapter_model.safetensors"}
    edit(tmp_path, base_model_name_or_path="")
    with pytest.raises(ValueError, match=r"adapter_config\.json has changed while the/adapter was read"):
        watch.check()
    assert recorded_base(tmp_path) == (None, None)
    (tmp_path / "adapter_config.json").unlink()
    assert not is_adapter(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json: name what save_pretrained wrote"):
        adapter_folder(tmp_path)


# What of the base they change


def test_each_update_finds_its_tensor(tmp_path):
    parts = low_rank() | low_rank(FC, out=6) | {f"model.{Q}.base_layer.bias": randn(5)}
    found = _match(Base(), read_updates(save(tmp_path, parts, bias="all")), "the/adapter")
    assert found.keys() == {f"raw.{Q}.weight", f"raw.{Q}.bias", f"raw.{FC}.weight"}
    assert found[f"raw.{Q}.weight"].module == f"model.{Q}" and found[f"raw.{FC}.weight"].module == FC
    with pytest.raises(ValueError, match="adapter the/adapter does not fit the base the/base"):
        adapter_updates(save(tmp_path, low_rank(in_=3)), Base(), "the/adapter")


def test_whose_names_the_adapter_has():
    """The model's own names come before those of the layout, and its layers before their number."""
    base, update = Base(), Whole("own", randn(5, 4))
    base.decoder.name = {"own.weight": f"{Q}.weight"}.get
    assert _match(base, {"own.weight": update}, "a") == {f"raw.{Q}.weight": update}
    base.decoder.skipped = (0,)  # a layer that the text LLM lacks
    assert _match(base, {f"model.{Q.replace('0', '1')}.weight": update}, "a") == {f"raw.{Q}.weight": update}
    base.layout.name, update = lambda name: "renamed", Whole(FC, randn(6, 4))
    assert _match(base, {f"{FC}.weight": update}, "a") == {f"raw.{FC}.weight": update}


@pytest.mark.parametrize("name", [f"language_model.model.{Q}", f"older.{FC}", f"{FC}.base_layer"])
def test_names_of_other_versions_and_wrappers(name):
    shape = (5, 4) if Q in name else (6, 4)
    raw = f"raw.{Q if Q in name else FC}.weight"
    update = Whole(name, randn(*shape))
    assert _match(Base(), {f"{name}.weight": update}, "a") == {raw: update}


def whole(name, *size):
    return {f"model.{name}.weight": Whole(f"model.{name}", randn(*size))}


def misfits(base, updates):
    with pytest.raises(ValueError, match=r"adapter the/adapter does not fit the base the/base: ") as caught:
        _match(base, updates, "the/adapter")
    return str(caught.value).split("the/base: ")[1]


def test_what_finds_no_tensor_is_listed():
    assert misfits(Base(), whole("layers.7.mlp.up_proj", 5, 4)) == "the base has no layers.7.mlp.up_proj.weight"
    assert misfits(Base(), {"other.weight": Whole("other", randn(2, 2))}) == "the base has no other.weight"
    assert misfits(Base(), whole(Q, 5, 3)) == f"raw.{Q}.weight is [5, 4] in the base and [5, 3] in the adapter"
    quantized = Base(quantized=f"raw.{Q}.weight")
    assert misfits(quantized, whole(Q, 5, 4)).startswith(f"raw.{Q}.weight is in 4 bits in the base: name the full")
    twice = {**whole(Q, 5, 4), f"language_model.{Q}.weight": Whole(f"language_model.{Q}", randn(5, 4))}
    assert misfits(Base(), twice) == f"language_model.{Q} and model.{Q} are the same weight {Q}.weight"
    six = {f"other{i}.weight": Whole(f"other{i}", randn(2, 2)) for i in range(6)}
    assert misfits(Base(), six).endswith("the base has no other3.weight; the base has no other4.weight; and 1 more")
    many = {f"other{i}.weight": Whole(f"other{i}", randn(2, 2)) for i in range(7)}
    listed = misfits(Base(), many)
    assert listed.count("the base has no") == 5 and listed.endswith("; and 2 more")
    five = misfits(Base(), dict([*many.items()][:5]))
    assert five.count("the base has no") == 5 and five.endswith("other4.weight")


@pytest.mark.parametrize("head", [False, True])
def test_a_tied_weight(head):
    base, value = Base(tied=True, head=head), randn(9, 4)
    ends = {f"model.{name}.weight": Whole(name, value.clone()) for name in (EMBED, HEAD)}
    base.decoder.kinds |= {f"{HEAD}.weight": "head"}
    found = _match(base, {f"{HEAD}.weight": ends[f"model.{HEAD}.weight"], **whole_of(ends)}, "a")
    assert found.keys() == {f"raw.{EMBED}.weight"} | ({f"raw.{HEAD}.weight"} if head else set())
    assert all(torch.equal(update.value, value) for update in found.values())
    found = _match(base, {f"{HEAD}.weight": ends[f"model.{HEAD}.weight"], **whole_of(ends), **whole(Q, 5, 4)}, "a")
    assert f"raw.{Q}.weight" in found  # what comes after them
    assert misfits(base, whole_of(ends)).startswith(
        "embed_tokens shares its weight with the head, and only one is trained"
    )
    assert misfits(base, {f"{HEAD}.weight": ends[f"model.{HEAD}.weight"]}).startswith(
        "lm_head shares its weight with the embedding, and only one is trained"
    )
    other = {f"{HEAD}.weight": Whole("lm_head", value + 1), **whole_of(ends)}
    assert "embed_tokens and lm_head are the same weight embed_tokens.weight" in misfits(base, other)
    rows = Rows(EMBED, torch.tensor([1]), randn(1, 4))
    found = _match(base, {f"model.{EMBED}.weight": rows}, "a")  # a row of an embedding is one of the head
    assert [*found.values()] == [rows] * (1 + head)


def whole_of(ends):
    return {f"model.{EMBED}.weight": ends[f"model.{EMBED}.weight"]}


def test_an_untied_embedding_is_one_of_its_own():
    base = Base(head=True)
    base.decoder.kinds |= {f"{HEAD}.weight": "head"}
    found = _match(base, whole(EMBED, 9, 4), "a")
    assert found.keys() == {f"raw.{EMBED}.weight"}


def test_alike():
    A, B = randn(2, 4), randn(5, 2)
    one = LowRank("a", A, B, 3.0)
    assert module._alike(one, LowRank("b", A.clone(), B.clone(), float("3")))
    others = LowRank("a", A, B, 2.0), LowRank("a", A + 1, B, 3.0), LowRank("a", A, B, 3.0, randn(5)), Whole("a", A)
    for other in others:
        assert not module._alike(one, other) and not module._alike(other, one)
    assert not module._alike(LowRank("a", A, B, 3.0, randn(5)), LowRank("a", A, B, 3.0, randn(5)))
