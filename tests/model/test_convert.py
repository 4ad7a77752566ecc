"""Weights between files and memory."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from fvlm.model import FoveatedConfig, FoveatedVLM, build_model, tiny_config
from fvlm.model.convert import HEAD, load_into, locate, published_name, read_state_dict

VOCABULARY = 64


def test_saved_and_loaded_is_the_same_model(tmp_path):
    model = build_model(tiny_config(VOCABULARY, query_logit_scale="learnable", tokens_per_frame=2))
    model.save_pretrained(tmp_path)
    again = FoveatedVLM.from_pretrained(tmp_path)
    assert again.config.tokens_per_frame == 2
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    names = load_file(tmp_path / "model.safetensors").keys()
    assert HEAD not in names
    assert "encoder.dino.encoder.layer.0.attention.attention.query.weight" in names
    assert "encoder.dino.encoder.layer.3.attention.output.dense.bias" in names


def test_published_pt_with_the_head_twice_and_either_naming(tmp_path):
    config = tiny_config(VOCABULARY)
    model = build_model(config)
    memory = model.state_dict()
    published = {published_name(name): x for name, x in memory.items()}
    assert published.keys() != memory.keys() or "attention.attention" in " ".join(memory)
    for state in (memory, published):
        torch.save({"model_state_dict": state, "global_step": 7}, tmp_path / "model.pt")
        again = FoveatedVLM.from_pretrained(tmp_path / "model.pt", config=config)
        assert all(torch.equal(value, memory[name]) for name, value in again.state_dict().items())


def test_what_does_not_fit_is_listed(tmp_path):
    model = build_model(tiny_config(VOCABULARY))
    state = dict(model.state_dict())
    state["q_static"] = torch.zeros(1, 5)
    state["something"] = torch.zeros(1)
    del state["q_init"]
    with pytest.raises(
        ValueError, match=r"missing q_init; unknown something; q_static: file \(1, 5\), model \(1, 96\)"
    ):
        load_into(model, state, "a file")


def test_tied_heads_that_differ_are_refused():
    model = build_model(tiny_config(VOCABULARY))
    state = {name: x.clone() for name, x in model.state_dict().items()}
    state[HEAD][0, 0] += 1
    with pytest.raises(ValueError, match="the geometry ties them"):
        load_into(model, state, "a file")


def test_a_pickle_with_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"model_state_dict": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match=r"[Ww]eights.only"):
        read_state_dict(tmp_path / "trap.pt")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_damaged_files_are_named(tmp_path, name):
    model = build_model(tiny_config(VOCABULARY))
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    whole = (tmp_path / name).read_bytes()
    for cut in (0, 100, len(whole) // 2):
        (tmp_path / name).write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"{name}: damaged"):
            read_state_dict(tmp_path / name)


def test_nothing_to_load_is_said_plainly(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        FoveatedVLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        FoveatedVLM.from_pretrained(tmp_path)
    model = build_model(tiny_config(VOCABULARY))
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="carries no geometry"):
        FoveatedVLM.from_pretrained(tmp_path / "bare.pt")


def test_a_hub_id_may_have_a_dot_and_brings_its_chat_template(tmp_path, monkeypatch):
    build_model(tiny_config(VOCABULARY)).save_pretrained(tmp_path)
    asked = {}

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("fvlm.model.convert.snapshot_download", snapshot)
    weights, config = locate("somebody/model-1.7B")
    assert (weights, config.model_type) == (tmp_path / "model.safetensors", "fvlm")
    assert "*.jinja" in asked["somebody/model-1.7B"]
    with pytest.raises(FileNotFoundError, match="no such file"):
        locate("somebody/model.safetensors")


def test_from_backbones_keeps_loaded_weights_and_draws_the_connector_as_settled(tmp_path):
    config = tiny_config(VOCABULARY)
    llm, dino = LlamaForCausalLM(config.llm_config), Dinov2Model(config.vision_config)
    llm.save_pretrained(tmp_path / "llm")
    dino.save_pretrained(tmp_path / "dino")
    model = FoveatedVLM.from_backbones(tmp_path / "llm", tmp_path / "dino", visual_scale=0.2)
    assert torch.equal(model.llm.model.layers[2].mlp.up_proj.weight, llm.model.layers[2].mlp.up_proj.weight)
    assert torch.equal(model.encoder.dino.embeddings.cls_token, dino.embeddings.cls_token)
    assert model.config.visual_scale == 0.2
    assert model.encoder.query_input_proj.bias is None
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    torch.manual_seed(0)
    wide = FoveatedVLM.from_backbones(
        config.llm_config, Dinov2Config(hidden_size=960, num_hidden_layers=1, image_size=28)
    )
    for query in (wide.q_static, wide.q_init):
        assert query.std().item() == pytest.approx(1.0, abs=0.1)
    bound = 960**-0.5  # of torch's default for linear layers
    assert wide.encoder.output_proj.weight.abs().max().item() == pytest.approx(bound, rel=1e-2)


@pytest.mark.parametrize(
    ("llm", "vision", "millions"), [("135M", "small", 157.6), ("360M", "small", 384.9), ("135M", "base", None)]
)
def test_published_geometries_have_the_published_size(shared_fixtures, llm, vision, millions):
    folder = shared_fixtures / "configs"
    llm_config = LlamaConfig.from_json_file(folder / f"SmolLM2-{llm}-Instruct__config.json")
    vision_config = Dinov2Config.from_json_file(folder / f"dinov2-{vision}__config.json")
    with torch.device("meta"):
        model = FoveatedVLM(FoveatedConfig(llm_config=llm_config, vision_config=vision_config))
    count = sum(p.numel() for p in model.parameters())
    assert model.config.query_dim == vision_config.hidden_size
    assert model.config.llm_config.rope_parameters["rope_theta"] == 100_000
    if millions:
        assert count / 1e6 == pytest.approx(millions, abs=0.5)


def test_parameter_groups_follow_the_published_table():
    groups = build_model(tiny_config(VOCABULARY)).param_groups()
    connector = {name for name, _ in groups["connector"]}
    assert connector == {
        "q_static",
        "q_init",
        "encoder.query_input_proj.weight",
        "encoder.output_proj.weight",
        "encoder.output_proj.bias",
        "dino_to_llm.weight",
        "dino_to_llm.bias",
        "llm_to_query.weight",
        "llm_to_query.bias",
    }
    assert all(name.startswith("encoder.dino.") for name, _ in groups["dino"])
    assert all(name.startswith("llm.") for name, _ in groups["llm"])
    assert "encoder.dino.embeddings.mask_token" not in {name for name, _ in groups["dino"]}
