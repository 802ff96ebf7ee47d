"""Counts the operations and bytes of MoICE at sizes that were not run, for docs/speed.md.

python examples/benchmarks/estimate_scale.py
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's build. Sizes by transformers' names; `heads` H, `kv_heads` G, `head_dim` D."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of one layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        """All weights, with embedding and head apart."""
        return self.layers * (self.layer_weights + 2 * self.hidden) + self.hidden * (2 * self.vocabulary + 1)


SHAPES = (
    Shape("7B", 32, 4096, 32, 32, 128, 11_008, 32_000),  # Llama-2-7B
    Shape("70B", 80, 8192, 64, 8, 128, 28_672, 128_256),  # Llama-3-70B
)
LENGTHS = tuple(2**k for k in range(12, 18))


def router_weights(shape: Shape, experts: int, per_head: bool = False) -> int:
    """Weights of all routers, with R = N as by default."""
    one = 2 * experts * shape.head_dim + experts * experts
    return shape.layers * one * (shape.heads if per_head else 1)


def linear_operations(shape: Shape, tokens: int, head: bool = True) -> int:
    """Operations of all weight matrices in a forward pass (a multiplication and an addition count two)."""
    return 2 * tokens * (shape.layers * shape.layer_weights + head * shape.hidden * shape.vocabulary)


def attention_operations(shape: Shape, tokens: int, experts: int, causal: bool = True) -> int:
    """Operations of `Q Kᵀ` and `P V` in a forward pass of one sequence, once per computed expert."""
    return experts * shape.layers * 4 * shape.heads * shape.head_dim * tokens**2 // (2 if causal else 1)


def router_operations(shape: Shape, tokens: int, experts: int) -> int:
    return 2 * tokens * shape.heads * router_weights(shape, experts)


def prefill_operations(shape: Shape, tokens: int, experts: int) -> int:
    """A forward pass; `experts` 0 is the base model."""
    routers = router_operations(shape, tokens, experts) if experts else 0
    return linear_operations(shape, tokens) + attention_operations(shape, tokens, max(experts, 1)) + routers


def training_operations(shape: Shape, tokens: int, experts: int) -> float:
    """A step of router training on one sequence, with gradient checkpointing.

    Layers are computed twice, and once backward: frozen weights have no gradient of their own, so backward costs what
    forward does, not twice that. The head is computed once and once backward. Flash attention's backward pass has five
    products where forward has two. Backward, routers cost twice a forward pass, for weights and queries.
    """
    layers = linear_operations(shape, tokens, head=False)
    head = linear_operations(shape, tokens) - layers
    return (
        3 * layers
        + 2 * head
        + 4.5 * attention_operations(shape, tokens, experts)
        + 4 * router_operations(shape, tokens, experts)
    )


def saved_by_mixing(shape: Shape, tokens: int, experts: int) -> int:
    """Bytes that one layer's N attentions keep for backward in bfloat16, when each is called as it is.

    For every expert the rotated queries and keys, and the output twice: as attention wrote it, and laid out again.
    """
    return experts * tokens * (3 * shape.heads + shape.kv_heads) * shape.head_dim * 2


def checkpoints(shape: Shape, tokens: int) -> int:
    """Bytes of the layers' inputs in bfloat16, which gradient checkpointing keeps."""
    return shape.layers * tokens * shape.hidden * 2


def cache(shape: Shape, tokens: int) -> int:
    """Bytes of keys and values in bfloat16, the same with and without MoICE."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens * 2


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def main() -> None:
    rows = []
    for shape in SHAPES:
        for per_head in (False, True):
            weights = router_weights(shape, 7, per_head)
            scope = "head" if per_head else "layer"
            share = weights / shape.weights
            rows.append([shape.name, scope, f"{weights:,}", f"{4 * weights / 1e6:.2f}", f"{share:.1e}"])
    print(table(["model", "router per", "parameters", "MB in float32", "share of the model"], rows), end="\n\n")

    header = ["model", "tokens", "base", "K = 2", "N = K = 5", "N = K = 7"]
    rows = []
    for shape in SHAPES:
        for tokens in LENGTHS:
            base = prefill_operations(shape, tokens, 0)
            ratios = [f"{prefill_operations(shape, tokens, k) / base:.2f}" for k in (2, 5, 7)]
            rows.append([shape.name, f"{tokens:,}", f"{base / 1e12:,.0f}", *ratios])
    print(table(header, rows), end="\n\n")

    rows = []
    for shape in SHAPES:
        for tokens in LENGTHS:
            one, all_seven = (training_operations(shape, tokens, n) for n in (1, 7))
            sizes = (cache(shape, tokens), checkpoints(shape, tokens), saved_by_mixing(shape, tokens, 7))
            sizes += (tokens * shape.vocabulary * 4,)
            rows.append(
                [shape.name, f"{tokens:,}", f"{all_seven / 1e15:,.1f}", f"{all_seven / one:.2f}"]
                + [f"{size / GIB:,.1f}" for size in sizes]
            )
    header = ["model", "tokens", "PFLOP", "ratio to N = 1", "cache", "checkpoints", "mixing, one layer", "logits"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
