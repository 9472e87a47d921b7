"""Names and shapes of the tensors of well-known networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def vit(width: int, mlp: int, depth: int, patch: int = 14, tokens: int = 257, classes: int = 1000) -> Shapes:
    """Yield names and shapes of a vision transformer."""
    yield "patch_embed.proj.weight", (width, 3, patch, patch)
    yield "patch_embed.proj.bias", (width,)
    yield "pos_embed", (1, tokens, width)
    for layer in range(depth):
        for name, shape in (
            ("norm1.weight", (width,)),
            ("norm1.bias", (width,)),
            ("attn.qkv.weight", (3 * width, width)),
            ("attn.qkv.bias", (3 * width,)),
            ("attn.proj.weight", (width, width)),
            ("attn.proj.bias", (width,)),
            ("norm2.weight", (width,)),
            ("norm2.bias", (width,)),
            ("mlp.fc1.weight", (mlp, width)),
            ("mlp.fc1.bias", (mlp,)),
            ("mlp.fc2.weight", (width, mlp)),
            ("mlp.fc2.bias", (width,)),
        ):
            yield f"blocks.{layer}.{name}", shape
    yield "norm.weight", (width,)
    yield "norm.bias", (width,)
    yield "head.weight", (classes, width)
    yield "head.bias", (classes,)


def llama(width: int = 4096, mlp: int = 11008, depth: int = 32, vocabulary: int = 32000) -> Shapes:
    """Yield names and shapes of a LLaMA."""
    yield "model.embed_tokens.weight", (vocabulary, width)
    for layer in range(depth):
        for name, shape in (
            ("self_attn.q_proj", (width, width)),
            ("self_attn.k_proj", (width, width)),
            ("self_attn.v_proj", (width, width)),
            ("self_attn.o_proj", (width, width)),
            ("mlp.gate_proj", (mlp, width)),
            ("mlp.up_proj", (mlp, width)),
            ("mlp.down_proj", (width, mlp)),
            ("input_layernorm", (width,)),
            ("post_attention_layernorm", (width,)),
        ):
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)


PRESETS: dict[str, Callable[[], Shapes]] = {
    "vit-b32": lambda: vit(768, 3072, 12, patch=32, tokens=50),
    "vit-l14": lambda: vit(1024, 4096, 24),
    # ViT-G/14: 1.85 B parameters.
    "vit-g": lambda: vit(1664, 8192, 48),
    "llama-7b": llama,
    "moe-many-tensors": lambda: ((f"layers.{i}.expert.weight", (8, 16)) for i in range(50_000)),
    # For tests and the project's own benchmarks: ViT-g's width and MLP, 18 of its 40 layers, a head of 5,000 classes.
    "vit-g-463m": lambda: vit(1408, 6144, 18, classes=5000),
    "vit-50m": lambda: vit(768, 3072, 7),
    "small-20mb": lambda: vit(384, 1536, 5, classes=100),
    "tiny": lambda: vit(64, 128, 2, patch=4, tokens=17, classes=10),
    "one-tensor-8gb": lambda: iter([("weight", (1_000_000, 4000))]),
}
