"""A soup is a model that transformers opens: sharded, tied, offline."""

from __future__ import annotations

import warnings

import pytest

import streamsoup

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Three fine-tunes of a tiny BERT with tied word embeddings, as transformers saves them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=20,
    )  # fmt: skip
    torch.manual_seed(0)
    start = BertForMaskedLM(config)
    paths = []
    for i in range(3):
        model = BertForMaskedLM(config)
        model.load_state_dict(start.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.001 * torch.randn_like(parameter)
        model.save_pretrained(folder / f"run{i}", max_shard_size="5KB" if i else "1GB")
        paths.append(str(folder / f"run{i}"))
    return paths


@pytest.mark.parametrize("shard_size", ["5GB", "4kB"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_from_pretrained_opens_a_soup_and_it_is_the_mean(bert, tmp_path, monkeypatch, shard_size, dtype):
    import torch
    from transformers import AutoModelForMaskedLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    streamsoup.soup(bert, tmp_path / "soup", shard_size=shard_size, dtype=dtype)
    assert (shard_size == "4kB") == (tmp_path / "soup" / "model.safetensors.index.json").exists()
    soup, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "soup", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    parts = [AutoModelForMaskedLM.from_pretrained(path) for path in bert]
    for name, value in soup.named_parameters():
        mean = torch.stack([dict(p.named_parameters())[name].double() for p in parts]).mean(0)
        assert value.dtype == (torch.float32 if dtype is None else torch.bfloat16)
        torch.testing.assert_close(value.double(), mean, rtol=2e-7 if dtype is None else 4e-3, atol=1e-9)
    assert soup.get_input_embeddings().weight is soup.get_output_embeddings().weight
    ids = torch.arange(12)[None]
    assert torch.isfinite(soup(input_ids=ids).logits).all()
    assert soup.config.hidden_size == 16


def test_auto_model_opens_the_bare_encoder(bert, tmp_path, monkeypatch):
    from transformers import AutoModel

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    streamsoup.soup(bert[:2], tmp_path / "soup")
    assert AutoModel.from_pretrained(tmp_path / "soup").config.model_type == "bert"


def test_transformers_dequantises_what_was_quantised_to_the_same_bits(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")  # transformers asks for it
    import torch
    from transformers import FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "run")
    streamsoup.soup([str(tmp_path / "run")], tmp_path / "fp8", quantize="fp8-block")
    streamsoup.soup([str(tmp_path / "fp8")], tmp_path / "soup")
    theirs = LlamaForCausalLM.from_pretrained(
        tmp_path / "fp8", quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "soup", dtype=torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
